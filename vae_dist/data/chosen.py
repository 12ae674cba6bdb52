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
    dataset: str  # its name in captions
    split: str  # "train", "validation", "test", or "all" of a set that is not the run's
    file: str  # part of the name of files about these images


def choose(config: DataConfig, split: str, folder: str | None, section: str) -> Chosen:
    """Return a split of the run's images, or all images of `folder`; `section.split` and `section.folder` chose them.

    Raises UserError if there are no such images.
    """
    if folder is not None:
        source = other_images.load(config, folder, f"{section}.folder")
        name = Path(folder).resolve().name
        # The hash tells apart two folders of one name.
        file = f"folder_{re.sub(r'[^A-Za-z0-9.-]', '-', name)[:60]}-{source.info.identity[:8]}"
        return Chosen(source, name, "all", file)
    return Chosen(of_split(config, split, f"use {section}.split=test"), config.title, split, split)


def of_split(config: DataConfig, split: str, advice: str) -> Source:
    """Return the images of a split of a run's. Raises UserError, with an advice, if there are none.

    Training images of data.binarize=dynamic are drawn once: an image's random numbers belong to its index.
    """
    if split == "test":
        return datasets.load_test(config)
    training, validation = datasets.load_training(config)
    if split == "train":
        return binarize_once(training, config, DYNAMIC_STEP) if config.binarize == "dynamic" else training
    if validation.info.count == 0:
        raise UserError(f"this run has no validation images (data.validation_images=0); {advice}")
    return validation
