"""The pixels of a pack that is being written, and the journal of what is done, by which a killed packing continues."""

import hashlib
import json
import time
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vae_dist.data.pack_file import HEADER_BYTES, PIXELS
from vae_dist.files import read_bounded

JOURNAL = "journal.jsonl"
COMMIT_SECONDS = 1.0  # between two lines of the journal: at most so much work is done again

_JOURNAL_BYTES = 2**28
_AT_ONCE = 2**24  # bytes that are hashed


class Journal:
    """The file of pixels in a folder, which grows by whole images, and the journal's lines, which record them.

    Each line says how many files are done, how many images they gave, the checksum of the images that are new since the
    line before, and the damaged files. The first line says what is packed: another one starts from the beginning.
    """

    def __init__(self, folder: Path, about: dict[str, Any], count: int, image_bytes: int) -> None:
        self.done = 0  # files, damaged ones included
        self.damaged: list[tuple[int, str]] = []
        self.digest = hashlib.sha256()  # of the pixels
        self._rows = 0  # images that the journal records
        self._new_rows, self._new_damaged, self._checksum = 0, 0, 0
        self._count = count  # files in all
        self._image_bytes = image_bytes
        first = json.dumps(about) + "\n"
        lines = _lines(folder / JOURNAL)
        continues = next(lines, "") == first and (folder / PIXELS).exists()
        self._pixels = open(folder / PIXELS, "r+b" if continues else "w+b")  # noqa: SIM115
        length = len(first.encode())
        if continues:
            self._pixels.seek(HEADER_BYTES)
            for line in lines:
                if not self._accept(line):
                    break
                length += len(line.encode())
        self._journal = open(folder / JOURNAL, "r+b" if continues else "wb", buffering=0)  # noqa: SIM115
        if not continues:
            self._journal.write(first.encode())
        self._journal.truncate(length)
        self._journal.seek(length)
        end = HEADER_BYTES + self._rows * image_bytes
        self._pixels.truncate(end)  # longer, with zeros for the header, in a new file
        self._pixels.seek(end)
        self._committed_at = time.monotonic()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *error: object) -> None:
        with suppress(OSError):  # of a full disk, which has ended the packing already
            self._pixels.close()
        self._journal.close()

    def append(self, done: int, pixels: NDArray[np.uint8], damaged: list[tuple[int, str]]) -> None:
        """Append the images `(n, C, H, W)` of the next files, up to file `done`."""
        content = pixels.data
        self._pixels.write(content)
        self.digest.update(content)
        self._checksum = zlib.crc32(content, self._checksum)
        self.done = done
        self._new_rows += len(pixels)
        self.damaged += damaged
        if time.monotonic() > self._committed_at + COMMIT_SECONDS:
            self.commit()

    def commit(self) -> None:
        """Record in the journal what was appended."""
        self._pixels.flush()
        line = [self.done, self._new_rows, self._checksum, self.damaged[self._new_damaged :]]
        self._journal.write((json.dumps(line) + "\n").encode())
        self._rows += self._new_rows
        self._new_rows, self._new_damaged, self._checksum = 0, len(self.damaged), 0
        self._committed_at = time.monotonic()

    def _accept(self, line: str) -> bool:
        """Take over what a line of a killed packing records, if the pixels are there."""
        try:
            done, rows, checksum, damaged = json.loads(line)
        except (ValueError, TypeError, RecursionError):  # the last line may be cut off
            return False
        if type(rows) is not int or rows < 0 or type(done) is not int or type(damaged) is not list:
            return False
        if not (self.done <= done <= self._count and _are_damaged(damaged, range(self.done, done))):
            return False
        digest, found, left = self.digest.copy(), 0, rows * self._image_bytes
        while left:
            content = self._pixels.read(min(left, _AT_ONCE))
            if not content:
                return False
            digest.update(content)
            found = zlib.crc32(content, found)
            left -= len(content)
        if found != checksum or done - self.done != rows + len(damaged):
            return False
        self.digest, self.done = digest, done
        self._rows += rows
        self.damaged += [(file, reason) for file, reason in damaged]
        self._new_damaged = len(self.damaged)
        return True


def _are_damaged(entries: list[Any], files: range) -> bool:
    """Return whether these are pairs of one of the files and a reason, in the order of the files."""
    pairs = [entry for entry in entries if isinstance(entry, list) and list(map(type, entry)) == [int, str]]
    numbers = [file for file, _ in pairs]
    return len(pairs) == len(entries) and numbers == sorted(set(numbers) & set(files))


def _lines(path: Path) -> Iterator[str]:
    with suppress(OSError):
        yield from read_bounded(path, _JOURNAL_BYTES).decode(errors="replace").splitlines(keepends=True)
