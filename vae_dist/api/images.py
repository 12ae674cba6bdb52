"""A caller's images and labels as the inputs of a model. N images, C, H, W image."""

import math
import operator
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vae_dist.config import DataConfig
from vae_dist.config.text import truncate
from vae_dist.data import pixels
from vae_dist.data.binarization import TEST_STEP, cut_pixels
from vae_dist.errors import UserError
from vae_dist.models.tensors import to_unit
from vae_dist.models.vae import VAE
from vae_dist.plan import FIXED_SEED, bernoulli_pixels

ROUNDING = 1e-6  # by which numbers may leave [0, 1]; they are clamped


def to_images(images: Any, vae: VAE, data: DataConfig) -> Tensor:
    """Convert images to `(N, C, H, W)` in [0, 1], on the model's device and in its type.

    Images are one or a list of: a PIL image; the path of an image file, which is cropped and resized as the images of
    a folder are; an array or a tensor, uint8 or in [0, 1], `(H, W)`, `(C, H, W)` or `(H, W, C)`, or N of them. All have
    the model's number of channels, except files and PIL images, which are converted. For a run on binary images, they
    are binarised as its test images are: grey levels are cut, or drawn with the same random numbers. Raises UserError.
    """
    unit = to_unit_images(images, vae, data)
    try:
        vae.latent_shapes(tuple(unit.shape[1:]))
    except ValueError as error:
        raise UserError(str(error)) from error
    if data.binarization == "none":
        return unit
    grey = (unit * 255).round().to(torch.uint8)
    if data.binarization == "threshold":
        grey = cut_pixels(grey)
    else:
        grey = bernoulli_pixels(grey.cpu(), FIXED_SEED, TEST_STEP, range(len(grey)))
    return vae.to_input(grey)


def to_unit_images(images: Any, vae: VAE, data: DataConfig) -> Tensor:
    """Convert images as `to_images` does, but to any size and without binarising them."""
    parts = [_converted(image, vae, data) for image in (images if isinstance(images, list | tuple) else [images])]
    sizes = sorted({tuple(part.shape[2:]) for part in parts})
    if len(sizes) > 1:
        raise UserError(f"the images have different sizes, {_text(sizes)}: give images of one size at a time")
    if sum(map(len, parts)) == 0:
        raise UserError("there are no images: give at least one")
    return torch.cat(parts)


def to_labels(labels: Any, count: int, vae: VAE, classes: Sequence[str]) -> Tensor | None:
    """Convert the classes of `count` images to labels `(count,)` int64 on the model's device.

    They are names or numbers of classes, one for all images or one for each; or weights of all classes
    `(count, classes)`, whose embeddings are averaged. None if the model is not conditional. Raises UserError.
    """
    if not vae.classes:
        if labels is not None:
            raise UserError("this model is not conditional: leave out labels")
        return None
    if labels is None:
        raise UserError(f"this model is conditional: give labels, of the classes {_text(classes)}")
    if isinstance(labels, np.ndarray) and labels.dtype.kind not in "buif":  # of names
        labels = labels.flatten().tolist()
    if isinstance(labels, Tensor | np.ndarray):
        labels = labels if isinstance(labels, Tensor) else _tensor(labels, "labels")
        if labels.is_floating_point():
            if labels.shape != (count, vae.classes):
                raise UserError(f"weights of classes must be {(count, vae.classes)}, not {tuple(labels.shape)}")
            if not labels.isfinite().all():
                raise UserError("the weights of classes have numbers that are not finite")
            return labels.to(vae.device)
        labels = labels.flatten().tolist()
    given = list(labels) if isinstance(labels, Iterable) and not isinstance(labels, str) else [labels]
    if len(given) not in (1, count):
        raise UserError(f"there are {len(given)} labels for {count} images: give one, or one for each")
    numbers = torch.tensor([_class(label, classes) for label in given])
    return numbers.expand(count).to(vae.device)


def _class(label: Any, classes: Sequence[str]) -> int:
    if isinstance(label, str) and label in classes:
        return list(classes).index(label)
    try:
        number = operator.index(label)
    except TypeError:
        number = -1
    if not 0 <= number < len(classes):
        raise UserError(f"{truncate(repr(label))} is no class: the {len(classes)} classes are {_text(classes)}")
    return number


