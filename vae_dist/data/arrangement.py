"""What the folders in a folder of images mean: the parts of the data set, and the classes of the images. N images."""

import logging
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vae_dist.config.text import as_text
from vae_dist.data.folder_index import FolderIndex
from vae_dist.errors import UserError

logger = logging.getLogger(__name__)

# Folders of parts by name in lower case. They mean parts only where there is a folder of training images.
PARTS = {"train": "train", "validation": "validation", "val": "validation", "valid": "validation", "test": "test"}


class Arrangement(NamedTuple):
    """The parts and classes of N images."""

    parts: Mapping[str, range]  # indices of "train", "validation" and "test", those that there are; empty: one set
    classes: tuple[str, ...] | None  # names of the classes, the same in all parts; None without labels
    labels: NDArray[np.int64] | None  # (N,), 0 for an image that is in none of the parts


def arrange(index: FolderIndex) -> Arrangement:
    """Find the parts, which are folders in `data.path`, and the classes, which are the folders below a part.

    There are classes if each file of each part is in the folder of one. Raises UserError where a folder may be a part
    or a class.
    """
    folders = _folders(index)
    named = [name for name in folders if name.lower() in PARTS]
    if "train" not in map(str.lower, named):
        labels = index.first_level()
        return Arrangement({}, *(labels or (None, None)))
    prefixes: dict[str, str] = {}
    for name in named:
        part = PARTS[name.lower()]
        if part in prefixes:
            raise UserError(
                f"{as_text(index.folder)} has two folders of {part} images, {as_text(prefixes[part][:-1])} and "
                f"{as_text(name)}; keep one"
            )
        prefixes[part] = f"{name}/"
    if others := [name for name in folders if name not in named]:
        raise UserError(
            f"{as_text(index.folder)} has the folder {as_text(prefixes['train'][:-1])}, so that only train, validation "
            f"and test are used, but also images in {as_text(', '.join(others))}: move these into train, or rename "
            "train if it is a class"
        )
    parts = {part: index.below(prefix) for part, prefix in prefixes.items()}
    found = {part: index.first_level(prefix) for part, prefix in prefixes.items()}
    classes = sorted({name for labels in found.values() if labels for name in labels.classes}, key=str.encode)
    number_of = {name: number for number, name in enumerate(classes)}
    values = np.zeros(len(index), np.int64)
    for part, labels in found.items():
        if labels is None:
            return Arrangement(parts, None, None)
        numbers = np.array([number_of[name] for name in labels.classes], np.int64)
        values[parts[part].start : parts[part].stop] = numbers[labels.values]
    return Arrangement(parts, tuple(classes), values)


def warn_of_unused(folder: str, count: int, parts: Mapping[str, range]) -> None:
    """Log a warning of those of `count` images that are in none of the parts, if there are parts."""
    if parts and (unused := count - sum(map(len, parts.values()))):
        logger.warning(
            "%s: %d of %d images are in no folder of a part and are not used; move them into the folder of training "
            "images to use them",
            folder, unused, count,
        )  # fmt: skip


def _folders(index: FolderIndex) -> list[str]:
    """Return the names of the folders in the index's folder that hold images, in any depth."""
    folders, file = [], 0
    while file < len(index):
        folder, slash, _ = index.name(file).partition("/")
        if slash:
            folders.append(folder)
            file = index.below(f"{folder}/").stop
        else:
            file += 1
    return folders
