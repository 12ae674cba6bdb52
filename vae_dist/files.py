"""Files that are either whole or not there."""

import os
from pathlib import Path

from vae_dist.errors import UserError


def make_folder(path: Path, advice: str) -> None:
    """Make a folder that can be written to. Raises UserError, which ends with `advice`, where that can't be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise PermissionError(0, "Permission denied")
    except OSError as error:
        raise UserError(f"can't write to {path} ({error.strerror}); {advice}") from error


def write_atomically(path: Path, content: bytes) -> None:
    """Write beside the file's place, flush to the disk, then rename: a reader sees the old content or the new."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
