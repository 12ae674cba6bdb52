"""The images that a command reads with a trained model: a split of the run's, or all of another set."""

import re
from pathlib import Path
from typing import NamedTuple

from vae_dist.config import DataConfig
from vae_dist.data import datasets, other_images
from vae_dist.data.binarization import DYNAMIC_STEP, binarize_once
from vae_dist.data.source import Source
from vae_dist.errors import UserError


class Chosen(NamedTuple):
    """The images of a command, without augmentation."""

    source: Source
    dataset: str
    split: str  # "train", "validation", "test", or "all" of a set that is not the run's
    file: str  # part of the name of files about these images


def choose(config: DataConfig, split: str, folder: str | None, section: str) -> Chosen:
    """Return a split of the run's images, or all images of `folder`; `section.split` and `section.folder` chose them.

    Training images of data.binarize=dynamic are drawn once: an image's random numbers belong to its index. Raises
    UserError if there are no such images.
    """
    if folder is not None:
        source = other_images.load(config, folder, f"{section}.folder")
        name = Path(folder).resolve().name
        # The hash tells apart two folders of one name.
        file = f"folder_{re.sub(r'[^A-Za-z0-9.-]', '-', name)[:60]}-{source.info.identity[:8]}"
        return Chosen(source, name, "all", file)
    if split == "test":
        return Chosen(datasets.load_test(config), config.name, split, split)
    training, validation = datasets.load_training(config)
    if split == "train":
        if config.binarize == "dynamic":
            training = binarize_once(training, config, DYNAMIC_STEP)
        return Chosen(training, config.name, split, split)
    if validation.info.count == 0:
        raise UserError(f"this run has no validation images (data.validation_images=0); use {section}.split=test")
    return Chosen(validation, config.name, split, split)
