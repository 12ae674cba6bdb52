"""Files that are either whole or not there, and reading what others may have put in their place."""

import errno
import os
import secrets
import stat
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
    # A name that nobody can foresee, and a file that nobody made before: in a folder that others can write to, a link
    # that waits there would have us write to where it points.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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
