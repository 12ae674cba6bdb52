"""Files: atomic writes, durable appends, and reads that an untrusted file can't make endless or huge."""

import errno
import json
import logging
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

from vae_dist.errors import UserError
from vae_dist.leftovers import remove_leftovers, temporary

logger = logging.getLogger(__name__)

# Errors of fsync, or of opening a folder for it, on file systems that can't flush such a thing: CIFS and FUSE folders.
_NOT_SUPPORTED = {
    errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTTY, errno.EBADF, errno.EISDIR, errno.EACCES,
    errno.EPERM,
}  # fmt: skip
# Errors of a rename that copying can replace: between the branches of a union, or onto a mounted file.
_NOT_RENAMED = {errno.EXDEV, errno.EBUSY, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW

_unsynced: set[int] = set()  # devices that a warning has named

ELSEWHERE = "output=FOLDER writes elsewhere"

_ADVICE = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room",
    errno.EFBIG: "make room (the limit on the size of files is reached, ulimit -f)",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENOENT: "put the folder back",
    errno.EIO: "check the disk",
    errno.ESTALE: "mount the file system again",
}


def reason(error: OSError) -> str:
    """The operating system's text for an error."""
    return error.strerror or str(error)


def advice(error: OSError, otherwise: str) -> str:
    """A remedy for an error; `otherwise`, such as another folder, if the error is one of the place."""
    return _ADVICE.get(error.errno or 0, otherwise)


@contextmanager
def writing(path: Path, otherwise: str, kind: type[Exception] = UserError, then: str = "") -> Iterator[None]:
    """Around a write below `path`: turn its OSError into a `kind` of one line, with `advice` and the text `then`."""
    try:
        yield
    except OSError as error:
        raise kind(f"can't write {path} ({reason(error)}); {advice(error, otherwise)}{then}") from error


def make_folder(path: Path, otherwise: str, *, is_new: bool = False) -> None:
    """Make a folder and write to it once. If that fails, remove what was made and raise UserError with `advice`.

    Raises FileExistsError if the folder has to be new and exists: of several processes, one makes it.
    """
    missing = [folder for folder in (path, *path.parents) if not os.path.lexists(folder)]
    try:
        path.mkdir(parents=True, exist_ok=not is_new)
        remove_leftovers(path)
        probe = temporary(path / "probe")  # permissions don't show a full or read-only disk
        descriptor = os.open(probe, _NEW, 0o600)
        try:
            os.write(descriptor, b"1")
        finally:
            os.close(descriptor)
            probe.unlink()
    except OSError as error:
        if is_new and isinstance(error, FileExistsError) and os.path.lexists(path):
            raise
        for folder in missing:
            try:
                folder.rmdir()
            except OSError:
                break
        raise UserError(f"can't write to {path} ({reason(error)}); {advice(error, otherwise)}") from error


def write_atomically(path: Path, content: bytes) -> None:
    """Write a temporary file next to `path`, flush it and rename it: readers see the old content or the new."""
    write_together({path: content})


def write_together(contents: Mapping[Path, bytes], *, durable: bool = True) -> None:
    """Write several files atomically. If the new ones do not all fit on the disk, all old ones stay.

    Without `durable` nothing is flushed to the disk, and a power cut may leave the files empty.
    """
    written: dict[Path, Path] = {}
    for folder in dict.fromkeys(path.parent for path in contents):
        remove_leftovers(folder)
    try:
        for path, content in contents.items():
            # An unpredictable name and O_EXCL: in a folder that others can write to, a link planted under a known name
            # would redirect the write to its target.
            partial = temporary(path)
            descriptor = os.open(partial, _NEW, 0o666)
            written[partial] = path
            _fill(descriptor, content, path, durable=durable)
        for partial, path in written.items():
            if not renamed(partial, path):
                # Overwrite the old content, don't truncate it first: content that is not longer needs no new space.
                descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o666)
                _fill(descriptor, contents[path], path, durable=durable)
    finally:
        for partial in written:
            partial.unlink(missing_ok=True)


