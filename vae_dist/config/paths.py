"""Paths in a config and on the command line."""

import os
from pathlib import Path

from vae_dist.config.text import truncate
from vae_dist.errors import UserError

PATHS = (  # keys that hold a path
    "runs_dir", "output", "data.root", "data.path", "data.pack_dir", "checkpoint.resume", "evaluate.folder",
    "evaluate.perceptual", "evaluate.inception", "encode.folder", "model.init_from", "export.latents",
    "first_stage.perceptual",
)  # fmt: skip
_MAX_NAME = 255  # bytes between two slashes, on any file system


def expand(path: str, key: str = "") -> str:
    """`path` with a leading `~` or `~user` replaced by that home. Raises UserError if there is no such home."""
    user = path.partition("/")[0]
    if user[:1] != "~" or (user != "~" and os.path.lexists(path)):
        return path
    try:
        if user == "~" and os.environ.get("HOME") == "":
            raise RuntimeError("HOME is empty")
        return str(Path(path).expanduser())
    except RuntimeError as error:
        given = f"{key}={path}" if key else path
        raise UserError(
            f"{truncate(given)} can't be found: {str(error).rstrip('.')}; give the whole path, or ./{truncate(user)} "
            "for a folder of that name"
        ) from error


def is_path(text: str) -> bool:
    """True for the path of something that exists, or of something missing from a folder that exists.

    A text with a slash before any `=` is a path too: no key has one.
    """
    start = Path(text).parts[0] if text else ""
    try:
        return "/" in text.partition("=")[0] or Path(expand(text)).exists() or (start != text and Path(start).is_dir())
    except (OSError, ValueError, UserError):
        return False


def check_path(key: str, path: str) -> None:
    """Raise UserError for a path that no file system can hold."""
    if max(len(part.encode()) for part in path.split("/")) > _MAX_NAME:
        raise UserError(f"{key} is no path: a name in it has more than {_MAX_NAME} bytes")
    try:
        os.fsencode(path)
    except UnicodeEncodeError as error:
        raise UserError(
            f"{key}={path!a} can't be a path: paths are encoded in {error.encoding} here, which lacks some of its "
            "characters; set PYTHONUTF8=1, or choose another path"
        ) from error
