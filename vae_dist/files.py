"""Files that are either whole or not there, reading what others may have put in their place, and keeping others out.

Others are kept out by a lock of the operating system, which ends with its process. Some file systems have no such locks
(Lustre without `flock`, some NFS). There a mark takes its place, a file that says who writes. A process that is killed
leaves it behind: on the machine of that process this is noticed and the mark removed; on another one the user decides.
"""

import errno
import fcntl
import hashlib
import json
import logging
import os
import secrets
import socket
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from vae_dist.errors import UserError

logger = logging.getLogger(__name__)

# What fsync answers, or the opening before it, where a file system can't flush such a thing: CIFS and FUSE a folder.
_NOT_SUPPORTED = {
    errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTTY, errno.EBADF, errno.EISDIR, errno.EACCES,
    errno.EPERM,
}  # fmt: skip
# What a rename answers that is possible by copying: between the branches of a union, onto a file that is a mount.
NOT_RENAMED = {errno.EXDEV, errno.EBUSY, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}

_unsynced: set[int] = set()  # devices that were warned of

ELSEWHERE = "output=FOLDER writes elsewhere"

LOCK_POLL_SECONDS = 0.05
SILENT_SECONDS = 1.0  # of waiting for a lock, before a message says so
REPEAT_SECONDS = 60.0  # between two such messages
MARK_BYTES = 4096
CLOCK_SECONDS = 10.0  # by which two looks at when a process was started may differ

_ADVICE = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room",
    errno.EFBIG: "make room (the limit on the size of files is reached, ulimit -f)",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENOENT: "put the folder back",
    errno.EIO: "see to the disk",
    errno.ESTALE: "mount the file system again",
}


def reason(error: OSError) -> str:
    """What the operating system says of an error."""
    return error.strerror or str(error)


def advice(error: OSError, otherwise: str) -> str:
    """What helps against an error; `otherwise`, such as the choice of another folder, where it is one of the place."""
    return _ADVICE.get(error.errno or 0, otherwise)


@contextmanager
def writing(path: Path, otherwise: str, kind: type[Exception] = UserError, then: str = "") -> Iterator[None]:
    """Around a write below `path`: its OSError becomes a `kind` of one line, with `advice` and what comes `then`."""
    try:
        yield
    except OSError as error:
        raise kind(f"can't write {path} ({reason(error)}); {advice(error, otherwise)}{then}") from error


def make_folder(path: Path, otherwise: str) -> None:
    """Make a folder that can be written to. Raises UserError with `advice` where that can't be, and makes nothing."""
    missing = [folder for folder in (path, *path.parents) if not os.path.lexists(folder)]
    try:
        path.mkdir(parents=True, exist_ok=True)
        descriptor, probe = tempfile.mkstemp(prefix=".", dir=path)  # permissions don't tell of a full or read-only disk
        try:
            os.write(descriptor, b"1")
        finally:
            os.close(descriptor)
            Path(probe).unlink()
    except OSError as error:
        for folder in missing:
            try:
                folder.rmdir()
            except OSError:
                break
        raise UserError(f"can't write to {path} ({reason(error)}); {advice(error, otherwise)}") from error


def write_atomically(path: Path, content: bytes) -> None:
    """Write beside the file's place, flush to the disk, then rename: a reader sees the old content or the new."""
    write_together({path: content})


def write_together(contents: Mapping[Path, bytes], *, durable: bool = True) -> None:
    """`write_atomically` for several files. All old ones stay where there is no room for all new ones.

    What is not `durable` is not flushed to the disk; a power cut may leave it empty.
    """
    written: dict[Path, Path] = {}
    try:
        for path, content in contents.items():
            # A name that nobody can foresee, and a file that nobody made before: in a folder that others can write to,
            # a link that waits there would have us write to where it points.
            temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            descriptor = os.open(temporary, flags, 0o666)
            written[temporary] = path
            _fill(descriptor, content, path, durable=durable)
        for temporary, path in written.items():
            try:
                os.replace(temporary, path)
            except OSError as error:
                if error.errno not in NOT_RENAMED:
                    raise
                # The old content is written over, not cut off first: no new room is needed where the new is no longer.
                descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
                _fill(descriptor, contents[path], path, durable=durable)
    finally:
        for temporary in written:
            temporary.unlink(missing_ok=True)


