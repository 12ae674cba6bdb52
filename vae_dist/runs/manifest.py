"""The manifest of a checkpoint: the size and sha256 of each file, and the versions that wrote them.

A checkpoint may be untrusted. Files are read under fixed names, links are not followed, and memory is allocated only
once the size on disk is the size in the manifest.
"""

import hashlib
import json
import math
import os
import platform
import re
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

import vae_dist
from vae_dist.errors import UserError
from vae_dist.files import open_regular, parse_object

FORMAT = 2
MANIFEST = "manifest.json"
FILES = ("model.safetensors", "state.json", "config.yaml")  # of every checkpoint; a training's has others too
MOST_FILES = 32
SMALL_FILE_BYTES = 2**22  # more than manifest and config have, and the state of thousands of processes

_TENSORS = re.compile(r"[a-z][a-z0-9_]{0,60}\.safetensors")  # names of other files
_LIBRARIES = ("accelerate", "numpy", "safetensors", "torch")


class BadCheckpointError(UserError):
    """A checkpoint does not match its manifest."""


class Sealed(NamedTuple):
    """One file of a checkpoint, as the manifest describes it."""

    bytes: int
    sha256: str


class Manifest(NamedTuple):
    """A parsed manifest."""

    step: int
    files: Mapping[str, Sealed]
    frozen: Mapping[str, str]  # sha256 of networks that the run uses and does not change
    weights: str  # `ema` if model.safetensors is a moving average, as in an export, otherwise `raw`
    versions: Mapping[str, str]
    fingerprint: str  # equal if two processes read the same checkpoint


def seal(contents: Mapping[str, bytes], step: int, frozen: Mapping[str, str], weights: str = "raw") -> dict[str, Any]:
    """Return the manifest of these files and frozen networks, as JSON values."""
    return {
        "format": FORMAT,
        "step": step,
        "files": {
            name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            for name, content in contents.items()
        },
        **({"frozen": dict(frozen)} if frozen else {}),
        **({} if weights == "raw" else {"weights": weights}),
        "versions": {
            "vae_dist": vae_dist.__version__,
            "python": platform.python_version(),
            **_versions(),
        },
    }


@cache  # they are read from files
def _versions() -> dict[str, str]:
    return {library: version(library) for library in _LIBRARIES}


def read(folder: Path) -> Manifest:
    """Parse a checkpoint's manifest. Raises BadCheckpointError if it is missing, damaged or of another format."""
    path = folder / MANIFEST
    with open_small(path) as file:
        values = parse(file.read(), path)
    if values.get("format") != FORMAT:
        raise BadCheckpointError(
            f"{folder} has format {str(values.get('format'))[:20]}, and this version reads {FORMAT}; use the version "
            "of vae_dist that wrote it"
        )
    step, files = values.get("step"), values.get("files")
    if type(step) is not int or not isinstance(files, dict):
        raise BadCheckpointError(f"{path} is not a checkpoint's manifest")
    sealed = {}
    for name in (*FILES, *sorted(files.keys() - set(FILES))):
        entry = files.get(name)
        size, sha256 = (entry.get("bytes"), entry.get("sha256")) if isinstance(entry, dict) else (None, None)
        is_known = name in FILES or _TENSORS.fullmatch(name)
        if type(size) is not int or type(sha256) is not str or not is_known or len(files) > MOST_FILES:
            raise BadCheckpointError(f"{path} is not a checkpoint's manifest")
        sealed[name] = Sealed(size, sha256)
    versions, frozen = (_texts(values.get(key)) for key in ("versions", "frozen"))
    fingerprint = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
    weights = "ema" if values.get("weights") == "ema" else "raw"
    return Manifest(step, sealed, frozen, weights, versions, fingerprint)


def _texts(values: Any) -> dict[str, str]:
    return {key: text for key, text in values.items() if isinstance(text, str)} if isinstance(values, dict) else {}


def read_sealed(path: Path, sealed: Sealed) -> bytes:
    """Return a file's content. Raises BadCheckpointError if its size or its sha256 is not the manifest's."""
    if path.suffix != ".safetensors" and sealed.bytes > SMALL_FILE_BYTES:
        raise BadCheckpointError(f"{path} has {sealed.bytes} bytes, which is too many for such a file")
    with _open_sealed(path, sealed) as file:
        content = file.read()
    if hashlib.sha256(content).hexdigest() != sealed.sha256:
        raise BadCheckpointError(f"{path} is damaged: its sha256 is not the manifest's")
    return content


def parse(content: bytes, path: Path) -> dict[str, Any]:
    """Parse a JSON object without NaN or infinity; `path` names its file in the error."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not a number")

    try:
        return parse_object(content, refuse)
    except ValueError as error:
        raise BadCheckpointError(f"{path} can't be used: {error}") from error


def to_json(value: Any) -> bytes:
    return (json.dumps(without_nan(value), indent=2, allow_nan=False) + "\n").encode()


def without_nan(value: Any) -> Any:
    """Return JSON values with null instead of NaN and infinities, which JSON lacks."""
    if isinstance(value, Mapping):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def open_small(path: Path) -> BufferedReader:
    """Open a regular file of at most SMALL_FILE_BYTES for reading."""
    return _open(path, SMALL_FILE_BYTES)


def require_size(path: Path, sealed: Sealed) -> None:
    """Raise BadCheckpointError if a file is not a regular one of the manifest's size. Nothing is read."""
    _open_sealed(path, sealed).close()


def _open_sealed(path: Path, sealed: Sealed) -> BufferedReader:
    file = _open(path, None)
    if (size := os.fstat(file.fileno()).st_size) != sealed.bytes:
        file.close()
        raise BadCheckpointError(f"{path} has {size} bytes, not {sealed.bytes}")
    return file


def _open(path: Path, limit: int | None) -> BufferedReader:
    try:
        return open_regular(path, limit, follow=False)
    except OSError as error:
        raise BadCheckpointError(f"{path} can't be read ({error.strerror})") from error
