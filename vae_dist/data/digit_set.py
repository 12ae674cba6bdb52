"""The data set `synthetic_digits`: `digits` drawn once, and kept in a file."""

import hashlib
import logging
import math
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Literal

import psutil
import torch
from safetensors.torch import load as parse
from safetensors.torch import save
from torch import Tensor

from vae_dist.data import digits
from vae_dist.data.source import Source, in_memory
from vae_dist.errors import UserError
from vae_dist.files import read_bounded, reason, write_atomically

logger = logging.getLogger(__name__)

NAME = "synthetic_digits"
TEST_DIGITS_START = 2**32  # test digits are rows that no training set reaches


def load(root: Path, part: Literal["train", "test"], count: int) -> Source:
    """Return a part of the set with `count` training images. It is drawn once, and cached if possible."""
    place = root / NAME
    cache = place / f"{count}_{digits.drawing_version()}.safetensors"
    cached = _read_digits(cache, count)
    tensors, digest = cached or _draw_digits(count)
    if cached is None:
        try:
            place.mkdir(parents=True, exist_ok=True)
            write_atomically(cache, save({**tensors, "sha256": digest}))
        except OSError as error:
            logger.info("the digits are not cached: can't write to %s (%s)", place, reason(error))
    identity = hashlib.sha256(f"{part} {digest.numpy().tobytes().hex()}".encode()).hexdigest()
    return in_memory(NAME, tensors[f"{part}_pixels"], tensors[f"{part}_labels"], identity)


def _read_digits(cache: Path, count: int) -> tuple[dict[str, Tensor], Tensor] | None:
    """Return the cached digits and their digest, None if they are missing, damaged or of another drawing.

    The digest detects damage, not forgery: whoever can write to `data.root` chooses the images anyway.
    """
    like = dict(zip(("pixels", "labels"), digits.draw_digits(range(0)), strict=True))
    expected = {
        f"{part}_{kind}": ((images, *tensor.shape[1:]), tensor.dtype)
        for part, images in (("train", count), ("test", count // 6))
        for kind, tensor in like.items()
    } | {"sha256": ((hashlib.sha256().digest_size,), torch.uint8)}
    size = sum(math.prod(shape) * dtype.itemsize for shape, dtype in expected.values())
    if size > (memory := psutil.virtual_memory().total):
        raise UserError(
            f"data.synthetic_images={count} would take {size / 2**30:.3g} GiB, and this machine has "
            f"{memory / 2**30:.3g} GiB; use fewer"
        )
    try:
        tensors = parse(read_bounded(cache, size + 2**12))
    except OSError:
        return None
    except Exception:  # an untrusted file can make the parser raise anything
        tensors = {}
    if {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()} == expected:
        digest = tensors.pop("sha256")
        if torch.equal(digest, _digest(tensors)):
            return tensors, digest
    logger.warning("%s is damaged or of another version; the digits are drawn again", cache)
    return None


def _digest(tensors: Mapping[str, Tensor]) -> Tensor:
    """Hash the version of the drawing and the digits' bits: uint8 `(32,)`."""
    digest = hashlib.sha256(digits.drawing_version().encode())
    for name in sorted(tensors):
        digest.update(tensors[name].numpy().data)
    return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)


@lru_cache(maxsize=1)
def _draw_digits(count: int) -> tuple[dict[str, Tensor], Tensor]:
    logger.info("drawing %d digits", count + count // 6)
    train_pixels, train_labels = digits.draw_digits(range(count))
    test_pixels, test_labels = digits.draw_digits(range(TEST_DIGITS_START, TEST_DIGITS_START + count // 6))
    tensors = {
        "train_pixels": train_pixels,
        "train_labels": train_labels,
        "test_pixels": test_pixels,
        "test_labels": test_labels,
    }
    return tensors, _digest(tensors)