def _fill(descriptor: int, content: bytes, path: Path, *, durable: bool) -> None:
    with open(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        if os.fstat(descriptor).st_size > len(content):  # of what is written over
            file.truncate()
        if durable:
            _sync(descriptor, path)


def append(path: Path, line: str) -> None:
    """Add a line to a file. It is whole or not there, and stands alone also where a killed process left half a line."""
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
    """Let a file, or the names in a folder, survive a power cut; a warning where the file system can't do that."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
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
            "%s can't be flushed to its disk (%s): what is saved survives a kill, and perhaps no power cut",
            path, problem,
        )  # fmt: skip


def read_bounded(path: Path, limit: int) -> bytes:
    """A regular file's content, of `limit` bytes at most.

    Raises OSError for a longer one, and at once for what might never end or never begin: a pipe, a device.
    """
    # Without O_NONBLOCK the opening of a pipe waits for its other end.
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            kind = "Is a directory" if stat.S_ISDIR(status.st_mode) else "Is not a regular file"
            raise OSError(errno.EINVAL, kind, str(path))
        if status.st_size > limit:
            raise OSError(errno.EFBIG, f"Has more than {limit} bytes", str(path))
        return file.read(status.st_size)


def require_no_links(folder: Path) -> None:
    """Raise UserError naming the first entry in a run directory that is neither a file nor a folder.

    A directory that came from somewhere else could otherwise have us write outside of it through a link, or wait for
    ever at a pipe. Entries of `wandb/` are left alone: W&B puts links there, and nothing of ours goes through them.
    """
    waiting = [folder]
    while waiting:
        path = waiting.pop()
        try:
            mode = (path.stat() if path == folder else path.lstat()).st_mode
            if stat.S_ISDIR(mode) and path != folder / "wandb":
                waiting += sorted(path.iterdir(), reverse=True)
        except FileNotFoundError:  # a training that goes on beside us prunes its checkpoints
            continue
        except OSError as error:
            raise UserError(f"can't look into {path} ({error.strerror})") from error
        if stat.S_ISLNK(mode):
            raise UserError(f"{path} is a symbolic link, which no run directory has; remove it, or copy what it means")
        if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
            raise UserError(f"{path} is neither a file nor a folder; remove it")


class InUseError(Exception):
    """Another process holds it. The message says which one, or what it holds."""

    mark: str | None = None  # the name of a mark, which `marked` can take over


@contextmanager
def locked(path: Path, seconds: float, subject: str) -> Iterator[OSError | None]:
    """Hold the lock of the file `path`, which stays. Yields None, or why nothing is held: there are no locks there.

    Another process is waited for up to `seconds`, and a message says so: `subject` is what it does. Raises InUseError
    after that, and OSError where there can be no such file.
    """
    descriptor = _open_lock(path)
    try:
        try:
            _wait_for(lambda: _try_lock(descriptor, fcntl.LOCK_EX), seconds, subject, lambda: f"it holds {path}")
        except OSError as problem:
            yield problem
            return
        try:
            yield None
        finally:
            with suppress(OSError):  # a process that this one has forked would go on holding it
                fcntl.flock(descriptor, fcntl.LOCK_UN)
    finally:
        os.close(descriptor)


@contextmanager
def marked(path: Path, seconds: float, subject: str, take_over: str | None) -> Iterator[None]:
    """Hold the mark `path`, a file that is there while the context lasts, as `locked` holds a lock.

    A mark is removed first if its process is known to have ended, or if its name is `take_over` (`InUseError.mark`).
    """
    mine = _this_process()

    def attempt() -> bool:
        found = _read_mark(path)
        if found is not None and (_is_gone(found) or take_over == _mark_name(found)):
            logger.warning("%s is left from %s; taking over", path, _describe(found))
            path.unlink(missing_ok=True)
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except FileExistsError:
            return False
        try:
            with open(descriptor, "wb") as file:
                file.write(mine)
        except OSError:
            path.unlink(missing_ok=True)
            raise
        return True

    try:
        _wait_for(attempt, seconds, subject, lambda: _describe(_read_mark(path)))
    except InUseError as error:
        error.mark = _mark_name(_read_mark(path))
        raise
    try:
        yield
    finally:
        if _read_mark(path) == mine:
            with suppress(OSError):
                path.unlink()


def is_held(path: Path, operation: int, mark: Path | None = None) -> bool:
    """Whether another process's lock of the file `path` excludes `operation`; or its mark where there are no locks."""
    try:
        with open(path, "rb" if operation == fcntl.LOCK_SH else "r+b") as file:
            return not _try_lock(file.fileno(), operation)
    except OSError:
        return mark is not None and not _is_gone(_read_mark(mark))


def _open_lock(path: Path) -> int:
    flags = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | flags, 0o666)
    except PermissionError:  # another user made it; that is no reason not to lock it
        return os.open(path, os.O_RDONLY | flags)


