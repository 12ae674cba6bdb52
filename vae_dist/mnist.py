"""MNIST and the sets published in its format: downloaded within bounds, checked, and read.

Addresses, digests and folders are torchvision's, so its copies and ours serve each other. Its downloader is not used:
it waits for a silent server for ever, takes a truncated file for a good one once it lies there, and turns to plain HTTP
where HTTPS fails.
"""

import gzip
import hashlib
import logging
import math
import time
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from vae_dist.errors import UserError
from vae_dist.files import write_atomically

logger = logging.getLogger(__name__)

TORCHVISION_NAMES = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "kmnist": "KMNIST"}

SILENCE_SECONDS = 5  # per address of a host, and hosts have up to eight: dead mirrors are given up within a minute
ARCHIVE_SECONDS = 300
ARCHIVE_BYTES = 64 * 2**20  # the largest has 26 MB

# torchvision knows the archives' digests; these are of the files themselves, which is what lies on the disk.
_SHA256 = {
    "MNIST/raw/train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "MNIST/raw/train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "MNIST/raw/t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "MNIST/raw/t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}


class UnreachableError(UserError):
    """The set is not on this machine, and no mirror gives it or none may be asked."""


class _BadCopyError(Exception):
    """A mirror gave something else than the file."""


def load(name: str, root: Path, split: str, *, download: bool, mirror: str | None) -> tuple[Tensor, Tensor]:
    """Images `(N, 1, H, W)` uint8 and labels `(N,)` int64 of `split`, "train" or "test".

    Raises UnreachableError when files are missing and can't be had, UserError when one on the disk is damaged.
    """
    folder = root / TORCHVISION_NAMES[name] / "raw"
    names = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
    missing = [file for file in names if not (folder / file).exists()]
    if missing and not download:
        raise UnreachableError(f"{name} is not in {folder}: {', '.join(missing)} missing, and data.download=false")
    if missing:
        _download(name, folder, [mirror] if mirror else None)
    part = {"train": "train", "test": "t10k"}[split]
    pixels = _read_idx(folder / f"{part}-images-idx3-ubyte", dimensions=3)
    labels = _read_idx(folder / f"{part}-labels-idx1-ubyte", dimensions=1)
    if len(pixels) != len(labels):
        raise UserError(f"{folder} has {len(pixels)} {part} images but {len(labels)} labels; delete it and run again")
    return pixels.unsqueeze(1), labels.to(torch.int64)


def _read_idx(path: Path, dimensions: int) -> Tensor:
    """A file in the IDX format: two zeros, a type (8 is uint8), the number of dimensions, their sizes, the bytes."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} can't be read ({error.strerror})") from error
    header = 4 + 4 * dimensions
    sizes = [int.from_bytes(content[at : at + 4], "big") for at in range(4, header, 4)]
    known = _SHA256.get("/".join(path.parts[-3:]))
    if content[:4] != bytes([0, 0, 8, dimensions]):
        problem = "its first bytes are not those of such a file"
    elif len(content) != header + math.prod(sizes):
        problem = f"it has {len(content)} bytes where its header promises {header + math.prod(sizes)}"
    elif known is not None and hashlib.sha256(content).hexdigest() != known:
        problem = "its sha256 is not the published one"
    else:
        return torch.from_numpy(np.frombuffer(content, np.uint8, offset=header).reshape(sizes).copy())
    raise UserError(f"{path} is damaged: {problem}; delete it, and the next run downloads it again")


def _download(name: str, folder: Path, mirrors: list[str] | None) -> None:
    import torchvision  # seconds to import, and needed only once in a machine's life

    dataset = getattr(torchvision.datasets, TORCHVISION_NAMES[name])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):  # other processes and other runs wait, then find the files
            _fetch_from_any(mirrors or dataset.mirrors, dict(dataset.resources), folder)
    except OSError as error:
        raise UnreachableError(f"can't download into {folder} ({error.strerror}); choose another data.root") from error


def _fetch_from_any(mirrors: list[str], md5_by_archive: dict[str, str], folder: Path) -> None:
    failures = []
    for mirror in mirrors:
        try:
            for archive, md5 in md5_by_archive.items():
                target = folder / archive.removesuffix(".gz")
                if not target.exists():
                    url = f"{mirror.rstrip('/')}/{archive}"
                    logger.info("downloading %s", url)
                    write_atomically(target, gzip.decompress(_fetch(url, md5)))
            return
        except (_BadCopyError, HTTPException, urllib.error.URLError, TimeoutError, ConnectionError) as error:
            failures.append(f"{mirror}: {getattr(error, 'reason', None) or error or type(error).__name__}")
    raise UnreachableError(
        f"no mirror gave what is missing in {folder} ({'; '.join(failures)}); "
        "try again, put the files there by hand, or use data.name=synthetic_digits, which needs none"
    )


def _fetch(url: str, md5: str) -> bytes:
    deadline = time.monotonic() + ARCHIVE_SECONDS
    content = bytearray()
    with urllib.request.urlopen(url, timeout=SILENCE_SECONDS) as response:
        while chunk := response.read1(2**16):
            content += chunk
            if time.monotonic() > deadline or len(content) > ARCHIVE_BYTES:
                raise _BadCopyError(f"{url} exceeds {ARCHIVE_SECONDS} s or {ARCHIVE_BYTES} bytes")
        expected = response.headers.get("Content-Length")
    if expected is not None and len(content) != int(expected):
        raise _BadCopyError(f"{url} is truncated: {len(content)} of {expected} bytes came")
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
        raise _BadCopyError(f"{url} is corrupt: its md5 is not {md5}")
    return bytes(content)
