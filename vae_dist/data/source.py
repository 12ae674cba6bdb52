"""Sources: the images of one split, read by index. In memory, a selection of another source, or processed.

Shapes: N images of a source, n of a request, C, H, W image.
"""

import hashlib
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import psutil
import torch
from torch import Tensor

from vae_dist.data.unchanged import MappedFile

MEMORY_SHARE = 8  # an eighth of the machine's memory for the images of one source


@dataclass(frozen=True)
class DataInfo:
    """The properties of a source, known without reading a pixel."""

    name: str  # of the data set
    count: int  # N
    image_shape: tuple[int, int, int]  # C, H, W
    classes: int | None  # labels are 0 to classes - 1; None without labels
    processing: str  # of the pixels, in words: "grey, 0 to 1"
    identity: str  # a hash: sources of equal identity have equal pixels and labels
    class_names: tuple[str, ...] | None = None  # by label; None if the labels are their own names, or without labels


class Source(Protocol):
    """The images of one split. A request is a tensor of indices `(n,)`, int64, in any order; they may repeat."""

    @property
    def info(self) -> DataInfo: ...

    def labels(self, indices: Tensor) -> Tensor | None:
        """Return the images' labels `(n,)` int64 on the CPU, None without labels."""
        ...

    def names(self, indices: Tensor) -> Sequence[str] | None:
        """Return the images' names, such as those of their files; None if they have no names."""
        ...

    def read(self, indices: Tensor, draws: Tensor | None, out: Tensor) -> None:
        """Fill `out`, uint8 `(n, C, H, W)` on the CPU. A training calls this in its prefetching thread.

        `draws` are the plan's random numbers for augmentation, one row for each image; None without augmentation. The
        result depends on nothing but `indices` and `draws`.
        """
        ...


@dataclass(frozen=True, eq=False)
class InMemory:
    """Images in memory. Raises ValueError for pixels or labels that contradict the info."""

    info: DataInfo
    pixels: Tensor  # (N, C, H, W), uint8, on the CPU
    all_labels: Tensor | None  # (N,), int64
    all_names: Sequence[str] | None = None  # N

    def __post_init__(self) -> None:
        _check("pixels", self.pixels, torch.uint8, (self.info.count, *self.info.image_shape))
        if (self.all_labels is None) != (self.info.classes is None):
            raise ValueError(f"{self.info.name} has labels or a number of classes, but not both")
        if self.all_labels is not None:
            _check("labels", self.all_labels, torch.int64, (self.info.count,))
        if self.all_names is not None and len(self.all_names) != self.info.count:
            raise ValueError(f"{self.info.name} has {self.info.count} images, but {len(self.all_names)} names")

    def labels(self, indices: Tensor) -> Tensor | None:
        return None if self.all_labels is None else self.all_labels.index_select(0, indices)

    def names(self, indices: Tensor) -> Sequence[str] | None:
        return None if self.all_names is None else [self.all_names[index] for index in indices.tolist()]

    def read(self, indices: Tensor, draws: Tensor | None, out: Tensor) -> None:
        check_request(indices, out, self.info)
        torch.index_select(self.pixels, 0, indices, out=out)


class InFile:
    """Base of sources whose images lie in a memory-mapped file, so that `resident` may read them into memory."""


class Mapped(InFile):
    """Images in a memory-mapped file. What is derived from them is read when it is asked for, unless `resident`."""

    def __init__(
        self, info: DataInfo, files: Sequence[MappedFile], all_labels: Tensor | None, all_names: Sequence[str] | None
    ) -> None:
        """`files` are that of the pixels, uint8 `(N, C, H, W)`, and those of labels and names."""
        self._files = files
        self._held = InMemory(info, torch.from_numpy(files[0].array), all_labels, all_names)
        self.info = info

    def labels(self, indices: Tensor) -> Tensor | None:
        return self._unchanged().labels(indices)

    def names(self, indices: Tensor) -> Sequence[str] | None:
        return self._unchanged().names(indices)

    def read(self, indices: Tensor, draws: Tensor | None, out: Tensor) -> None:
        self._unchanged().read(indices, draws, out)

    def _unchanged(self) -> InMemory:
        """Raises RunError if a file has changed since it was opened."""
        for file in self._files:
            file.require_unchanged()
        return self._held


