"""The files of a pack: the pixels of a folder's images, decoded once, and what is known about each.

A pack is a folder with .npy files, `pixels.npy` (N, C, H, W) among them, and with `index.json`. It may be untrusted:
sizes, offsets and labels are checked once, when it is opened. Shapes: N images, C, H, W image.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args, overload

import numpy as np
from numpy.typing import NDArray

from vae_dist.data.arrangement import PARTS, Arrangement
from vae_dist.data.pixels import Resize, Rule
from vae_dist.data.unchanged import MappedFile
from vae_dist.errors import UNPRINTABLE, UserError
from vae_dist.files import open_regular, parse_object, read_bounded
from vae_dist.plan import FIXED_SEED

FORMAT = "vae_dist packed images, version 1"
INDEX, PIXELS, NAMES, OFFSETS, SIZES, LABELS = (
    "index.json", "pixels.npy", "names.npy", "offsets.npy", "sizes.npy", "labels.npy",
)  # fmt: skip
FILES = (INDEX, PIXELS, NAMES, OFFSETS, SIZES, LABELS)

HEADER_BYTES = 128  # of a .npy file: the same for every number of images, so that it can be written at the end
INDEX_BYTES = 2**28
NAME_BYTES = 2**13  # no file system has longer paths
SAMPLED = 16  # images in the digest

_LARGEST = 2**46  # bytes of the pixels
_AT_ONCE = 2**24  # bytes that are hashed


class BadPackError(ValueError):
    """A folder that is no pack, or a damaged one. The message is the reason."""


class Names(Sequence[str]):
    """N names, one after another in `buffer` (bytes), from `offsets` (N + 1)."""

    def __init__(self, buffer: NDArray[np.uint8], offsets: NDArray[np.int64]) -> None:
        self.buffer = buffer
        self.offsets = offsets
        self._view = buffer.data  # its slices take half the time of a mapped array's

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[number] for number in range(len(self))[index]]
        number = range(len(self))[index]
        return str(self._view[self.offsets[number] : self.offsets[number + 1]], "utf-8")


@dataclass(frozen=True, eq=False)
class Pack:
    """An open pack. Its arrays are memory-mapped."""

    folder: Path
    rule: Rule
    files: tuple[MappedFile, ...]  # of the pixels, then of all else
    names: Names
    sizes: NDArray[np.int64]  # (N,), bytes of the image files
    arrangement: Arrangement
    refused: tuple[tuple[str, str], ...]  # files that were left out, and why
    signature: str  # of the folder that was packed, with the times of its files
    sha256: str  # of the pixels

    @property
    def pixels(self) -> NDArray[np.uint8]:
        """(N, C, H, W)."""
        return self.files[0].array

    def is_intact(self) -> bool:
        """Read all pixels, and return whether they are those that were packed."""
        digest, rows = hashlib.sha256(), max(_AT_ONCE // self.pixels[0].nbytes, 1)
        for start in range(0, len(self.pixels), rows):
            digest.update(np.ascontiguousarray(self.pixels[start : start + rows]).data)
        return digest.hexdigest() == self.sha256


def is_pack(folder: Path) -> bool:
    """Return whether a folder says that it is a pack."""
    try:
        return bool(_read_index(folder)["format"] == FORMAT)
    except (BadPackError, KeyError):
        return False


def open_pack(folder: Path) -> Pack:
    """Open a pack. Raises BadPackError. Of the pixels a few images are read."""
    index = _read_index(folder)
    try:
        return _open(folder, index)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, MemoryError, UserError) as error:
        raise BadPackError(f"it is damaged ({error})") from error
    except OSError as error:
        raise BadPackError(f"{error.filename} can't be read ({error.strerror})") from error


def _open(folder: Path, index: dict[str, Any]) -> Pack:
    _require(index["format"] == FORMAT, "format")
    rule = Rule(*(index["rule"][name] for name in Rule._fields))
    _require(type(rule.size) is int and 0 < rule.size <= 4096, "rule")
    _require(type(rule.channels) is int and rule.channels in (1, 3), "rule")
    _require(rule.resize in get_args(Resize) and isinstance(rule.background, str) and bool(rule.text), "rule")
    count, bytes_of_names = index["count"], index["bytes_of_names"]
    shape = count, rule.channels, rule.size, rule.size
    _require(type(count) is int and count > 0 and math.prod(shape) <= _LARGEST, "count")
    _require(type(bytes_of_names) is int and count <= bytes_of_names <= count * NAME_BYTES, "bytes_of_names")
    parts = {_text(part): range(*bounds) for part, bounds in index["parts"].items()}
    for part, images in parts.items():
        _require(part in PARTS.values() and images.step == 1 and 0 <= images.start < images.stop <= count, "parts")
    _require(not parts or "train" in parts, "parts")
    ranges = sorted(parts.values(), key=lambda images: images.start)
    _require(all(first.stop <= second.start for first, second in pairwise(ranges)), "parts")  # no image is in two
    classes = None if index["classes"] is None else tuple(map(_text, index["classes"]))
    _require(classes is None or 0 < len(set(classes)) == len(classes) <= count, "classes")
    refused = tuple((_text(name), _text(why)) for name, why in index["refused"])

    file = _map(folder / PIXELS, np.uint8, shape)
    others = [
        _map(folder / SIZES, np.int64, (count,)), _map(folder / NAMES, np.uint8, (bytes_of_names,)),
        _map(folder / OFFSETS, np.int64, (count + 1,)),
        *([] if classes is None else [_map(folder / LABELS, np.int64, (count,))]),
    ]  # fmt: skip
    sizes, buffer, offsets, *of_labels = (other.array for other in others)
    names, labels = Names(buffer, offsets), of_labels[0] if of_labels else None
    _require(int(sizes.min()) >= 0, SIZES)
    _require(labels is None or 0 <= int(labels.min()) <= int(labels.max()) < len(classes or ()), LABELS)
    _check_names(names)
    _require(sample_digest(lambda chosen: file.array[chosen], count) == index["digest"], PIXELS)
    return Pack(
        folder, rule, (file, *others), names, sizes, Arrangement(parts, classes, labels), refused,
        _text(index["signature"]), _text(index["sha256"]),
    )  # fmt: skip


def _read_index(folder: Path) -> dict[str, Any]:
    try:
        return parse_object(read_bounded(folder / INDEX, INDEX_BYTES, follow=False))
    except OSError as error:
        raise BadPackError(f"{INDEX} can't be read ({error.strerror})") from error
    except ValueError as error:
        raise BadPackError(f"{INDEX} is damaged") from error


def _require(is_good: bool, what: str) -> None:
    if not is_good:
        raise ValueError(what)


def _text(value: object) -> str:
    _require(isinstance(value, str) and len(value) <= NAME_BYTES and not UNPRINTABLE.search(value), "a text")
    return str(value)


def _check_names(names: Names) -> None:
    offsets, buffer = names.offsets, names.buffer
    lengths = np.diff(offsets)
    ends = offsets[0] == 0 and offsets[-1] == len(buffer)
    _require(bool(ends) and 0 < int(lengths.min()) <= int(lengths.max()) <= NAME_BYTES, OFFSETS)
    _require(not UNPRINTABLE.search(buffer.tobytes().decode()), NAMES)
    _require(not bool((buffer[offsets[:-1]] & 0xC0 == 0x80).any()), OFFSETS)  # a name begins inside a character


def sampled(count: int) -> NDArray[np.int64]:
    """Return the indices `(n,)` of the images in the digest of `count` images, chosen by the fixed seed."""
    words = (hashlib.sha256(f"{FIXED_SEED} {number} {count}".encode()).digest() for number in range(SAMPLED))
    return np.array(sorted({int.from_bytes(word[:8], "little") % count for word in words}), np.int64)


def sample_digest(read: Callable[[NDArray[np.int64]], NDArray[np.uint8]], count: int) -> str:
    """Hash a few of `count` images, `read(indices)` `(n, C, H, W)`: other decoders make other pixels."""
    return hashlib.sha256(np.ascontiguousarray(read(sampled(count))).data).hexdigest()


def header(dtype: type[np.generic], shape: tuple[int, ...]) -> bytes:
    """Return the first HEADER_BYTES of a .npy file, version 1.0 of NumPy's format, for an array in C's order."""
    descr = np.lib.format.dtype_to_descr(np.dtype(dtype).newbyteorder("<"))
    text = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape!r}, }}".encode()
    length = HEADER_BYTES - 10
    return b"\x93NUMPY\x01\x00" + length.to_bytes(2, "little") + text.ljust(length - 1) + b"\n"


def _map(path: Path, dtype: type[np.generic], shape: tuple[int, ...]) -> MappedFile:
    """Map the array of a .npy file of exactly this form. Writes to it would stay in memory."""
    expected = header(dtype, shape)
    size = len(expected) + math.prod(shape) * np.dtype(dtype).itemsize
    with open_regular(path, size, follow=False) as file:
        _require(file.read(len(expected)) == expected and file.seek(0, 2) == size, path.name)
        return MappedFile(path, file, dtype, "c", len(expected), shape)
