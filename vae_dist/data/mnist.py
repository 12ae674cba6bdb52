"""MNIST and the sets published in its format: downloaded within bounds, checked, and read.

Addresses, digests and folders are torchvision's, so its copies and ours serve each other. Its downloader is not used:
it waits for a silent server for ever, takes a truncated file for a good one once it lies there, and turns to plain HTTP
where HTTPS fails.
"""

import gzip
import hashlib
import io
import logging
import math
import threading
import time
import urllib.request
import zlib
from collections.abc import Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from functools import cache
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urljoin

import numpy as np
import torch
from torch import Tensor

from vae_dist.errors import UserError
from vae_dist.files import InUseError, advice, locked, read_bounded, reason, write_atomically

logger = logging.getLogger(__name__)

TORCHVISION_NAMES = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "kmnist": "KMNIST"}

SILENCE_SECONDS = 5  # per address of a host, and hosts have up to eight: dead mirrors are given up within a minute
ARCHIVE_SECONDS = 300
LOCK_SECONDS = 3600  # for another process, which downloads what we want, to be done
ARCHIVE_BYTES = 64 * 2**20  # the largest has 26 MB
REDIRECTS = 5
MOST_NAMED = 5  # files of other formats, in a message
FILE_BYTES = 48 * 2**20  # the largest has 45 MiB

_HANDLERS = (
    urllib.request.ProxyHandler,
    urllib.request.HTTPHandler,
    urllib.request.HTTPSHandler,
    urllib.request.HTTPErrorProcessor,
    urllib.request.HTTPDefaultErrorHandler,
    urllib.request.UnknownHandler,
)

# The files of a set, and how many dimensions each has.
_DIMENSIONS = {
    f"{part}-{kind}-ubyte": dimensions
    for part in ("train", "t10k")
    for kind, dimensions in (("images-idx3", 3), ("labels-idx1", 1))
}

_OTHER_FORMATS = (".npz", ".parquet", ".pkl", ".pkl.gz", ".pt", ".tar", ".tar.gz", ".tgz", ".zip")