def _converted(image: Any, vae: VAE, data: DataConfig) -> Tensor:
    """Convert one image, or a batch in an array or a tensor: `(n, C, H, W)` in [0, 1]."""
    channels, height, width = vae.image_shape
    if isinstance(image, str | Path):
        if height != width:
            raise UserError(f"image files are cropped to squares, but this model has {height} x {width}: open them")
        if not Path(image).is_file():
            raise UserError(f"there is no image file {truncate(str(image))}")
        rule = pixels.Rule(height, channels, data.resize, data.background)
        try:
            image = pixels.decode(Path(image), rule)
        except pixels.DamagedError as error:
            raise UserError(f"can't use {truncate(str(image))} as an image: {error}") from error
    elif isinstance(image, Image.Image):
        image = pixels.of_image(image, channels, data.background)
    if hasattr(image, "__array__") and not isinstance(image, Tensor):
        image = _tensor(np.asarray(image), "images")
    if not isinstance(image, Tensor):
        raise UserError(
            f"can't use {truncate(type(image).__name__)} as an image: give a PIL image, a file's path, an array, a "
            "tensor, or a list of these"
        )
    return _unit(_batch(image, vae.image_shape).detach(), vae)


def _tensor(array: np.ndarray, name: str) -> Tensor:
    """Copy an array of real numbers of any byte order. Raises UserError for a type that torch has not."""
    try:
        if array.dtype.kind in "buif":
            return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("=")))
    except TypeError:  # such as for longdouble
        pass
    raise UserError(f"{name} can't have the type {truncate(str(array.dtype))}: convert them to integers or float32")


def _batch(image: Tensor, image_shape: tuple[int, ...]) -> Tensor:
    """Return images as `(n, C, H, W)`, in the layout that fits the model's channels, or its whole shape if several do.

    Raises UserError if none does, and for images without pixels.
    """
    channels, shape = image_shape[0], image.shape
    readings = []
    if image.ndim == 2 and channels == 1:
        readings += [image[None, None]]
    if image.ndim == 3:
        readings += [image[None]] * (shape[0] == channels) + [image.permute(2, 0, 1)[None]] * (shape[2] == channels)
        readings += [image[:, None]] * (channels == 1)
    if image.ndim == 4:
        readings += [image] * (shape[1] == channels) + [image.permute(0, 3, 1, 2)] * (shape[3] == channels)
    fitting = [reading for reading in readings if reading.shape[1:] == image_shape]
    if not readings:
        layouts = "(H, W), (N, H, W), (N, 1, H, W)" if channels == 1 else "(3, H, W), (H, W, 3), (N, 3, H, W)"
        raise UserError(f"this model takes images {layouts}, such as {image_shape}, not {tuple(shape)}")
    batch = (fitting or readings)[0]
    if 0 in batch.shape[1:]:
        raise UserError(f"images of {tuple(shape)} have no pixels: give images of at least 1 x 1")
    return batch


def _unit(images: Tensor, vae: VAE) -> Tensor:
    """Return images in [0, 1]. Raises UserError for other numbers."""
    if images.dtype in (torch.uint8, torch.bool):
        grey = images if images.dtype == torch.uint8 else images.to(torch.uint8) * 255
        return to_unit(grey.to(vae.device), vae.dtype)
    if not images.is_floating_point():
        raise UserError(f"images are uint8 from 0 to 255, or floats from 0 to 1, not {images.dtype}: convert them")
    if images.numel() and not (-ROUNDING <= images.min() <= images.max() <= 1 + ROUNDING):  # also if one is NaN
        low, high = images.min().item(), images.max().item()
        if not (math.isfinite(low) and math.isfinite(high)):
            raise UserError("the images have numbers that are not finite")
        advice = "divide them by 255" if high > 2 else "use (images + 1) / 2 if they are from -1 to 1"
        raise UserError(f"floats must be from 0 to 1, and these are from {low:.4g} to {high:.4g}: {advice}")
    return images.to(vae.device, vae.dtype).clamp(0, 1)


def _text(values: Sequence[object]) -> str:
    return truncate(", ".join(map(str, values)))
