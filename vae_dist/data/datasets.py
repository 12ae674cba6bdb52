"""Data sets by name, as uint8 images in memory. A new data set is a function here and a line in DATASETS.

Shapes: N images of a set, B of a batch, C, H, W image.
"""

import hashlib
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal, NamedTuple

import psutil
import torch
from safetensors.torch import load, save
from torch import Tensor

from vae_dist.config import DataConfig, expand
from vae_dist.data import digits, mnist
from vae_dist.errors import UserError
from vae_dist.files import read_bounded, reason, write_atomically
from vae_dist.plan import FIXED_SEED, Stream, bernoulli_pixels, permutation

logger = logging.getLogger(__name__)

Part = Literal["train", "test"]

FALLBACK = "synthetic_digits"
TEST_DIGITS_START = 2**32  # test digits are rows that no training set reaches


class Images(NamedTuple):
    """Images in memory."""

    pixels: Tensor  # (N, C, H, W), uint8
    labels: Tensor  # (N,), int64

    def select(self, indices: Tensor) -> "Images":
        return Images(self.pixels[indices], self.labels[indices])


def to_unit(pixels: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 pixels as floats in [0, 1]."""
    return pixels.to(dtype).div_(255)


def check_name(name: str) -> None:
    """Raise UserError for a data set that there is none of."""
    if name != "auto" and name not in DATASETS:
        raise UserError(f"unknown dataset {name!r}; choose from {', '.join(sorted(DATASETS))}")


class Prepared(NamedTuple):
    """What a run has to know of its data before it starts."""

    name: str
    training_images: int  # validation images counted in
    image_shape: list[int]  # C, H, W


def prepare(config: DataConfig) -> Prepared:
    """Make the data set's files ready under `data.root`, and settle its name where it is `auto`.

    Raises UserError where a set that was named can't be had, and where a file is damaged.
    """
    name, (pixels, _) = _first_to_be_had(config)
    return Prepared(name, len(pixels), list(pixels.shape[1:]))


def _first_to_be_had(config: DataConfig) -> tuple[str, Images]:
    """The name and the training images of the set that was named; for `auto`, of MNIST or of the embedded digits."""
    if config.name != "auto":
        return config.name, _load(config, "train")
    try:
        return "mnist", _load(replace(config, name="mnist"), "train")
    except mnist.UnreachableError as error:
        logger.warning("MNIST can't be had: %s", error)
        warn_of_fallback()
    return FALLBACK, _load(replace(config, name=FALLBACK), "train")


def warn_of_fallback() -> None:
    """Say that the images are not those that `auto` stands for."""
    logger.warning("TRAINING ON THE EMBEDDED DIGITS (%s): figures do not compare with MNIST's", FALLBACK)


def _load(config: DataConfig, part: Part) -> Images:
    """One part of the set that is named. Raises UserError where its images are not what the config says."""
    check_name(config.name)
    if config.name == "auto":
        raise UserError("data.name=auto is settled when a training starts; name the data set here")
    images = DATASETS[config.name](config, part)
    image_shape = list(images.pixels.shape[1:])
    if config.image_shape not in (None, image_shape):
        raise UserError(f"data.image_shape={config.image_shape} but the images of {config.name} are {image_shape}")
    return images


def load_training(config: DataConfig) -> tuple[Images, Images]:
    """The training images, and the validation images that are held out of them: the same for every seed."""
    images = _load(config, "train")
    count, held_out = len(images.labels), config.validation_images
    if held_out >= count:
        raise UserError(f"data.validation_images={held_out} leaves nothing of {count} training images; use fewer")
    order = permutation(FIXED_SEED, Stream.SPLIT, 0, count)
    validation = images.select(order[:held_out].sort().values)
    training = images.select(order[held_out:].sort().values)
    if config.binarize == "threshold":
        training = _threshold(training)  # "dynamic" is left to the plan, which draws anew at every step
    return training, _binarize_once(validation, config, step=0)


def load_test(config: DataConfig) -> Images:
    """The test images. Training never asks for them."""
    return _binarize_once(_load(config, "test"), config, step=1)


def _binarize_once(images: Images, config: DataConfig, step: int) -> Images:
    """Held-out images are drawn from a fixed seed, so that every run is scored on the same ones."""
    if config.binarize == "dynamic" and len(images.labels) > 0:
        rows = range(len(images.labels))
        return images._replace(pixels=bernoulli_pixels(images.pixels, FIXED_SEED, step, rows))
    return _threshold(images) if config.binarize == "threshold" else images


def _threshold(images: Images) -> Images:
    return images._replace(pixels=(images.pixels >= 128).to(torch.uint8) * 255)


def _load_mnist(config: DataConfig, part: Part, name: str) -> Images:
    return Images(*mnist.load(name, _root(config), part, download=config.download, mirror=config.mirror))


def _root(config: DataConfig) -> Path:
    return Path(expand(config.root, "data.root"))


def _load_digits(config: DataConfig, part: Part) -> Images:
    """The embedded digits: drawn once, then kept under `data.root` where that can be written to."""
    count = config.synthetic_images
    folder = _root(config) / FALLBACK
    cache = folder / f"{count}_{digits.drawing_version()}.safetensors"
    tensors = _read_digits(cache, count)
    if tensors is None:
        tensors = _draw_digits(count)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(cache, save({**tensors, "sha256": _digest(tensors)}))
        except OSError as error:
            logger.info("the digits are not kept: can't write to %s (%s)", folder, reason(error))
    return Images(tensors[f"{part}_pixels"], tensors[f"{part}_labels"])


def _read_digits(cache: Path, count: int) -> dict[str, Tensor] | None:
    """The digits that were kept, None where there are none that are whole and of this very drawing.

    The digest finds damage and what was meant for something else. Against those who may write to `data.root` it is no
    help, as they could have it fit: they choose the images.
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
        tensors = load(read_bounded(cache, size + 2**12))
    except OSError:
        return None
    except Exception:  # whatever a foreign file does to the parser
        tensors = {}
    if {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()} == expected:
        digest = tensors.pop("sha256")
        if torch.equal(digest, _digest(tensors)):
            return tensors
    logger.warning("%s is not what is kept there; the digits are drawn anew", cache)
    return None


def _digest(tensors: Mapping[str, Tensor]) -> Tensor:
    """A hash of the drawing that these digits are of, and of their bits: uint8 `(32,)`."""
    digest = hashlib.sha256(digits.drawing_version().encode())
    for name in sorted(tensors):
        digest.update(tensors[name].numpy().data)
    return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)


@lru_cache(maxsize=1)
def _draw_digits(count: int) -> dict[str, Tensor]:
    logger.info("drawing %d digits", count + count // 6)
    train_pixels, train_labels = digits.draw_digits(range(count))
    test_pixels, test_labels = digits.draw_digits(range(TEST_DIGITS_START, TEST_DIGITS_START + count // 6))
    return {
        "train_pixels": train_pixels,
        "train_labels": train_labels,
        "test_pixels": test_pixels,
        "test_labels": test_labels,
    }


# Name in a config -> images of one part. The files are fetched or made where they are missing.
DATASETS: dict[str, Callable[[DataConfig, Part], Images]] = {
    "fashion_mnist": partial(_load_mnist, name="fashion_mnist"),
    "kmnist": partial(_load_mnist, name="kmnist"),
    "mnist": partial(_load_mnist, name="mnist"),
    "synthetic_digits": _load_digits,
}
