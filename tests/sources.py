"""Sources for tests: whole sources as tensors, and images that do not lie in memory."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vae_dist.config import DataConfig
from vae_dist.data.datasets import Part
from vae_dist.data.source import DataInfo, InMemory, Source, every_label, in_memory, read


class Whole(NamedTuple):
    """All images of a source."""

    pixels: Tensor
    labels: Tensor  # empty without labels


def whole(source: Source) -> Whole:
    labels = every_label(source)
    pixels = read(source, range(source.info.count))
    return Whole(pixels, torch.empty(0, dtype=torch.int64) if labels is None else labels)


def of_pixels(pixels: Tensor) -> InMemory:
    """A source of these images, without labels."""
    return in_memory("pixels", pixels, None, "none")


class Mapped:
    """The images of another source in a file, which is mapped anew at every read."""

    def __init__(self, source: Source, folder: Path) -> None:
        self.info: DataInfo = source.info
        self._path = Path(tempfile.mkdtemp(dir=folder)) / "pixels.npy"
        np.save(self._path, whole(source).pixels.numpy())
        self._labels = every_label(source)

    def labels(self, indices: Tensor) -> Tensor | None:
        return None if self._labels is None else self._labels[indices]

    def names(self, indices: Tensor) -> None:
        return None

    def read(self, indices: Tensor, draws: Tensor | None, out: Tensor) -> None:
        assert draws is None
        out.copy_(torch.from_numpy(np.load(self._path, mmap_mode="r")[indices.numpy()]))


Load = Callable[[DataConfig, Part], Source]


def mapped(load: Load, folder: Path) -> Load:
    """A data set's function whose images lie in a file."""
    return lambda config, part: Mapped(load(config, part), folder)


def unlabelled(load: Load) -> Load:
    """A data set's function without labels."""

    def without(config: DataConfig, part: Part) -> Source:
        source = load(config, part)
        return in_memory(source.info.name, whole(source).pixels, None, source.info.identity)

    return without
