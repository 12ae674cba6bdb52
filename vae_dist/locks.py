"""Keeping other processes out: by a lock of the operating system, which ends with its process.

Some file systems have no such locks (Lustre without `flock`, some NFS). There a mark takes its place: a file that says
who writes. It outlives a process that is killed. On the machine of that process this is noticed, and the mark removed;
on another machine nobody can tell, and the user decides.
"""

import fcntl
import hashlib
import json
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from vae_dist.files import read_bounded

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.05
SILENT_SECONDS = 1.0  # of waiting, before a message says so
REPEAT_SECONDS = 60.0  # between two such messages
HOLDER_BYTES = 4096
CLOCK_SECONDS = 10.0  # by which two looks at when a process was started may differ


class InUseError(Exception):
    """Another process holds it. The message says which one, or what it holds."""

    mark: str | None = None  # the name of a mark, which `marked` can take over


@contextmanager
def locked(path: Path, seconds: float, subject: str) -> Iterator[OSError | None]:
    """Hold the lock of the file `path`, which stays. Yields None, or why nothing is held: there are no locks there.

    Another process is waited for up to `seconds`, and a message says so: `subject` is what it does. Raises InUseError
    after that, and OSError where there can be no such file.
    """
    descriptor = _open(path)
    try:
        try:
            _wait(lambda: _try(descriptor, fcntl.LOCK_EX), seconds, subject, lambda: f"it holds {path}")
        except OSError as problem:
            yield problem
            return
        yield None
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)
    finally:
        os.close(descriptor)


@contextmanager
def marked(path: Path, seconds: float, subject: str, take_over: str | None) -> Iterator[None]:
    """Hold the mark `path`, a file that is there while the context lasts, as `locked` holds a lock.

    A mark is removed first if its process is known to have ended, or if its name is `take_over` (`InUseError.mark`).
    """
    mine = _me()

    def attempt() -> bool:
        found = _read(path)
        if found is not None and (_is_gone(found) or take_over == _name(found)):
            logger.warning("%s is left from %s; taking over", path, _described(found))
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
        _wait(attempt, seconds, subject, lambda: _described(_read(path)))
    except InUseError as error:
        error.mark = _name(_read(path))
        raise
    try:
        yield
    finally:
        if _read(path) == mine:
            with suppress(OSError):
                path.unlink()


def is_held(path: Path, operation: int, mark: Path | None = None) -> bool:
    """Whether another process's lock of the file `path` excludes `operation`; or its mark where there are no locks."""
    try:
        with open(path, "rb" if operation == fcntl.LOCK_SH else "r+b") as file:
            return not _try(file.fileno(), operation)
    except OSError:
        return mark is not None and not _is_gone(_read(mark))


def _open(path: Path) -> int:
    flags = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | flags, 0o666)
    except PermissionError:  # another user made it; that is no reason not to lock it
        return os.open(path, os.O_RDONLY | flags)


def _try(descriptor: int, operation: int) -> bool:
    """Whether a lock was taken, or another process has it. Raises OSError where the file system has no locks."""
    try:
        fcntl.flock(descriptor, operation | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def _wait(attempt: Callable[[], bool], seconds: float, subject: str, holder: Callable[[], str]) -> None:
    started = time.monotonic()
    message_due = started + SILENT_SECONDS
    while not attempt():
        now = time.monotonic()
        if now > started + seconds:
            raise InUseError(holder())
        if now > message_due:
            message_due = now + REPEAT_SECONDS
            logger.info("waiting, %.0f s at most: %s (%s)", seconds, subject, holder())
        time.sleep(POLL_SECONDS)


def _me() -> bytes:
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


def _read(path: Path) -> bytes | None:
    """Who holds it, None where it is not there, and nothing where nobody can say."""
    try:
        return read_bounded(path, HOLDER_BYTES)
    except FileNotFoundError:
        return None
    except OSError:
        return b""


def _parse(holder: bytes | None) -> dict[str, Any]:
    try:
        values = json.loads(holder or b"")
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _is_gone(holder: bytes | None) -> bool:
    """Whether nothing is held, or by a process of this machine that has ended."""
    if holder is None:
        return True
    values = _parse(holder)
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


def _described(holder: bytes | None) -> str:
    values = _parse(holder)
    texts = [str(values.get(key))[:100] for key in ("process", "host", "since")]
    if not all(key in values for key in ("process", "host", "since")) or not all(map(str.isprintable, texts)):
        return "a process that has not said who it is"
    return "process {} on {}, since {}".format(*texts)


def _name(holder: bytes | None) -> str:
    return hashlib.sha256(holder or b"").hexdigest()[:8]
