"""The files below a folder, in the order of their names. Links are not followed, so every tree ends."""

import errno
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from vae_dist import files
from vae_dist.data.image_files import LINK, NOT_READABLE, NOT_REGULAR
from vae_dist.errors import UNPRINTABLE, UserError, plain

# Files and folders that systems put beside pictures: some hold smaller copies of them.
_OF_SYSTEMS = frozenset([b"thumbs.db", b"desktop.ini", b"@eadir", b"__macosx", b"$recycle.bin", b"lost+found"])

# Errors of one file or folder, which may have been removed meanwhile. Others are the disk's or the process's.
_OF_ONE_FILE = {errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ENOENT, errno.ENOTDIR, errno.ELOOP}

_READABLE_BY_ALL = stat.S_IRUSR | stat.S_IRGRP | stat.S_IROTH


class Found(NamedTuple):
    """A file, a link, or a folder that can't be listed."""

    name: bytes  # relative to the folder, with slashes
    size: int  # bytes
    mtime: int  # nanoseconds
    problem: str  # why it can't be an image that is read; empty for a regular file of a usable name
    is_folder: bool  # or a link to one

    @property
    def ending(self) -> str:
        """The name's ending in lower case; empty without a usual one."""
        match = re.search(rb"\.([A-Za-z0-9]{1,8})$", self.name)
        return match[1].decode().lower() if match else ""


def escaped(name: bytes) -> str:
    """Return a name as a message shows it."""
    return plain(name.decode("utf-8", "backslashreplace"))


def walk(folder: Path) -> Iterator[Found]:
    """Yield what is below a folder, in any depth, in the order of the names' bytes. Hidden entries are left out.

    Raises UserError if the folder can't be read, or if the system fails.
    """
    root = os.fsencode(folder) + b"/"
    waiting = [b""]  # a folder's name ends in a slash, as it does in those of its files: this gives the order
    while waiting:
        name = waiting.pop()
        is_folder = not name or name.endswith(b"/")
        try:
            if is_folder:
                waiting += [name + entry for entry in sorted(_entries(root + name), reverse=True)]
            else:
                yield _found(name, root)
        except OSError as error:
            reason = files.reason(error)
            if not name or error.errno not in _OF_ONE_FILE:
                remedy = files.advice(error, "set data.path to a folder that this user may read")
                raise UserError(f"can't read {os.fsdecode(root + name)!a} ({reason}); {remedy}") from error
            yield Found(name, 0, 0, f"can't be read ({reason})", is_folder)


def _entries(folder: bytes) -> Iterator[bytes]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.name.startswith(b".") and entry.name.lower() not in _OF_SYSTEMS:
                yield entry.name + b"/" if entry.is_dir(follow_symlinks=False) else entry.name


def _found(name: bytes, root: bytes) -> Found:
    status = os.lstat(root + name)
    is_link = stat.S_ISLNK(status.st_mode)
    is_folder = is_link and Path(os.fsdecode(root + name)).is_dir()
    problem = LINK if is_link else "" if stat.S_ISREG(status.st_mode) else NOT_REGULAR
    if not problem and not _is_readable(root + name, status.st_mode):
        problem = NOT_READABLE  # known here: a change of the mode changes neither size nor time
    return Found(name, status.st_size, status.st_mtime_ns, problem or _unusable(name, status.st_size), is_folder)


def _is_readable(path: bytes, mode: int) -> bool:
    """Return whether this user may read a file. The system is asked only where the mode denies it to some user."""
    if mode & _READABLE_BY_ALL == _READABLE_BY_ALL:
        return True
    return os.access(path, os.R_OK, effective_ids=os.access in os.supports_effective_ids)


def _unusable(name: bytes, size: int) -> str:
    if size == 0:
        return "empty"
    try:
        unprintable = UNPRINTABLE.search(name.decode())
    except UnicodeDecodeError:
        return "its name is not UTF-8; rename it"
    return f"its name has the character {unprintable[0]!a}; rename it" if unprintable else ""