def renamed(path: Path, target: Path) -> bool:
    """Rename a file or a folder; return whether the file system could. Raises OSError if copying could not either."""
    try:
        path.rename(target)
    except OSError as error:
        if error.errno not in _NOT_RENAMED:
            raise
        return False
    return True


def _fill(descriptor: int, content: bytes, path: Path, *, durable: bool) -> None:
    with open(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        if os.fstat(descriptor).st_size > len(content):  # of the overwritten content
            file.truncate()
        if durable:
            _sync(descriptor, path)


def append(path: Path, line: str) -> None:
    """Append a line, whole or not at all; it starts a new line even if a killed process left half of one."""
    with open(path, "ab+", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        starts_a_line = size == 0 or os.pread(file.fileno(), 1, size - 1) == b"\n"
        rest = f"{line}\n".encode() if starts_a_line else f"\n{line}\n".encode()
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except OSError:
            file.truncate(size)
            raise


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk; log a warning if the file system can't do that."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED:
            raise
        _warn_of_no_sync(path.stat().st_dev, path, reason(error))
        return
    try:
        _sync(descriptor, path)
    finally:
        os.close(descriptor)


def _sync(descriptor: int, path: Path) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED:
            raise
        _warn_of_no_sync(os.fstat(descriptor).st_dev, path, reason(error))


def _warn_of_no_sync(device: int, path: Path, problem: str) -> None:
    if device not in _unsynced:
        _unsynced.add(device)
        logger.warning(
            "%s can't be flushed to its disk (%s): saved files survive a kill, but may not survive a power cut",
            path, problem,
        )  # fmt: skip


def read_bounded(path: Path, limit: int, *, follow: bool = True) -> bytes:
    """Return a regular file's content, `limit` bytes at most. Raises OSError as `open_regular` does."""
    with open_regular(path, limit, follow=follow) as file:
        return file.read(os.fstat(file.fileno()).st_size)


def parse_object(content: bytes, constant: Callable[[str], object] | None = None) -> dict[str, Any]:
    """Parse a JSON object, by `constant` its NaNs and infinities. Raises ValueError for any other content."""
    try:
        values = json.loads(content, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is not valid JSON ({error})") from error
    if not isinstance(values, dict):
        raise ValueError("it does not hold a JSON object")
    return values


def open_regular(path: Path, limit: int | None = None, *, follow: bool = True) -> BufferedReader:
    """Open a regular file, of at most `limit` bytes unless that is None, for reading.

    Raises OSError for a longer file, and at once for a pipe or a device, which might never end or never begin; without
    `follow` for a symbolic link too.
    """
    # Without O_NONBLOCK, opening a pipe waits for its other end.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW))
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            kind = "Is a directory" if stat.S_ISDIR(status.st_mode) else "Is not a regular file"
            raise OSError(errno.EINVAL, kind, str(path))
        if limit is not None and status.st_size > limit:
            raise OSError(errno.EFBIG, f"Has more than {limit} bytes", str(path))
        return open(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def require_no_links(folder: Path) -> None:
    """Raise UserError naming the first entry in a run directory that is neither a file nor a folder.

    An untrusted directory could otherwise redirect a write through a link, or block a read at a pipe. Entries of
    `wandb/` are exempt: W&B makes links there, and this package never follows them.
    """
    waiting = [folder]
    while waiting:
        path = waiting.pop()
        try:
            mode = (path.stat() if path == folder else path.lstat()).st_mode
            if stat.S_ISDIR(mode) and path != folder / "wandb":
                waiting += sorted(path.iterdir(), reverse=True)
        except FileNotFoundError:  # a training that runs meanwhile prunes its checkpoints
            continue
        except OSError as error:
            raise UserError(f"can't read {path} ({error.strerror})") from error
        if stat.S_ISLNK(mode):
            raise UserError(
                f"{path} is a symbolic link, which a run directory must not contain; remove it, or copy its target"
            )
        if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
            raise UserError(f"{path} is neither a file nor a folder; remove it")
