"""The image files below a folder, by name: found and sorted. Nothing is decoded."""

from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vae_dist.config.text import truncate
from vae_dist.data.folder_walk import escaped, walk
from vae_dist.data.image_files import DamagedError, header

READ = frozenset(["jpg", "jpeg", "jpe", "jfif", "png", "apng", "webp", "avif"])  # endings of the files that are used

# Endings of images that are not read, and what to do with them.
_CONVERT = {
    "heic heif hif": "export them as JPEG, or convert them with heif-convert",
    "raw dng cr2 cr3 nef arw orf rw2 raf": "develop them to JPEG",
    "tif tiff bmp gif jxl jp2 psd tga ppm pgm pbm ico svg eps exr hdr dds": "save them as PNG",
}
_ADVICE = {ending: advice for endings, advice in _CONVERT.items() for ending in endings.split()}

SHOWN = 10  # files that a message names

Refused = tuple[str, str]  # a file's name, escaped, and the reason


class Labels(NamedTuple):
    """The class of each file: its index in the sorted names of the classes."""

    classes: tuple[str, ...]
    values: NDArray[np.int64]  # (n,)


@dataclass(frozen=True, eq=False)
class FolderIndex:
    """N files in the order of their names as UTF-8: relative to the folder, with slashes."""

    folder: Path
    sizes: NDArray[np.int64]  # (N,), bytes
    mtimes: NDArray[np.int64]  # (N,), nanoseconds
    refused: tuple[Refused, ...]  # files that seem to be images and can't be used
    unread: Counter[str]  # other files by their ending in lower case, "" for an unusual one
    buffer: bytes  # the names, one after another
    offsets: NDArray[np.int64]  # (N + 1,), where the names begin in `buffer`

    def __len__(self) -> int:
        return len(self.sizes)

    def name(self, index: int) -> str:
        return self._bytes(index).decode()

    def names(self, indices: Iterable[int]) -> list[str]:
        return [self.name(int(index)) for index in indices]

    def path(self, index: int) -> Path:
        return self.folder / self.name(index)

    def below(self, prefix: str) -> range:
        """The indices of the files whose names begin with the prefix, such as "train/"."""
        start, all_indices = prefix.encode(), range(len(self))
        first = bisect_left(all_indices, start, key=self._bytes)
        end = bisect_left(all_indices, True, lo=first, key=lambda index: not self._bytes(index).startswith(start))
        return range(first, end)

    def first_level(self, prefix: str = "") -> Labels | None:
        """The classes of the files below the prefix, which are the folders there; None if a file is in none."""
        files_below = [self._bytes(index)[len(prefix.encode()) :].split(b"/", 1) for index in self.below(prefix)]
        if not files_below or not all(len(parts) == 2 for parts in files_below):
            return None
        classes = sorted({parts[0] for parts in files_below})
        numbers = {name: number for number, name in enumerate(classes)}
        values = np.array([numbers[parts[0]] for parts in files_below], np.int64)
        return Labels(tuple(name.decode() for name in classes), values)

    def without(self, damaged: Sequence[tuple[int, str]]) -> "FolderIndex":
        """The index without the files of these indices, which it then lists as refused for these reasons."""
        if not damaged:
            return self
        keep = np.ones(len(self), bool)
        keep[[index for index, _ in damaged]] = False
        names = [self._bytes(index) for index in range(len(self)) if keep[index]]
        offsets = np.cumsum([0, *map(len, names)], dtype=np.int64)
        refused = {*self.refused, *((escaped(self._bytes(index)), reason) for index, reason in damaged)}
        return replace(
            self, sizes=self.sizes[keep], mtimes=self.mtimes[keep], refused=tuple(sorted(refused)),
            buffer=b"".join(names), offsets=offsets,
        )  # fmt: skip

    def damaged(self, indices: Iterable[int]) -> list[tuple[int, str]]:
        """Read the headers of these files. Return the index of each that is no image, with the reason."""
        damaged = []
        for index in indices:
            try:
                header(self.path(index))
            except DamagedError as error:
                damaged.append((index, str(error)))
        return damaged

    def _bytes(self, index: int) -> bytes:
        return self.buffer[self.offsets[index] : self.offsets[index + 1]]


def refusal(index: FolderIndex) -> str:
    """A message that names the first files that can't be used, and says what to do."""
    named = ", ".join(f"{_tail(name)} ({reason})" for name, reason in index.refused[:SHOWN])
    more = f", and {len(index.refused) - SHOWN} more" if len(index.refused) > SHOWN else ""
    return (
        f"{len(index.refused)} of {len(index.refused) + len(index)} images in {truncate(str(index.folder))} can't be "
        f"used: {named}{more}; repair or remove them, or set data.skip_damaged=true to leave them out"
    )


def advice(index: FolderIndex) -> str:
    """What the folder has beside images that are read, and how to get more of it read; empty if there is nothing."""
    parts = []
    for text in _CONVERT.values():
        counts = [f"{index.unread[ending]} .{ending}" for ending in sorted(index.unread) if _ADVICE.get(ending) == text]
        if counts:
            parts.append(f"{', '.join(counts)} ({text})")
    if others := sum(count for ending, count in index.unread.items() if ending not in _ADVICE):
        parts.append(f"{others} that {'is' if others == 1 else 'are'} no image")
    return f"files that are not read: {'; '.join(parts)}" if parts else ""


def listed(folder: Path) -> FolderIndex:
    """Find the images below a folder by their names, in any depth. No file is opened.

    Hidden files and folders are left out, and links are not followed. Raises UserError if the folder can't be read.
    """
    buffer, offsets, sizes, mtimes = bytearray(), array("q", [0]), array("q"), array("q")  # q: int64
    refused: list[Refused] = []
    unread: Counter[str] = Counter()
    for found in walk(folder):
        if found.ending not in READ and not found.is_folder:
            unread[found.ending] += 1
        elif found.problem:
            refused.append((escaped(found.name), found.problem))
        else:
            buffer += found.name
            offsets.append(len(buffer))
            sizes.append(found.size)
            mtimes.append(found.mtime)
    return FolderIndex(
        folder, np.array(sizes), np.array(mtimes), tuple(sorted(refused)), unread, bytes(buffer), np.array(offsets)
    )


def _tail(name: str) -> str:
    return name if len(name) <= 100 else f"...{name[-97:]}"