def in_memory(
    name: str,
    pixels: Tensor,
    labels: Tensor | None,
    identity: str,
    *,
    processing: str | None = None,
    class_names: tuple[str, ...] | None = None,
) -> InMemory:
    """Return a source of images `(N, C, H, W)` uint8 with labels `(N,)` int64 or without.

    `processing` describes the pixels, by default as grey or colour. Raises ValueError.
    """
    if pixels.ndim != 4:
        raise ValueError(f"the pixels of {name} must be (N, C, H, W), not {tuple(pixels.shape)}")
    count, channels, height, width = pixels.shape
    classes = None if labels is None else int(labels.max()) + 1 if len(labels) else 0
    if class_names is not None:
        classes = len(class_names)
    if processing is None:
        processing = f"{'grey' if channels == 1 else 'colour'}, 0 to 1"
    info = DataInfo(name, count, (channels, height, width), classes, processing, identity, class_names)
    return InMemory(info, pixels, labels)


def read(source: Source, indices: range | Sequence[int] | Tensor) -> Tensor:
    """Read images without augmentation: `(n, C, H, W)` uint8 on the CPU."""
    indices = as_indices(indices)
    out = torch.empty(len(indices), *source.info.image_shape, dtype=torch.uint8)
    source.read(indices, None, out)
    return out


def as_indices(indices: range | Sequence[int] | Tensor) -> Tensor:
    """Return indices as a tensor `(n,)`, int64."""
    if isinstance(indices, range):
        return torch.arange(indices.start, indices.stop, indices.step)
    return torch.as_tensor(indices, dtype=torch.int64)


def every_label(source: Source) -> Tensor | None:
    """Return the labels of all images `(N,)`, int64; None without labels."""
    return source.labels(torch.arange(source.info.count))


def every_name(source: Source) -> Sequence[str] | None:
    """Return the names of all images; None if they have no names."""
    return source.names(torch.arange(source.info.count))


def select(source: Source, indices: Tensor, rule: str) -> Source:
    """Return the source of these images `(n,)` of another one. `rule` says how they were chosen, for the identity."""
    return _resident_like(source, _Selected(source, indices, rule))


def process(source: Source, change: Callable[[Tensor, Tensor], Tensor], processing: str, rule: str = "") -> Source:
    """Return a source whose pixels are `change(pixels, indices)`, of the same shape; an image's depend on no other.

    `processing` says in words what the pixels are then; `rule` adds to the identity what the words leave out.
    """
    return _resident_like(source, _Processed(source, change, processing, rule))


class _Selected:
    def __init__(self, source: Source, indices: Tensor, rule: str) -> None:
        self.info = replace(source.info, count=len(indices), identity=_derived(source, rule))
        self.source = source
        self._indices = indices

    def labels(self, indices: Tensor) -> Tensor | None:
        return self.source.labels(self._indices[indices])

    def names(self, indices: Tensor) -> Sequence[str] | None:
        return self.source.names(self._indices[indices])

    def read(self, indices: Tensor, draws: Tensor | None, out: Tensor) -> None:
        self.source.read(self._indices[indices], draws, out)


class _Processed:
    def __init__(self, source: Source, change: Callable[[Tensor, Tensor], Tensor], processing: str, rule: str) -> None:
        self.info = replace(source.info, processing=processing, identity=_derived(source, f"{processing}; {rule}"))
        self.source = source
        self._change = change

    def labels(self, indices: Tensor) -> Tensor | None:
        return self.source.labels(indices)

    def names(self, indices: Tensor) -> Sequence[str] | None:
        return self.source.names(indices)

    def read(self, indices: Tensor, draws: Tensor | None, out: Tensor) -> None:
        self.source.read(indices, draws, out)
        changed = self._change(out, indices)
        _check("processed pixels", changed, torch.uint8, tuple(out.shape))
        out.copy_(changed)


def _resident_like(source: Source, derived: Source) -> Source:
    """Read the derived source into memory if its source is in memory."""
    return _whole(derived) if isinstance(source, InMemory) else derived


def resident(source: Source) -> Source:
    """Read the images of a mapped file into memory if they need little of it; return any other source as it is.

    This changes the speed, and no bit. Processes that share a machine share its memory.
    """
    root = source
    while isinstance(root, _Selected | _Processed):
        root = root.source
    size = source.info.count * math.prod(source.info.image_shape)
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    fits = size * processes <= psutil.virtual_memory().total // MEMORY_SHARE
    return _whole(source) if isinstance(root, InFile) and fits else source


def _whole(source: Source) -> InMemory:
    return InMemory(source.info, read(source, range(source.info.count)), every_label(source), every_name(source))


def _derived(source: Source, rule: str) -> str:
    return hashlib.sha256(f"{source.info.identity}; {rule}".encode()).hexdigest()


def check_request(indices: Tensor, out: Tensor, info: DataInfo) -> None:
    """Raise ValueError if `out` can't hold these images."""
    _check("out", out, torch.uint8, (len(indices), *info.image_shape))


def _check(what: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if (tensor.dtype, tuple(tensor.shape)) != (dtype, shape):
        raise ValueError(f"{what} must be {dtype} {shape}, not {tensor.dtype} {tuple(tensor.shape)}")
