"""Files that must stay as they are while a command reads them: the images of folders, and memory-mapped arrays."""

import os
import weakref
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from vae_dist.errors import RunError


class Version(NamedTuple):
    """What tells a file from what it was before, without reading it."""

    size: int  # bytes
    mtime: int  # nanoseconds


def require_unchanged(name: str, file: Path | int, before: Version) -> None:
    """Raise RunError if a file, given by its path or by an open descriptor, is not what it was."""
    try:
        status = os.fstat(file) if isinstance(file, int) else os.lstat(file)
        is_same = (status.st_size, status.st_mtime_ns) == before
    except OSError:
        is_same = False
    if not is_same:
        raise RunError(f"{name} has changed since the start; put it back and run the same command again")


class MappedFile:
    """The array of a file as a memory map, and the file, to be asked whether it has changed.

    What is overwritten would be read as images, and what is cut off would kill the process (SIGBUS). The file is asked
    and not its path: one that another file replaces, or that is deleted, keeps its content for as long as it is mapped.
    """

    def __init__(
        self,
        path: Path,
        file: BinaryIO,
        dtype: npt.DTypeLike,
        mode: Literal["r", "c"],
        offset: int,
        shape: tuple[int, ...],
    ) -> None:
        """`file` is the open file of the path, and may be closed afterwards. Raises ValueError if it is too short."""
        self._name = str(path)
        self._descriptor = os.dup(file.fileno())
        weakref.finalize(self, os.close, self._descriptor).atexit = False  # a thread may still read then
        status = os.fstat(self._descriptor)
        self._version = Version(status.st_size, status.st_mtime_ns)
        self.array: npt.NDArray[Any] = np.asarray(np.memmap(file, dtype, mode, offset, shape))

    def require_unchanged(self) -> None:
        """Raise RunError if the file has changed since it was mapped."""
        require_unchanged(self._name, self._descriptor, self._version)
