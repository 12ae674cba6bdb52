"""Data sets by name, as sources: training, validation and test. A new set is a function and a line in DATASETS."""

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

from vae_dist.config import OWN_IMAGES, DataConfig, expand
from vae_dist.data import arrays, binarized_mnist, cifar10, digit_set, folder, mnist
from vae_dist.data.binarization import TEST_STEP, VALIDATION_STEP, binarize_once, cut
from vae_dist.data.public_files import UnreachableError
from vae_dist.data.source import DataInfo, Source, in_memory, resident
from vae_dist.data.splits import default_held_out, hold_out
from vae_dist.errors import UserError

logger = logging.getLogger(__name__)

Part = Literal["train", "test"]

FALLBACK = digit_set.NAME


def check_name(name: str) -> None:
    """Raise UserError for an unknown data set."""
    if name != "auto" and name not in DATASETS:
        raise UserError(f"unknown data.name {name!r}; choose from {', '.join(sorted(DATASETS))}")


def load_training_set(config: DataConfig) -> Source:
    """Download or draw the data set if it is missing under `data.root`, and return all its training images.

    Validation images are among them: `split` divides them. `data.name=auto` is MNIST, or the embedded digits if MNIST
    is not available; the source's name says which. Raises UserError if a named set is not available or a file is
    damaged.
    """
    if config.name != "auto":
        return _load(config, "train")
    try:
        return _load(replace(config, name="mnist"), "train")
    except UnreachableError as error:
        logger.warning("MNIST is not available: %s", error)
        warn_of_fallback()
    return _load(replace(config, name=FALLBACK), "train")


def warn_of_fallback() -> None:
    """Log a warning that the training images are the embedded digits, not MNIST's."""
    logger.warning("TRAINING ON THE EMBEDDED DIGITS (%s): metrics are not comparable with MNIST's", FALLBACK)


def split(training_set: Source, config: DataConfig) -> tuple[Source, Source]:
    """Return the images to train on, and the validation images: the same for every seed.

    The validation images are held out of the training set if the data set has no validation part of its own.
    """
    training, validation = training_set, _validation_part(config)
    if validation is None:
        count = config.validation_images
        count = default_held_out(training.info.count) if count is None else count
        training, validation = hold_out(training, count, config, "validation")
    if config.binarize == "threshold":
        training = cut(training)  # "dynamic" is left to the plan, which draws again at every step
    return resident(training), resident(binarize_once(validation, config.binarize, VALIDATION_STEP))


def has_validation_part(config: DataConfig) -> bool:
    """Return whether the data set has a validation part of its own."""
    return config.name in VALIDATION_PARTS and VALIDATION_PARTS[config.name](config) is not None


def _validation_part(config: DataConfig) -> Source | None:
    """Return the data set's own validation part; None if it has none."""
    load = VALIDATION_PARTS.get(config.name)
    part = None if load is None else load(config)
    if part is not None and config.validation_images is not None:
        raise UserError(
            f"{config.title} has {part.info.count} validation images of its own: use data.validation_images=null"
        )
    return part


def load_training(config: DataConfig) -> tuple[Source, Source]:
    """Return the images to train on, and the validation images. Raises UserError for data.name=auto."""
    _require_name(config)
    training_set = load_training_set(config)
    _require_identity(config, training_set.info)
    return split(training_set, config)


def load_test(config: DataConfig) -> Source:
    """Return the test images. Training never uses them. Raises UserError for data.name=auto."""
    _require_name(config)
    if config.name in OWN_IMAGES:
        _require_identity(config, _load(config, "train").info)
    return resident(binarize_once(_load(config, "test"), config.binarize, TEST_STEP))


def forget() -> None:
    """Look at the user's own images again when they are next used. Otherwise a process looks at them once."""
    folder.forget()


def log_sizes(config: DataConfig, training: Source, validation: Source) -> None:
    """Log how many of the user's own images are training, validation and test images, and of how many classes."""
    if config.name in OWN_IMAGES:
        classes = f" of {training.info.classes} classes" if training.info.classes else ""
        logger.info(
            "%s: %d training, %d validation and %d test images%s",
            config.path, training.info.count, validation.info.count, _load(config, "test").info.count, classes,
        )  # fmt: skip
    if config.name == "folder":
        folder.log_unused(config)


def _require_identity(config: DataConfig, info: DataInfo) -> None:
    """Raise UserError if these are other images of the user's than those that a run was started with."""
    if config.name in OWN_IMAGES and config.identity not in (None, info.identity):
        raise UserError(
            f"the images in data.path={config.path} are not those that the run was trained on: put them back, give the "
            "data.path where they are now, or evaluate other images with evaluate.folder"
        )


def _require_name(config: DataConfig) -> None:
    if config.name == "auto":
        raise UserError("data.name=auto is resolved when a training starts; name the data set here")


def _load(config: DataConfig, part: Part) -> Source:
    """Return one part of the named set. Raises UserError if its images do not fit the config."""
    check_name(config.name)
    source = DATASETS[config.name](config, part)
    if source.info.name != config.name:  # a run would store the other name and train on the other set when resumed
        raise ValueError(f"DATASETS has the source of {source.info.name} under {config.name}")
    image_shape = list(source.info.image_shape)
    if config.image_shape not in (None, image_shape):
        raise UserError(f"data.image_shape={config.image_shape} but the images of {config.name} are {image_shape}")
    return source


def _load_mnist(config: DataConfig, part: Part, name: str) -> Source:
    pixels, labels, identity = mnist.load(name, _root(config), part, download=config.download, mirror=config.mirror)
    return in_memory(name, pixels, labels, identity)


def _load_public(config: DataConfig, part: str, load: Callable[..., Source]) -> Source:
    return load(_root(config), part, download=config.download, mirror=config.mirror)


def _load_digits(config: DataConfig, part: Part) -> Source:
    return digit_set.load(_root(config), part, config.synthetic_images)


def _root(config: DataConfig) -> Path:
    return Path(expand(config.root, "data.root"))


# Name in a config -> the set's own validation part, or None. Of other sets it is held out of the training part.
VALIDATION_PARTS: dict[str, Callable[[DataConfig], Source | None]] = {
    "array": arrays.load_validation,
    binarized_mnist.NAME: partial(_load_public, part="validation", load=binarized_mnist.load),
    "folder": folder.load_validation,
}

# Name in a config -> the source of one part, of that name. Missing files are downloaded or made.
DATASETS: dict[str, Callable[[DataConfig, Part], Source]] = {
    "array": arrays.load,
    binarized_mnist.NAME: partial(_load_public, load=binarized_mnist.load),
    cifar10.NAME: partial(_load_public, load=cifar10.load),
    "fashion_mnist": partial(_load_mnist, name="fashion_mnist"),
    "folder": folder.load,
    "kmnist": partial(_load_mnist, name="kmnist"),
    "mnist": partial(_load_mnist, name="mnist"),
    digit_set.NAME: _load_digits,
}
_OF_THE_PACKAGE = frozenset(DATASETS)


def may_change(name: str) -> bool:
    """Return whether a set's images are the user's, in files or from a program that has registered the set.

    A run stores their identity, and resumes on no others.
    """
    return name in OWN_IMAGES or name not in _OF_THE_PACKAGE
