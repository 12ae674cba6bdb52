"""The manifest that seals a checkpoint's files, and the reading of what may come from a stranger.

Files are read under fixed names, links are not followed, and memory is asked for only once the file on the disk and the
manifest agree on how much.
"""

import hashlib
import json
import os
import platform
import stat
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from io import BufferedReader
from pathlib import Path
from typing import Any

import vae_dist
from vae_dist.errors import UserError

FORMAT = 2
MANIFEST = "manifest.json"
FILES = ("model.safetensors", "optimizer.safetensors", "state.json", "config.yaml")
SMALL_FILE_BYTES = 2**20  # manifest, state and config are far below this

_LIBRARIES = ("accelerate", "numpy", "safetensors", "torch")


class BadCheckpointError(UserError):
    """A checkpoint that is not what its manifest says."""


def seal(contents: Mapping[str, bytes], step: int) -> dict[str, Any]:
    """The manifest of these files."""
    return {
        "format": FORMAT,
        "step": step,
        "files": {
            name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            for name, content in contents.items()
        },
        "versions": {
            "vae_dist": vae_dist.__version__,
            "python": platform.python_version(),
            **_versions(),
        },
    }


@cache  # they are read from files
def _versions() -> dict[str, str]:
    return {library: version(library) for library in _LIBRARIES}


def read(folder: Path) -> dict[str, Any]:
    """A manifest in which whatever is looked at later is there and of its type."""
    path = folder / MANIFEST
    with open_small(path) as file:
        manifest = parse(file.read(), path)
    if manifest.get("format") != FORMAT:
        raise BadCheckpointError(f"{folder} has format {str(manifest.get('format'))[:20]}; this version reads {FORMAT}")
    files = manifest.get("files")
    well_formed = (
        type(manifest.get("step")) is int
        and isinstance(files, dict)
        and all(isinstance(files.get(name), dict) for name in FILES)
        and all(type(files[name].get("bytes")) is int and type(files[name].get("sha256")) is str for name in FILES)
    )
    if not well_formed:
        raise BadCheckpointError(f"{path} is not a checkpoint's manifest")
    return manifest


def verify(folder: Path) -> int:
    """The step of a folder whose files are what its manifest says. Raises BadCheckpointError for another one."""
    for name in FILES:
        with open_promised(folder, name) as file:
            _require_hash(hashlib.file_digest(file, "sha256").hexdigest(), folder, name)
    return int(read(folder)["step"])


def content(folder: Path, name: str) -> bytes:
    """A checkpoint's file, equal to what the manifest promises."""
    with open_promised(folder, name) as file:
        found = file.read()
    _require_hash(hashlib.sha256(found).hexdigest(), folder, name)
    return found


def fingerprint(folder: Path) -> str:
    """What two processes compare to know that they read the same checkpoint."""
    return hashlib.sha256(json.dumps(read(folder), sort_keys=True).encode()).hexdigest()[:16]


def parse(content: bytes, path: Path) -> dict[str, Any]:
    """A JSON object whose numbers are numbers; `path` is where it comes from."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no number")

    try:
        values = json.loads(content, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise BadCheckpointError(f"{path} is not valid JSON ({error})") from error
    if not isinstance(values, dict):
        raise BadCheckpointError(f"{path} does not hold a JSON object")
    return values


def to_json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def open_promised(folder: Path, name: str) -> BufferedReader:
    """A checkpoint's file, of the size that the manifest promises, opened for reading."""
    size = read(folder)["files"][name]["bytes"]
    if not name.endswith(".safetensors") and size > SMALL_FILE_BYTES:
        raise BadCheckpointError(f"{folder / name} has {size} bytes, which is too much for what it is")
    return _open_plain(folder / name, size)


def open_small(path: Path) -> BufferedReader:
    """A plain file of at most SMALL_FILE_BYTES, opened for reading."""
    return _open_plain(path, None)


def _open_plain(path: Path, size: int | None) -> BufferedReader:
    try:
        # Not through a link, and without waiting for the other end of a pipe.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise BadCheckpointError(f"{path} can't be read ({error.strerror})") from error
    found = os.fstat(descriptor)
    problem = None
    if not stat.S_ISREG(found.st_mode):
        problem = "is not a plain file"
    elif size is not None and found.st_size != size:
        problem = f"has {found.st_size} bytes, not {size}"
    elif size is None and found.st_size > SMALL_FILE_BYTES:
        problem = f"has {found.st_size} bytes, which is too much for what it is"
    if problem is not None:
        os.close(descriptor)
        raise BadCheckpointError(f"{path} {problem}")
    return open(descriptor, "rb")


def _require_hash(found: str, folder: Path, name: str) -> None:
    if found != read(folder)["files"][name]["sha256"]:
        raise BadCheckpointError(f"{folder / name} is damaged: its sha256 is not the manifest's")
