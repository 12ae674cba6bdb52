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
    """Convert uint8 pixels to floats in [0, 1]."""
    return pixels.to(dtype).div_(255)


def check_name(name: str) -> None:
    """Raise UserError for an unknown data set."""
    if name != "auto" and name not in DATASETS:
        raise UserError(f"unknown dataset {name!r}; choose from {', '.join(sorted(DATASETS))}")


class TrainingSet(NamedTuple):
    """The training images of a data set, validation images included."""

    name: str
    images: Images
    identity: str  # a hash of the verified files that the images come from

    @property
    def size(self) -> int:
        return len(self.images.labels)

    @property
    def image_shape(self) -> list[int]:
        """C, H, W."""
        return list(self.images.pixels.shape[1:])


def load_training_set(config: DataConfig) -> TrainingSet:
    """Download or draw the data set if it is missing under `data.root`, and read its training images.

    `data.name=auto` is MNIST, or the embedded digits if MNIST is not available. Raises UserError if a named set is not
    available or a file is damaged.
    """
    if config.name != "auto":
        return TrainingSet(config.name, *_load(config, "train"))
    try:
        return TrainingSet("mnist", *_load(replace(config, name="mnist"), "train"))
    except mnist.UnreachableError as error:
        logger.warning("MNIST is not available: %s", error)
        warn_of_fallback()
    return TrainingSet(FALLBACK, *_load(replace(config, name=FALLBACK), "train"))


def warn_of_fallback() -> None:
    """Log a warning that the training images are the embedded digits, not MNIST's."""
    logger.warning("TRAINING ON THE EMBEDDED DIGITS (%s): metrics are not comparable with MNIST's", FALLBACK)


def split(training_set: TrainingSet, config: DataConfig) -> tuple[Images, Images]:
    """Return the images to train on, and the validation images held out of them: the same for every seed."""
    images, held_out = training_set.images, config.validation_images
    if held_out >= training_set.size:
        raise UserError(
            f"data.validation_images={held_out} leaves nothing of {training_set.size} training images; use fewer"
        )
    order = permutation(FIXED_SEED, Stream.SPLIT, 0, training_set.size)
    validation = images.select(order[:held_out].sort().values)
    training = images.select(order[held_out:].sort().values)
    if config.binarize == "threshold":
        training = _threshold(training)  # "dynamic" is left to the plan, which draws again at every step
    return training, _binarize_once(validation, config, step=0)


def load_training(config: DataConfig) -> tuple[Images, Images]:
    """Read the images to train on, and the validation images. Raises UserError for data.name=auto."""
    _require_name(config)
    return split(load_training_set(config), config)


def load_test(config: DataConfig) -> Images:
    """Read the test images. Training never uses them. Raises UserError for data.name=auto."""
    _require_name(config)
    return _binarize_once(_load(config, "test")[0], config, step=1)


def _require_name(config: DataConfig) -> None:
    if config.name == "auto":
        raise UserError("data.name=auto is resolved when a training starts; name the data set here")


def _load(config: DataConfig, part: Part) -> tuple[Images, str]:
    """Read one part of the named set, with its identity. Raises UserError if its images do not fit the config."""
    check_name(config.name)
    images, identity = DATASETS[config.name](config, part)
    image_shape = list(images.pixels.shape[1:])
    if config.image_shape not in (None, image_shape):
        raise UserError(f"data.image_shape={config.image_shape} but the images of {config.name} are {image_shape}")
    return images, identity


def _binarize_once(images: Images, config: DataConfig, step: int) -> Images:
    """Binarise held-out images with a fixed seed, so that every run is evaluated on the same ones."""
    if config.binarize == "dynamic" and len(images.labels) > 0:
        rows = range(len(images.labels))
        return images._replace(pixels=bernoulli_pixels(images.pixels, FIXED_SEED, step, rows))
    return _threshold(images) if config.binarize == "threshold" else images


def _threshold(images: Images) -> Images:
    return images._replace(pixels=(images.pixels >= 128).to(torch.uint8) * 255)


def _load_mnist(config: DataConfig, part: Part, name: str) -> tuple[Images, str]:
    pixels, labels, identity = mnist.load(name, _root(config), part, download=config.download, mirror=config.mirror)
    return Images(pixels, labels), identity


def _root(config: DataConfig) -> Path:
    return Path(expand(config.root, "data.root"))


def _load_digits(config: DataConfig, part: Part) -> tuple[Images, str]:
    """Read the embedded digits. They are drawn once, and cached under `data.root` if that is writable."""
    count = config.synthetic_images
    folder = _root(config) / FALLBACK
    cache = folder / f"{count}_{digits.drawing_version()}.safetensors"
    cached = _read_digits(cache, count)
    tensors, digest = cached or _draw_digits(count)
    if cached is None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(cache, save({**tensors, "sha256": digest}))
        except OSError as error:
            logger.info("the digits are not cached: can't write to %s (%s)", folder, reason(error))
    return Images(tensors[f"{part}_pixels"], tensors[f"{part}_labels"]), digest.numpy().tobytes().hex()


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
        tensors = load(read_bounded(cache, size + 2**12))
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


# Name in a config -> the images of one part and their identity. Missing files are downloaded or made.
DATASETS: dict[str, Callable[[DataConfig, Part], tuple[Images, str]]] = {
    "fashion_mnist": partial(_load_mnist, name="fashion_mnist"),
    "kmnist": partial(_load_mnist, name="kmnist"),
    "mnist": partial(_load_mnist, name="mnist"),
    "synthetic_digits": _load_digits,
}
