"""The images that a command reads with a trained model: a split of the run's, or all of another set."""

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from vae_dist.config import DataConfig
from vae_dist.data import arrays, datasets
from vae_dist.data import folder as folders
from vae_dist.data.binarization import TEST_STEP, TRAINING_STEP, binarize_once
from vae_dist.data.classes import with_classes
from vae_dist.data.source import Source
from vae_dist.errors import UserError


class Chosen(NamedTuple):
    """The images of a command, without augmentation."""

    source: Source  # with the labels of the run's classes, if the model is conditional
    dataset: str  # its name in captions
    split: str  # "train", "validation", "test", or "all" of a set that is not the run's
    file: str  # part of the name of files about these images


def choose(config: DataConfig, split: str, folder: str | None, section: str) -> Chosen:
    """Return a split of the run's images, or all images of `folder`; `section.split` and `section.folder` chose them.

    Raises UserError if there are no such images.
    """
    if folder is not None:
        source = of_folder(config, folder, f"{section}.folder")
        name = Path(folder).resolve().name
        # The hash tells apart two folders of one name.
        file = f"folder_{re.sub(r'[^A-Za-z0-9.-]', '-', name)[:60]}-{source.info.identity[:8]}"
        chosen = Chosen(source, name, "all", file)
    else:
        chosen = Chosen(of_split(config, split, f"use {section}.split=test"), config.title, split, split)
    if config.classes is None:
        return chosen
    return chosen._replace(source=with_classes(chosen.source, config.classes))


def of_split(config: DataConfig, split: str, advice: str) -> Source:
    """Return the images of a split of a run's. Raises UserError, with an advice, if there are none.

    Training images of data.binarize=dynamic are drawn once: an image's random numbers belong to its index.
    """
    if split == "test":
        return datasets.load_test(config)
    training, validation = datasets.load_training(config)
    if split == "train":
        return binarize_once(training, config.binarize, TRAINING_STEP) if config.binarize == "dynamic" else training
    if validation.info.count == 0:
        raise UserError(f"this run has no validation images (data.validation_images=0); {advice}")
    return validation


def of_folder(config: DataConfig, path: str, key: str) -> Source:
    """Return all images of a folder or an array of the user's own, processed like the test images of the config.

    The config has the image shape of a run. Raises UserError if these images can't have it; `key` gave the path.
    """
    if not os.path.lexists(path):
        raise UserError(f"{key}={path} does not exist; give a folder, a packed one or an array")
    channels, height, width = config.image_shape or (0, 0, 0)
    is_array = arrays.is_array(Path(path))
    if channels not in (1, 3) or (not is_array and height != width):
        raise UserError(
            f"the run's images are {config.image_shape}, and those of a folder are square, grey or colour; give an "
            "array"
        )
    name, size = ("array", None) if is_array else ("folder", height)
    own = replace(config, name=name, path=path, size=size, channels=channels)
    source = arrays.all_images(own) if is_array else folders.all_images(own)
    if source.info.image_shape != (channels, height, width):
        raise UserError(
            f"the images of {path} are {list(source.info.image_shape)}, but the run's are {config.image_shape} "
            "(channels, height, width): resize them"
        )
    return binarize_once(source, config.binarization, TEST_STEP)
