"""Names of temporary files, which tell what killed processes have left from what live ones are writing."""

import hashlib
import os
import re
import secrets
import socket
from contextlib import suppress
from functools import cache
from pathlib import Path

import psutil

_TEMPORARY = re.compile(r"\..+\.(?P<machine>[0-9a-f]{8})(?P<process>[0-7][0-9a-f]{7})[0-9a-f]{8}")


def machine() -> str:
    """Return the identity that processes share if they can see one another: host, boot and container."""
    return f"{socket.gethostname()} {_boot() or ''}".rstrip()


def temporary(path: Path) -> Path:
    """Return a new, unpredictable name for a temporary file next to `path`. It names this process and its machine."""
    return path.with_name(f".{path.name}.{_mark()}{os.getpid():08x}{secrets.token_hex(4)}")


def remove_leftovers(folder: Path, *, is_alone: bool = False) -> None:
    """Remove temporary files of this machine's processes that have ended; all if no other process writes there.

    Otherwise those of another machine stay, as their processes may live. So do those that can't be removed.
    """
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if (match := _TEMPORARY.fullmatch(entry.name)) and (is_alone or _has_ended(match)):
                with suppress(OSError):
                    Path(entry.path).unlink()


def _has_ended(match: re.Match[str]) -> bool:
    if _boot() is None:  # another machine may have the same name
        return False
    return match["machine"] == _mark() and not psutil.pid_exists(int(match["process"], 16))


@cache
def _boot() -> str | None:
    """Identify the boot and the container, by which no other machine is taken for this one; None without Linux."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return None


@cache
def _mark() -> str:
    return hashlib.sha256(machine().encode()).hexdigest()[:8]
