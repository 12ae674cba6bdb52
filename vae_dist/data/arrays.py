"""The user's own images in arrays: `data.name=array`."""

import hashlib
import logging
from dataclasses import replace
from pathlib import Path
from typing import Literal

from vae_dist.config import DataConfig, expand
from vae_dist.data.arrangement import PARTS
from vae_dist.data.array_files import SUFFIXES, refusing
from vae_dist.data.array_images import MappedArray, open_images
from vae_dist.data.source import Source
from vae_dist.data.splits import with_test_part
from vae_dist.errors import UserError

logger = logging.getLogger(__name__)


def load(config: DataConfig, part: Literal["train", "test"]) -> Source:
    """Return the training or the test images of the arrays in `data.path`. Raises UserError.

    Images of a training part without a test part are held out as test images. Validation images are left among the
    training images.
    """
    parts = _open_parts(config)
    return with_test_part(parts["train"], parts.get("test"), config)[0 if part == "train" else 1]


def load_validation(config: DataConfig) -> Source | None:
    """Return the validation images of `data.path`; None if they have no file. Raises UserError."""
    return _open_parts(config).get("validation")


def all_images(config: DataConfig) -> Source:
    """Return all images of the one array in `data.path`. Raises UserError."""
    return open_images(Path(expand(config.path or "")), config)


def is_array(path: Path) -> bool:
    """Return whether a path is that of an array, by its name."""
    return path.suffix.lower() in SUFFIXES


def _open_parts(config: DataConfig) -> dict[str, Source]:
    """Return the sources of the parts that have a file; that of a single file is "train"."""
    path = Path(expand(config.path or "", "data.path"))
    paths = _paths_of_parts(path) if path.is_dir() else {"train": path}
    sources = {part: open_images(file, config) for part, file in paths.items()}
    shape = sources["train"].info.image_shape
    for part, source in sources.items():
        if source.info.image_shape != shape:
            raise UserError(f"{paths[part]} has images {source.info.image_shape}, but {paths['train']} has {shape}")
    counts = [source.info.classes for source in sources.values()]
    labelled = [count for count in counts if count is not None]
    if 0 < len(labelled) < len(counts):
        logger.warning("%s: the labels are not used, as %d parts have none", path, len(counts) - len(labelled))
    classes = max(labelled) if len(labelled) == len(counts) else None
    return {part: _with_classes(source, classes) for part, source in sources.items()}


def _paths_of_parts(folder: Path) -> dict[str, Path]:
    with refusing(folder):
        present = {path for path in folder.iterdir() if path.suffix in SUFFIXES}
    paths = {}
    for part in dict.fromkeys(PARTS.values()):
        found = sorted(path for path in present if PARTS.get(path.stem) == part)
        if len(found) > 1:
            raise UserError(f"{folder} has several arrays of {part} images, {', '.join(map(str, found))}; keep one")
        if found:
            paths[part] = found[0]
    if "train" not in paths:
        raise UserError(
            f"{folder} has no train{', train'.join(SUFFIXES)}; give the path of one array, or name the parts train, "
            "validation and test"
        )
    return paths


def _with_classes(source: MappedArray, classes: int | None) -> MappedArray:
    """Return the source with labels of `classes` classes; without labels for None."""
    if classes == source.info.classes:
        return source
    identity = hashlib.sha256(f"{source.info.identity}; {classes} classes".encode()).hexdigest()
    return source.relabelled(replace(source.info, classes=classes, identity=identity))
