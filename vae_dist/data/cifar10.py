"""CIFAR-10 (Krizhevsky 2009), its binary version: 50,000 training and 10,000 test images of 3 x 32 x 32, ten classes.

A file has 10,000 records: the label, one byte, then the pixels as (C, H, W).
"""

import hashlib
import logging
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from vae_dist.data.download import Published
from vae_dist.data.public_files import (
    UnreachableError,
    downloading,
    fetch_into,
    identity_of,
    missing,
    read_published,
)
from vae_dist.data.source import Source, in_memory
from vae_dist.errors import UserError
from vae_dist.files import open_regular, reason, write_atomically

logger = logging.getLogger(__name__)

NAME = "cifar10"
FOLDER = "cifar-10-batches-bin"  # in the archive, and under data.root
IMAGE_SHAPE = (3, 32, 32)
RECORD_BYTES = 1 + 3 * 32 * 32
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

ARCHIVE = Published(
    "https://www.cs.toronto.edu/~kriz",
    "cifar-10-binary.tar.gz",
    170_052_171,
    "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
)


def _batch(name: str, sha256: str) -> Published:
    return Published(ARCHIVE.url(None), name, 10_000 * RECORD_BYTES, sha256)


FILES = {
    "train": (
        _batch("data_batch_1.bin", "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5"),
        _batch("data_batch_2.bin", "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed"),
        _batch("data_batch_3.bin", "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67"),
        _batch("data_batch_4.bin", "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48"),
        _batch("data_batch_5.bin", "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add"),
    ),
    "test": (_batch("test_batch.bin", "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b"),),
}


def load(root: Path, part: Literal["train", "test"], *, download: bool, mirror: str | None) -> Source:
    """Return a part's images with their labels.

    Missing files are unpacked from the archive under the root, or from a downloaded one. Raises UnreachableError if it
    can't be had, UserError if a file is damaged.
    """
    folder = root / FOLDER
    every_file = [file for files in FILES.values() for file in files]
    if missing(every_file, folder):
        _obtain(every_file, root, download, mirror)
    contents = [np.frombuffer(read_published(folder / file.name, file), np.uint8) for file in FILES[part]]
    records = np.concatenate(contents).reshape(-1, RECORD_BYTES)
    pixels = torch.from_numpy(records[:, 1:].reshape(-1, *IMAGE_SHAPE))
    labels = torch.from_numpy(records[:, 0].astype(np.int64))
    return in_memory(NAME, pixels, labels, identity_of(FILES[part]), class_names=CLASSES)


def _obtain(files: Sequence[Published], root: Path, download: bool, mirror: str | None) -> None:
    """Unpack missing files from the archive: that of the user under the root, or one that is downloaded and deleted."""
    folder, own = root / FOLDER, root / ARCHIVE.name
    has_own = not missing([ARCHIVE], root)
    if not has_own and not download:
        raise UnreachableError(f"{NAME} is not in {folder}, nor is {own} there, and data.download=false")
    with downloading(folder):
        if not (absent := missing(files, folder)):  # another process has unpacked them meanwhile
            return
        if not has_own:
            fetch_into(folder, ARCHIVE, mirror)
        archive = own if has_own else folder / ARCHIVE.name
        logger.info("unpacking %s", archive)
        _unpack(archive, absent, folder)
        if not has_own:
            archive.unlink()


def _unpack(archive: Path, files: Sequence[Published], folder: Path) -> None:
    try:
        with open_regular(archive) as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{archive} can't be read ({reason(error)}); delete it or choose another data.root") from error
    if sha256 != ARCHIVE.sha256:
        raise UserError(f"{archive} is damaged or another archive: its sha256 is not the published one; delete it")
    with tarfile.open(archive) as tar:
        for file in files:
            if (member := tar.extractfile(f"{FOLDER}/{file.name}")) is not None:
                write_atomically(folder / file.name, member.read())
