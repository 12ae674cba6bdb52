"""Locks that keep other processes out of a file or folder.

The lock is the operating system's and ends with its process. Some file systems have none (Lustre without `flock`, some
NFS). There a mark takes its place: a file that names its writer. A killed process leaves its mark behind: on the same
machine this is noticed and the mark is removed; on another machine the user decides.
"""

import fcntl
import hashlib
import json
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from vae_dist.errors import UserError
from vae_dist.files import ELSEWHERE, parse_object, read_bounded, writing
from vae_dist.leftovers import machine

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.05
SILENT_SECONDS = 1.0  # of waiting for a lock, before a message is logged
REPEAT_SECONDS = 60.0  # between two such messages
SETTLE_SECONDS = 0.1  # in which another process that takes over the same mark has removed ours
MARK_BYTES = 4096
_FLAGS = os.O_NOFOLLOW | os.O_NONBLOCK  # of a lock's file, which may be untrusted: a link or a pipe
CLOCK_SECONDS = 10.0  # by which two readings of a process's start time may differ


class InUseError(Exception):
    """Another process holds the lock or mark. The message says which process, or which lock."""

    mark: str | None = None  # the mark's name, by which `marked` can take it over


@contextmanager
def locked(path: Path, seconds: float, subject: str) -> Iterator[OSError | None]:
    """Hold the lock of the file `path`, which stays. Yields None; if the file system has no locks, its error.

    Waits up to `seconds` for another process, and logs that it waits: `subject` says what the other one does. Raises
    InUseError after that, and OSError if the file can't be made.
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
            with suppress(OSError):  # otherwise a forked child would still hold it
                fcntl.flock(descriptor, fcntl.LOCK_UN)
    finally:
        os.close(descriptor)


@contextmanager
def writing_alone(folder: Path, seconds: float, subject: str, otherwise: str = ELSEWHERE) -> Iterator[bool]:
    """Hold a folder for one command that writes to it, by a lock next to the folder.

    Yields whether all that is half written there was left by killed commands; on a file system without locks it may be
    a live one's. Raises UserError if the lock can't be made, or if another command holds it for more than `seconds`:
    `subject` says what the other one does, `otherwise` what the user can do.
    """
    lock = folder.with_name(f".{folder.name}.lock")
    with ExitStack() as stack:
        try:
            with writing(lock, otherwise):
                problem = stack.enter_context(locked(lock, seconds, subject))
        except InUseError as error:
            raise UserError(f"{subject} ({error}); wait for its end, or {otherwise}") from None
        yield problem is None


@contextmanager
def marked(path: Path, seconds: float, subject: str, take_over: str | None) -> Iterator[None]:
    """Hold the mark `path`, a file that exists inside the context, as `locked` holds a lock.

    Another mark is removed first if its process is known to have ended, or if its name is `take_over`
    (`InUseError.mark`).
    """
    mine = _this_process()

    def attempt() -> bool:
        other = _read_mark(path)
        takes_over = other is not None and (_is_gone(other) or take_over == _mark_name(other))
        if takes_over:
            path.unlink(missing_ok=True)  # at once: by now another process may take over, too
            logger.warning("%s was left by %s; taking over", path, _describe(other))
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            return False
        try:
            with open(descriptor, "wb") as file:
                file.write(mine)
        except OSError:
            path.unlink(missing_ok=True)
            raise
        if takes_over:  # a process that has read the other mark before may be removing this one
            time.sleep(SETTLE_SECONDS)
        return not takes_over or _read_mark(path) == mine

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
    """Return whether another process holds a lock of `path` that excludes `operation`, or without locks, a mark."""
    access = os.O_RDONLY if operation == fcntl.LOCK_SH else os.O_RDWR
    try:
        descriptor = os.open(path, access | _FLAGS)
        try:
            return not _try_lock(descriptor, operation)
        finally:
            os.close(descriptor)
    except OSError:
        return mark is not None and not _is_gone(_read_mark(mark))


def _open_lock(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | _FLAGS, 0o666)
    except PermissionError:  # another user's file can be locked all the same
        return os.open(path, os.O_RDONLY | _FLAGS)


def _try_lock(descriptor: int, operation: int) -> bool:
    """Return whether the lock was free and is taken. Raises OSError if the file system has no locks."""
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
            logger.info("waiting up to %.0f s: %s (%s)", seconds, subject, holder())
        time.sleep(POLL_SECONDS)


def _this_process() -> bytes:
    """The content of this process's mark."""
    return json.dumps(
        {
            "host": socket.gethostname(),
            "process": os.getpid(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            "after_boot": start_after_boot(os.getpid()),
            "machine": machine(),
        }
    ).encode()


def start_after_boot(process: int) -> float:
    """Seconds from the machine's start to the process's. A step of the clock moves both alike.

    Raises psutil.Error if there is no such process.
    """
    boot = psutil.boot_time()  # before the other: psutil before 7.1 remembers it, and computes the other from it
    return psutil.Process(process).create_time() - boot


def _read_mark(path: Path) -> bytes | None:
    """The mark's content; None if there is no mark, b"" if it can't be read."""
    try:
        return read_bounded(path, MARK_BYTES)
    except FileNotFoundError:
        return None
    except OSError:
        return b""


def _parse_mark(holder: bytes | None) -> dict[str, Any]:
    try:
        return parse_object(holder or b"")
    except ValueError:
        return {}


def _is_gone(holder: bytes | None) -> bool:
    """Return whether there is no mark, or its process was one of this machine and has ended."""
    if holder is None:
        return True
    values = _parse_mark(holder)
    process, started = values.get("process"), values.get("after_boot")
    if values.get("machine") != machine() or type(process) is not int or type(started) is not float:
        return False
    try:
        is_another = abs(start_after_boot(process) - started) > CLOCK_SECONDS
        return is_another or psutil.Process(process).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
    except (psutil.Error, ValueError, OverflowError):
        return False


def _describe(holder: bytes | None) -> str:
    values = _parse_mark(holder)
    texts = [str(values.get(key))[:100] for key in ("process", "host", "since")]
    if not all(key in values for key in ("process", "host", "since")) or not all(map(str.isprintable, texts)):
        return "an unknown process"
    return "process {} on {}, since {}".format(*texts)


def _mark_name(holder: bytes | None) -> str:
    return hashlib.sha256(holder or b"").hexdigest()[:8]
