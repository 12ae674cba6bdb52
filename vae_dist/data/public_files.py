"""Files of published data sets, each of one known content: found on the disk, or downloaded."""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from vae_dist.data.download import DownloadError, Published, fetch_file
from vae_dist.errors import UserError
from vae_dist.files import advice, read_bounded, reason
from vae_dist.locks import InUseError, locked

logger = logging.getLogger(__name__)

LOCK_SECONDS = 3600  # for another process that downloads the same files to finish


class UnreachableError(UserError):
    """The set is not on this machine, and it can't be downloaded or must not be."""


def missing(files: Sequence[Published], folder: Path) -> list[Published]:
    """Return the files that are not in the folder. Raises UnreachableError if it can't be read."""
    try:
        return [file for file in files if not (folder / file.name).exists()]
    except OSError as error:
        raise UnreachableError(f"can't read {folder} ({reason(error)}); choose another data.root") from error


def obtain(files: Sequence[Published], folder: Path, *, download: bool, mirror: str | None) -> None:
    """Download the files that are missing in the folder. Raises UnreachableError if they can't be had."""
    if not (absent := missing(files, folder)):
        return
    if not download:
        names = ", ".join(file.name for file in absent)
        raise UnreachableError(f"{names} missing in {folder}, and data.download=false")
    with downloading(folder):
        for file in missing(absent, folder):
            fetch_into(folder, file, mirror)


def fetch_into(folder: Path, file: Published, mirror: str | None) -> None:
    """Download a file into the folder, or the rest of it. Raises UnreachableError."""
    url = file.url(mirror)
    logger.info("downloading %s, %.1f MB", url, file.bytes / 1e6)
    try:
        fetch_file(url, folder / file.name, file.bytes, file.sha256)
    except DownloadError as error:
        raise UnreachableError(
            f"can't download {file.name} ({error}); try again, give data.mirror of a folder that has it, or put it "
            f"into {folder} by hand"
        ) from error


@contextmanager
def downloading(folder: Path) -> Iterator[None]:
    """Make the folder, and keep other processes from downloading into it. Raises UnreachableError for what fails.

    Other processes and runs wait, then find the files. On a file system without locks each downloads for itself.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / ".lock", LOCK_SECONDS, f"another process downloads into {folder}"):
            yield
    except InUseError as error:
        raise UnreachableError(f"another process has held {folder / '.lock'} for {LOCK_SECONDS} s; stop it") from error
    except OSError as error:
        remedy = advice(error, "choose another data.root")
        raise UnreachableError(f"can't download into {folder} ({reason(error)}); {remedy}") from error


def read_published(path: Path, file: Published) -> bytes:
    """Return a file's content. Raises UserError if it is not the published one."""
    try:
        content = read_bounded(path, file.bytes)
    except OSError as error:
        raise UserError(f"{path} can't be read ({reason(error)}); delete it or choose another data.root") from error
    if hashlib.sha256(content).hexdigest() != file.sha256:
        raise UserError(
            f"{path} is damaged: its sha256 is not the published one; delete it, and the next run downloads it again"
        )
    return content


def identity_of(files: Sequence[Published]) -> str:
    """Return the identity of the images in these files, a hash."""
    return hashlib.sha256(" ".join(file.sha256 for file in files).encode()).hexdigest()