# torchvision knows the archives' digests; these are of the files themselves, which is what lies on the disk.
_SHA256 = {
    "mnist": {
        "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    }
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
    try:
        copies, unusable = _find_copies(name, root, [file for file in _DIMENSIONS if not (folder / file).exists()])
        missing = [file for file in _DIMENSIONS if file not in copies and not (folder / file).exists()]
    except OSError as error:
        raise UnreachableError(f"can't look into {folder} ({reason(error)}); choose another data.root") from error
    try:
        if missing and not download:
            raise UnreachableError(f"{name} is not in {folder}: {', '.join(missing)} missing, and data.download=false")
        if missing:
            _download(name, folder, missing, mirror)
    except UnreachableError as error:
        if not unusable:
            raise
        raise UnreachableError(f"{error}; what lies there can't be used: {', '.join(unusable)}") from error
    part = {"train": "train", "test": "t10k"}[split]
    files = [f"{part}-{kind}-ubyte" for kind in ("images-idx3", "labels-idx1")]
    pixels, labels = (copies[file] if file in copies else _read_idx(folder / file, name) for file in files)
    if len(pixels) != len(labels):
        raise UserError(f"{folder} has {len(pixels)} {part} images but {len(labels)} labels; delete it and run again")
    return pixels.unsqueeze(1), labels.to(torch.int64)


def _find_copies(name: str, root: Path, missing: Sequence[str]) -> tuple[dict[str, Tensor], list[str]]:
    """What is in whole copies of missing files, as they lie after a download by hand; and what can't be used, and why.

    They may be packed or not, in folders that are called like the set, in `root` or in `root/raw`.
    """
    own = [root / folder / inside for folder in (TORCHVISION_NAMES[name], name) for inside in ("raw", "")]
    found, unusable = {}, []
    for file in missing:
        problems = []
        for path in (place / ending for place in (*own, root, root / "raw") for ending in _endings(file)):
            if not path.is_file():
                continue
            try:
                found[file] = _read_copy(path, name, file)
            except _BadCopyError as error:
                problems.append(f"{path} ({error})")
            else:
                _say_used(path)
                break
        unusable += problems if file not in found else []
    if len(found) < len(missing):
        others = [path for place in (*own, own[1] / "processed", root) for path in _of_other_formats(place)]
        unusable += [f"{path} (of another format)" for path in others[:MOST_NAMED]]
    return found, unusable


def _of_other_formats(folder: Path) -> list[Path]:
    with suppress(OSError):
        return sorted(path for path in folder.iterdir() if path.name.endswith(_OTHER_FORMATS))
    return []


def _endings(file: str) -> list[str]:
    """How a file is called in the archives that are around."""
    spellings = (file, file.replace("-idx", ".idx"))
    return [ending for spelling in spellings for ending in (spelling, f"{spelling}.gz", f"{spelling}/{spelling}")]


def _read_copy(path: Path, name: str, file: str) -> Tensor:
    """A copy's values. Raises _BadCopyError for one that is not whole or, the sets' file names being equal, another's.

    Where no digest is published, a folder that is called like the set says that it is.
    """
    try:
        content = read_bounded(path, ARCHIVE_BYTES)
    except OSError as error:
        raise _BadCopyError(reason(error)) from error
    values = _parse(_unpacked(content), name, file)
    folders = {part.lower() for part in path.absolute().parts[-4:-1]}
    if name not in _SHA256 and not folders & {name, TORCHVISION_NAMES[name].lower()}:
        published = dict(_torchvision(name).resources)[f"{file}.gz"]
        if hashlib.md5(content, usedforsecurity=False).hexdigest() != published:
            raise _BadCopyError(f"whether it is of {name} can't be told; put it into {TORCHVISION_NAMES[name]}/raw")
    return values


@cache
def _say_used(path: Path) -> None:
    logger.info("using %s", path)


def _read_idx(path: Path, name: str) -> Tensor:
    """The values of a file that lies in its place."""
    try:
        return _parse(_unpacked(read_bounded(path, FILE_BYTES)), name, path.name)
    except OSError as error:
        raise UserError(f"{path} can't be read ({reason(error)}); delete it or choose another data.root") from error
    except _BadCopyError as error:
        raise UserError(f"{path} is damaged: {error}; delete it, and the next run downloads it again") from error


def _parse(content: bytes, name: str, file: str) -> Tensor:
    """The IDX format: two zeros, a type (8 is uint8), the number of dimensions, their sizes, the bytes."""
    dimensions = _DIMENSIONS[file]
    header = 4 + 4 * dimensions
    sizes = [int.from_bytes(content[at : at + 4], "big") for at in range(4, header, 4)]
    known = _SHA256.get(name, {}).get(file)
    if content[:4] != bytes([0, 0, 8, dimensions]):
        problem = "its first bytes are not those of such a file"
    elif len(content) != header + math.prod(sizes):
        problem = f"it has {len(content)} bytes where its header promises {header + math.prod(sizes)}"
    elif 0 in sizes:
        problem = f"it is empty: {' x '.join(map(str, sizes))} bytes"
    elif known is not None and hashlib.sha256(content).hexdigest() != known:
        problem = "its sha256 is not the published one"
    else:
        return torch.from_numpy(np.frombuffer(content, np.uint8, offset=header).reshape(sizes).copy())
    raise _BadCopyError(problem)


def _unpacked(content: bytes) -> bytes:
    """An archive's content, by its first bytes: browsers unpack some and keep the name."""
    return _extract(content, "it") if content[:2] == b"\x1f\x8b" else content


def _torchvision(name: str) -> Any:
    """torchvision's class of a set, with its mirrors and digests."""
    import torchvision  # seconds to import, and needed only once in a machine's life

    return getattr(torchvision.datasets, TORCHVISION_NAMES[name])


def _download(name: str, folder: Path, missing: Sequence[str], mirror: str | None) -> None:
    dataset = _torchvision(name)
    md5_by_archive = {archive: md5 for archive, md5 in dataset.resources if archive.removesuffix(".gz") in missing}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Other processes and other runs wait, then find the files. Where there are no locks, each downloads for itself.
        with locked(folder / ".lock", LOCK_SECONDS, f"another process downloads into {folder}"):
            _fetch_from_any([mirror] if mirror else dataset.mirrors, md5_by_archive, folder)
    except InUseError as error:
        raise UnreachableError(f"another process has held {folder / '.lock'} for {LOCK_SECONDS} s; stop it") from error
    except OSError as error:
        way_out = advice(error, "choose another data.root")
        raise UnreachableError(f"can't download into {folder} ({reason(error)}); {way_out}") from error


def _fetch_from_any(mirrors: list[str], md5_by_archive: dict[str, str], folder: Path) -> None:
    failures = []
    for mirror in mirrors:
        try:
            for archive, md5 in md5_by_archive.items():
                target = folder / archive.removesuffix(".gz")
                if not target.exists():
                    url = f"{mirror.rstrip('/')}/{archive}"
                    logger.info("downloading %s", url)
                    write_atomically(target, _extract(_fetch(url, md5), url))
            return
        except _BadCopyError as error:
            failures.append(str(error))
    missing = [file for archive in md5_by_archive if not (folder / (file := archive.removesuffix(".gz"))).exists()]
    raise UnreachableError(
        f"no mirror gave what is missing in {folder}, {', '.join(missing)} ({'; '.join(failures)}); "
        "try again, put the files there by hand, or use data.name=synthetic_digits, which needs none"
    )


def _fetch(url: str, md5: str) -> bytes:
    """The archive at `url`, within ARCHIVE_SECONDS: a server can also be slow without ever being silent."""
    received: Future[bytes] = Future()

    def receive() -> None:
        try:
            received.set_result(_receive(url))
        except BaseException as error:
            received.set_exception(error)

    threading.Thread(target=receive, daemon=True).start()
    wait([received], ARCHIVE_SECONDS)
    if not received.done():
        raise _BadCopyError(f"{url} takes more than {ARCHIVE_SECONDS} s")
    try:
        content = received.result()
    except (_BadCopyError, OSError, HTTPException, ValueError) as error:
        reason = str(getattr(error, "reason", None) or error or type(error).__name__)
        code = f"{error.code} " if isinstance(error, HTTPError) else ""
        # The server has a say in this text, and a terminal obeys what is not printable.
        text = "".join(letter if letter.isprintable() else "?" for letter in reason[:200])
        raise _BadCopyError(f"{url}: {code}{text}") from error
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
        raise _BadCopyError(f"{url} is corrupt: its md5 is not {md5}")
    return content


def _receive(url: str) -> bytes:
    deadline = time.monotonic() + ARCHIVE_SECONDS
    content = bytearray()
    with _open(url) as response:
        while chunk := response.read1(2**16):
            content += chunk
            if time.monotonic() > deadline or len(content) > ARCHIVE_BYTES:
                raise _BadCopyError(f"it exceeds {ARCHIVE_SECONDS} s or {ARCHIVE_BYTES} bytes")
        if response.length:  # what is still to come
            raise _BadCopyError(f"it is truncated: {len(content)} of {len(content) + response.length} bytes came")
    return bytes(content)


def _open(url: str) -> HTTPResponse:
    """The answer at `url`, or where it has moved to: over HTTP again, and no less safely.

    urllib would follow a redirect by itself, but not before it has read all of its body, however long that is.
    """
    opener = urllib.request.OpenerDirector()
    for handler in _HANDLERS:
        opener.add_handler(handler())
    for _ in range(REDIRECTS + 1):
        try:
            response: HTTPResponse = opener.open(url, timeout=SILENCE_SECONDS)
            return response
        except HTTPError as error:
            error.close()
            place = error.headers.get("Location")
            if error.code not in (301, 302, 303, 307, 308) or place is None:
                raise
            secure = url.startswith("https:")
            url = urljoin(url, place)
            if not url.startswith("https:" if secure else ("https:", "http:")):
                raise _BadCopyError(f"it has moved to {url}, which is not followed") from error
    raise _BadCopyError(f"it moves on and on, at last to {url}")


def _extract(archive: bytes, url: str) -> bytes:
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(archive)) as file:
            content = file.read(FILE_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise _BadCopyError(f"{url} is no whole gzip archive ({error})") from error
    if len(content) > FILE_BYTES:
        raise _BadCopyError(f"{url} holds more than {FILE_BYTES} bytes")
    return content
