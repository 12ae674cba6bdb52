"""Images in an array: its layout, its labels, and the source of its images. N images, n of a request, C, H, W image."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vae_dist.config import DataConfig, as_text
from vae_dist.data.array_files import BadArrayError, Member, mapped, members, refusing
from vae_dist.data.source import DataInfo, InFile, check_request
from vae_dist.data.unchanged import MappedFile
from vae_dist.plan import FIXED_SEED, Stream, random_words

NAME = "array"
IMAGES, LABELS = ("images", "x", "arr_0"), ("labels", "y")  # names of arrays in a file with several

MOST_CLASSES = 2**16
PROBES = 16  # images whose pixels are part of the identity
BYTES_AT_ONCE = 2**24  # of the copies that reading makes

_CHANNELS = (1, 3, 4)
_CONVERSIONS = {  # of images, to uint8
    "float": "(images * 255).round().astype('uint8') if they are from 0 to 1",
    "uint16": "(images >> 8).astype('uint8') if they use all 16 bits",
    "bool": "images.astype('uint8') * 255",
}


class Layout(NamedTuple):
    """How an array holds images."""

    axes: str
    image_shape: tuple[int, int, int]  # C, H, W


class MappedArray(InFile):
    """Images `(N, H, W)`, `(N, H, W, C)` or `(N, C, H, W)` of a memory-mapped array, by number.

    Pixels are converted to the channels of the info: colour to grey as Pillow does, which is ITU-R 601-2's luma in
    integers; grey to three equal channels.
    """

    def __init__(self, info: DataInfo, file: MappedFile, layout: Layout, labels: Tensor | None) -> None:
        self.info = info
        self._file = file
        self._layout = layout
        self._labels = labels

    def relabelled(self, info: DataInfo) -> "MappedArray":
        """Return the same images with another info; without labels if it has no classes."""
        return MappedArray(info, self._file, self._layout, None if info.classes is None else self._labels)

    def labels(self, indices: Tensor) -> Tensor | None:
        return None if self._labels is None else self._labels[indices]

    def names(self, indices: Tensor) -> Sequence[str]:
        return list(map(str, indices.tolist()))

    def read(self, indices: Tensor, draws: Tensor | None, out: Tensor) -> None:
        """Raises RunError if the file has changed since it was opened."""
        check_request(indices, out, self.info)
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < self.info.count:
            raise IndexError(f"indices must be from 0 to {self.info.count - 1}")
        self._file.require_unchanged()
        order = indices.argsort()  # the file is read from front to back
        at_once = max(BYTES_AT_ONCE // math.prod(self._layout.image_shape), 1)
        for places in order.split(at_once):
            images = torch.from_numpy(self._file.array[indices[places].numpy()])
            if self._layout.axes == "N, H, W, C":
                images = images.permute(0, 3, 1, 2)
            out[places] = _with_channels(
                images.view(-1, *self._layout.image_shape) if images.ndim == 3 else images, out
            )


def _with_channels(images: Tensor, out: Tensor) -> Tensor:
    """Convert images `(n, C, H, W)`, uint8, to the channels of `out`, 1 or 3."""
    if images.shape[1] == 1 or images.shape[1] == out.shape[1]:
        return images  # one channel is broadcast
    red, green, blue = images.int().unbind(1)
    return ((red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16).to(torch.uint8).unsqueeze(1)


def open_images(path: Path, config: DataConfig) -> MappedArray:
    """Map the images of one file. Raises UserError."""
    with refusing(path):
        found = members(path)
        name = _name_of_images(found)
        member = found[name]
        layout = _layout(member, config.image_shape)
        channels, height, width = layout.image_shape
        if config.size is not None and (height, width) != (config.size, config.size):
            raise BadArrayError(
                f"its images have {height} x {width} pixels, and arrays are not resized: leave out "
                f"data.size={config.size}, or resize the images before they are saved"
            )
        file = mapped(path, member)
        size = path.stat().st_size
    labels = _labels(path, found, len(file.array))
    channels = config.channels or channels
    classes = None if labels is None else int(labels.max()) + 1
    processing = f"{'grey' if channels == 1 else 'colour'}, 0 to 1"
    info = DataInfo(NAME, len(file.array), (channels, height, width), classes, processing, "")
    identity = _identity(file.array, labels, f"{layout}, {channels} channels, {size} bytes")
    return MappedArray(replace(info, identity=identity), file, layout, labels)


def _identity(array: npt.NDArray[np.uint8], labels: Tensor | None, facts: str) -> str:
    """Hash the facts, the shape, the labels and the pixels of PROBES images: of a large file no more is read."""
    probes = random_words(FIXED_SEED, Stream.SPLIT, 1, range(PROBES), 1)[:, 0] % np.uint64(len(array))
    digest = hashlib.sha256(f"{facts}, {array.shape}, {array.dtype}, {labels is None}".encode())
    for content in (array[probes], np.empty(0) if labels is None else labels.numpy()):
        digest.update(np.ascontiguousarray(content).data)
    return digest.hexdigest()


def _name_of_images(found: Mapping[str, Member]) -> str:
    """Return the name of the images among the arrays of a file."""
    if len(found) == 1:
        return next(iter(found))
    if named := [name for name in IMAGES if name in found]:
        return named[0]
    shaped = [name for name, member in found.items() if len(member.shape) in (3, 4)]
    only = [name for name in shaped if found[name].dtype == "uint8"] or shaped
    if len(only) == 1:
        return only[0]
    listed = ", ".join(f"{name[:50]!a} {as_text(member.shape)}" for name, member in list(found.items())[:10])
    raise BadArrayError(f"it has {len(found)} arrays ({listed}): name the one with the images {IMAGES[0]}")


def _layout(member: Member, image_shape: Sequence[int] | None) -> Layout:
    """Return how an array holds images; `image_shape` decides between two readings."""
    shape = member.shape
    if member.dtype != "uint8":
        kind = next((kind for kind in _CONVERSIONS if member.dtype.startswith(kind)), "")
        conversion = _CONVERSIONS.get(kind, "images.astype('uint8') if they are from 0 to 255")
        raise BadArrayError(f"its images are {member.dtype[:50]!a}, not uint8: save {conversion}")
    if 0 in shape:
        raise BadArrayError(f"it is empty: its shape is {as_text(shape)}")
    if member.is_fortran:
        raise BadArrayError("its images are in Fortran order: save numpy.ascontiguousarray(images)")
    if len(shape) == 3:
        if shape[0] == 3 or shape[2] in _CHANNELS:
            raise BadArrayError(
                f"its shape {shape} may be one image or {shape[0]} grey ones: save images[None] for one image, "
                "images[:, None] for grey ones"
            )
        return Layout("N, H, W", (1, *shape[1:]))
    readings = []
    if len(shape) == 4:
        _, first, second, third = shape
        readings += [Layout("N, H, W, C", (third, first, second))] if third in _CHANNELS else []
        readings += [Layout("N, C, H, W", (first, second, third))] if first in _CHANNELS else []
    if not readings:
        raise BadArrayError(
            f"its shape is {as_text(shape)}: images are (N, H, W), (N, H, W, C) or (N, C, H, W) with 1 or 3 channels"
        )
    if shape[1:] == (1, 1, 1):
        readings = readings[:1]  # both are the same
    if len(readings) > 1:
        chosen = [layout for layout in readings if image_shape and list(layout.image_shape[1:]) == image_shape[1:]]
        if len(chosen) != 1:
            both = " or ".join(f"({layout.axes}), data.image_shape={list(layout.image_shape)}" for layout in readings)
            same = readings[0].image_shape == readings[1].image_shape
            raise BadArrayError(f"its shape {shape} is {both}: {'pad the images' if same else 'give the right one'}")
        readings = chosen
    if readings[0].image_shape[0] == 4:
        raise BadArrayError(f"its shape {shape} has 4 channels: blend the images with a background colour, and save 3")
    return readings[0]


def _labels(path: Path, found: Mapping[str, Member], count: int) -> Tensor | None:
    """Return the labels that belong to a file's images `(N,)`, int64; None if there are none."""
    name = next((name for name in LABELS if name in found), None)
    if path.suffix.lower() == ".npy":
        path = path.with_name(f"{path.stem}_labels.npy")
        name = "" if path.exists() else None
    if name is None:
        return None
    with refusing(path):
        member = members(path)[name] if name == "" else found[name]
        if member.shape != (count,) or not member.dtype.startswith(("int", "uint")):
            raise BadArrayError(
                f"its labels must be integers of shape ({count},), one per image, not {member.dtype[:50]!a} of shape "
                f"{as_text(member.shape)}"
            )
        values = mapped(path, member).array
        if values.min() < 0 or values.max() >= MOST_CLASSES:
            raise BadArrayError(
                f"its labels are from {values.min()} to {values.max()}; they must be from 0 to {MOST_CLASSES - 1}: "
                "save numpy.unique(labels, return_inverse=True)[1]"
            )
    return torch.from_numpy(values.astype(np.int64))
