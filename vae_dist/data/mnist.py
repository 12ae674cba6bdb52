"""MNIST and the sets published in its format, from files on the disk or downloaded.

Addresses, digests and folders are torchvision's, so that either finds what the other has downloaded.
"""

import hashlib
import logging
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vae_dist.data import idx
from vae_dist.data.download import ARCHIVE_BYTES, DownloadError, fetch
from vae_dist.data.idx import BadFileError, IdxFile
from vae_dist.data.public_files import UnreachableError, downloading
from vae_dist.errors import UserError
from vae_dist.files import read_bounded, reason, write_atomically

logger = logging.getLogger(__name__)

TORCHVISION_NAMES = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "kmnist": "KMNIST"}

MOST_NAMED = 5  # files of other formats, in a message

# The files of a set, and the number of axes of each.
_DIMENSIONS = {
    f"{part}-{kind}-ubyte": dimensions
    for part in ("train", "t10k")
    for kind, dimensions in (("images-idx3", 3), ("labels-idx1", 1))
}

_OTHER_FORMATS = (".npz", ".parquet", ".pkl", ".pkl.gz", ".pt", ".tar", ".tar.gz", ".tgz", ".zip")

# torchvision publishes the archives' digests; these are of the unpacked files, which is what is on the disk.
_SHA256 = {
    "mnist": {
        "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    }
}


def load(name: str, root: Path, split: str, *, download: bool, mirror: str | None) -> tuple[Tensor, Tensor, str]:
    """Return images `(N, 1, H, W)` uint8 and labels `(N,)` int64 of `split`, "train" or "test", and their files' hash.

    Raises UnreachableError if files are missing and can't be downloaded, UserError if one on the disk is damaged.
    """
    folder = root / TORCHVISION_NAMES[name] / "raw"
    try:
        copies, unusable = _find_copies(name, root, [file for file in _DIMENSIONS if not (folder / file).exists()])
        missing = [file for file in _DIMENSIONS if file not in copies and not (folder / file).exists()]
    except OSError as error:
        raise UnreachableError(f"can't read {folder} ({reason(error)}); choose another data.root") from error
    try:
        if missing and not download:
            raise UnreachableError(f"{name} is not in {folder}: {', '.join(missing)} missing, and data.download=false")
        if missing:
            _download(name, folder, missing, mirror)
    except UnreachableError as error:
        if not unusable:
            raise
        raise UnreachableError(f"{error}; these files can't be used: {', '.join(unusable)}") from error
    part = {"train": "train", "test": "t10k"}[split]
    files = [f"{part}-{kind}-ubyte" for kind in ("images-idx3", "labels-idx1")]
    images, classes = (copies[file] if file in copies else _read_file(folder / file, name) for file in files)
    pixels, labels = images.values, classes.values
    if len(pixels) != len(labels):
        raise UserError(f"{folder} has {len(pixels)} {part} images but {len(labels)} labels; delete it and run again")
    identity = hashlib.sha256(f"{images.sha256} {classes.sha256}".encode()).hexdigest()
    return pixels.unsqueeze(1), labels.to(torch.int64), identity


def _find_copies(name: str, root: Path, missing: Sequence[str]) -> tuple[dict[str, IdxFile], list[str]]:
    """Return missing files' values from copies downloaded by hand, and the unusable copies with the reasons.

    Copies may be gzipped or not, in folders named like the set, in `root` or in `root/raw`.
    """
    own = [root / folder / inside for folder in (TORCHVISION_NAMES[name], name) for inside in ("raw", "")]
    copies, unusable = {}, []
    for file in missing:
        problems = []
        for path in (place / spelling for place in (*own, root, root / "raw") for spelling in _spellings(file)):
            if not path.is_file():
                continue
            try:
                copies[file] = _read_copy(path, name, file)
            except BadFileError as error:
                problems.append(f"{path} ({error})")
            else:
                _log_use(path)
                break
        unusable += problems if file not in copies else []
    if len(copies) < len(missing):
        others = [path for place in (*own, own[1] / "processed", root) for path in _of_other_formats(place)]
        unusable += [f"{path} (of another format)" for path in others[:MOST_NAMED]]
    return copies, unusable


def _of_other_formats(folder: Path) -> list[Path]:
    with suppress(OSError):
        return sorted(path for path in folder.iterdir() if path.name.endswith(_OTHER_FORMATS))
    return []


def _spellings(file: str) -> list[str]:
    """Paths of a file in the archives that are in use."""
    names = (file, file.replace("-idx", ".idx"))
    return [spelling for name in names for spelling in (name, f"{name}.gz", f"{name}/{name}")]


def _read_copy(path: Path, name: str, file: str) -> IdxFile:
    """Return a copy's values. Raises BadFileError if it is damaged, or may be another set's: file names are the same.

    A set without a published digest is recognised by the name of its folder, or by its archive's digest.
    """
    try:
        content = read_bounded(path, ARCHIVE_BYTES)
    except OSError as error:
        raise BadFileError(reason(error)) from error
    values = _parse(content, name, file)
    folders = {part.lower() for part in path.absolute().parts[-4:-1]}
    if name not in _SHA256 and not folders & {name, TORCHVISION_NAMES[name].lower()}:
        published = dict(_torchvision(name).resources)[f"{file}.gz"]
        if hashlib.md5(content, usedforsecurity=False).hexdigest() != published:
            raise BadFileError(
                f"it may be another set's; if it is of {name}, put it into {TORCHVISION_NAMES[name]}/raw"
            )
    return values


@cache
def _log_use(path: Path) -> None:
    logger.info("using %s", path)


def _read_file(path: Path, name: str) -> IdxFile:
    """Return the values of a file of the set's own folder."""
    try:
        return _parse(read_bounded(path, idx.FILE_BYTES), name, path.name)
    except OSError as error:
        raise UserError(f"{path} can't be read ({reason(error)}); delete it or choose another data.root") from error
    except BadFileError as error:
        raise UserError(f"{path} is damaged: {error}; delete it, and the next run downloads it again") from error


def _parse(content: bytes, name: str, file: str) -> IdxFile:
    return idx.parse(idx.unpack_if_packed(content), _DIMENSIONS[file], _SHA256.get(name, {}).get(file))


def _torchvision(name: str) -> Any:
    """torchvision's class of a set, with its mirrors and digests."""
    import torchvision  # takes seconds, and is needed only before the first download

    return getattr(torchvision.datasets, TORCHVISION_NAMES[name])


def _download(name: str, folder: Path, missing: Sequence[str], mirror: str | None) -> None:
    dataset = _torchvision(name)
    md5_by_archive = {archive: md5 for archive, md5 in dataset.resources if archive.removesuffix(".gz") in missing}
    with downloading(folder):
        _download_from_any([mirror] if mirror else dataset.mirrors, md5_by_archive, folder)


def _download_from_any(mirrors: Sequence[str], md5_by_archive: dict[str, str], folder: Path) -> None:
    """Download and unpack what is missing in `folder`, from the first mirror that has it."""
    failures = []
    for mirror in mirrors:
        try:
            for archive, md5 in md5_by_archive.items():
                target = folder / archive.removesuffix(".gz")
                if not target.exists():
                    url = f"{mirror.rstrip('/')}/{archive}"
                    logger.info("downloading %s", url)
                    write_atomically(target, idx.unpack(fetch(url, md5), url))
            return
        except (DownloadError, BadFileError) as error:
            failures.append(str(error))
    missing = [file for archive in md5_by_archive if not (folder / (file := archive.removesuffix(".gz"))).exists()]
    raise UnreachableError(
        f"no mirror has what is missing in {folder}, {', '.join(missing)} ({'; '.join(failures)}); "
        "try again, put the files there by hand, or use data.name=synthetic_digits, which needs none"
    )
