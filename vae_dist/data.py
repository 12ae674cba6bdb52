"""Data sets by name, as uint8 images in memory. A new data set is a function here and a line in DATASETS.

Shapes: N images of a set, B of a batch, C, H, W image.
"""

import logging
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from vae_dist import digits, mnist
from vae_dist.config import DataConfig
from vae_dist.errors import UserError
from vae_dist.files import write_atomically
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
    image_shape = list(pixels.shape[1:])
    if config.image_shape not in (None, image_shape):
        raise UserError(f"data.image_shape={config.image_shape} but the images of {name} are {image_shape}")
    return Prepared(name, len(pixels), image_shape)


def _first_to_be_had(config: DataConfig) -> tuple[str, Images]:
    """The name and the training images of the set that was named; for `auto`, of MNIST or of the embedded digits."""
    if config.name != "auto":
        return config.name, DATASETS[config.name](config, "train")
    try:
        return "mnist", DATASETS["mnist"](config, "train")
    except mnist.UnreachableError as error:
        logger.warning("MNIST can't be had: %s", error)
        logger.warning("TRAINING ON THE EMBEDDED DIGITS (%s): figures do not compare with MNIST's", FALLBACK)
    return FALLBACK, DATASETS[FALLBACK](config, "train")


def load_training(config: DataConfig) -> tuple[Images, Images]:
    """The training images, and the validation images that are held out of them: the same for every seed."""
    images = DATASETS[config.name](config, "train")
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
    return _binarize_once(DATASETS[config.name](config, "test"), config, step=1)


def _binarize_once(images: Images, config: DataConfig, step: int) -> Images:
    """Held-out images are drawn from a fixed seed, so that every run is scored on the same ones."""
    if config.binarize == "dynamic" and len(images.labels) > 0:
        rows = range(len(images.labels))
        return images._replace(pixels=bernoulli_pixels(images.pixels, FIXED_SEED, step, rows))
    return _threshold(images) if config.binarize == "threshold" else images


def _threshold(images: Images) -> Images:
    return images._replace(pixels=(images.pixels >= 128).to(torch.uint8) * 255)


def _load_mnist(config: DataConfig, part: Part, name: str) -> Images:
    root = Path(config.root).expanduser()
    return Images(*mnist.load(name, root, part, download=config.download, mirror=config.mirror))


def _load_digits(config: DataConfig, part: Part) -> Images:
    """The embedded digits: drawn once, then kept under `data.root` where that can be written to."""
    count = config.synthetic_images
    folder = Path(config.root).expanduser() / FALLBACK
    cache = folder / f"{count}_{digits.drawing_version()}.safetensors"
    try:
        tensors = load_file(cache)
    except (OSError, SafetensorError):
        tensors = _draw_digits(count)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(cache, save(tensors))
        except OSError as error:
            logger.info("the digits are not kept: can't write to %s (%s)", folder, error.strerror)
    return Images(tensors[f"{part}_pixels"], tensors[f"{part}_labels"])


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