def _try_lock(descriptor: int, operation: int) -> bool:
    """Whether a lock was taken, or another process has it. Raises OSError where the file system has no locks."""
    try:
        fcntl.flock(descriptor, operation | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def _wait_for(attempt: Callable[[], bool], seconds: float, subject: str, holder: Callable[[], str]) -> None:
    started = time.monotonic()
    message_due = started + SILENT_SECONDS
    while not attempt():
        now = time.monotonic()
        if now > started + seconds:
            raise InUseError(holder())
        if now > message_due:
            message_due = now + REPEAT_SECONDS
            logger.info("waiting, %.0f s at most: %s (%s)", seconds, subject, holder())
        time.sleep(LOCK_POLL_SECONDS)


def _this_process() -> bytes:
    """This process, as it is written into what it holds."""
    return json.dumps(
        {
            "host": socket.gethostname(),
            "process": os.getpid(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            "started": psutil.Process().create_time(),
            "machine": _machine(),
        }
    ).encode()


def _machine() -> str:
    """What processes that can see one another have in common: the host, its boot, and the container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return socket.gethostname()


def _read_mark(path: Path) -> bytes | None:
    """Who holds it, None where it is not there, and nothing where nobody can say."""
    try:
        return read_bounded(path, MARK_BYTES)
    except FileNotFoundError:
        return None
    except OSError:
        return b""


def _parse_mark(holder: bytes | None) -> dict[str, Any]:
    try:
        values = json.loads(holder or b"")
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _is_gone(holder: bytes | None) -> bool:
    """Whether nothing is held, or by a process of this machine that has ended."""
    if holder is None:
        return True
    values = _parse_mark(holder)
    process, started = values.get("process"), values.get("started")
    if values.get("machine") != _machine() or type(process) is not int or type(started) is not float:
        return False
    try:
        found = psutil.Process(process)
        return abs(found.create_time() - started) > CLOCK_SECONDS or found.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
    except (psutil.Error, ValueError, OverflowError):
        return False


def _describe(holder: bytes | None) -> str:
    values = _parse_mark(holder)
    texts = [str(values.get(key))[:100] for key in ("process", "host", "since")]
    if not all(key in values for key in ("process", "host", "since")) or not all(map(str.isprintable, texts)):
        return "a process that has not said who it is"
    return "process {} on {}, since {}".format(*texts)


def _mark_name(holder: bytes | None) -> str:
    return hashlib.sha256(holder or b"").hexdigest()[:8]
