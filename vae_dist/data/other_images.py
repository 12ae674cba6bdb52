"""Images of the user's own that a run reads without having been trained on their set."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from vae_dist.config import DataConfig
from vae_dist.data import arrays, folder
from vae_dist.data.binarization import binarize_once
from vae_dist.data.source import Source
from vae_dist.errors import UserError

# Kind of a set -> all its images at a path, in the shape of the config's.
ALL_IMAGES: dict[str, Callable[[DataConfig, str], Source]] = {
    "array": arrays.all_images,
    "folder": folder.all_images,
}


def load(config: DataConfig, path: str, key: str = "evaluate.folder") -> Source:
    """Return all images of a folder or an array of the user's own, processed like the test images of the config.

    The config has the image shape of a run. Raises UserError if these images can't have it; `key` gave the path.
    """
    if not os.path.lexists(path):
        raise UserError(f"{key}={path} does not exist; give a folder, a packed one or an array")
    channels, height, width = config.image_shape or (0, 0, 0)
    name = "array" if arrays.is_array(Path(path)) else "folder"
    if channels not in (1, 3) or (name == "folder" and height != width):
        raise UserError(
            f"the run's images are {config.image_shape}, and those of a folder are square, grey or colour; give an "
            "array"
        )
    own = replace(config, name=name, path=path, size=height if name == "folder" else None, channels=channels)
    source = ALL_IMAGES[name](own, path)
    if source.info.image_shape != (channels, height, width):
        raise UserError(
            f"the images of {path} are {list(source.info.image_shape)}, but the run's are {config.image_shape} "
            "(channels, height, width): resize them"
        )
    return binarize_once(source, config, step=1)
