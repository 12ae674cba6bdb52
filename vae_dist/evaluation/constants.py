"""Grids and borders that an autoencoder adds to images of one colour. N images, C, H, W image, f pixels of a period.

Strided and transposed convolutions leave patterns with the period of a latent, and the padding of convolutions leaves
borders (Odena, Dumoulin and Olah 2016, "Deconvolution and checkerboard artifacts"). In images of one colour nothing
hides them.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from vae_dist.config import Config
from vae_dist.distributed.world import World
from vae_dist.models.labels import in_turn
from vae_dist.models.vae import VAE

LEVELS = (0, 32, 64, 96, 128, 160, 192, 224, 255)
PRIMARIES = ((255, 0, 0), (0, 255, 0), (0, 0, 255))
LEAST_LATENTS = 4  # along a side of the image: the centre is half of them, and the border at least one


class Artefacts(NamedTuple):
    """What decoded images of one colour have beside a colour: `(N,)` each, float64, 8-bit levels."""

    grid: Tensor
    border: Tensor


def period(vae: VAE) -> int | None:
    """Return the side in pixels of the square that a latent stands for, f.

    None if latents do not lie on a grid, if they stand for one pixel each, or if fewer than LEAST_LATENTS lie along a
    side of the image.
    """
    _, height, width = vae.image_shape
    _, *sides = vae.latent_shapes(vae.image_shape)[0]
    if len(sides) != 2 or min(sides) < LEAST_LATENTS:
        return None
    pixels = height // sides[0]
    return pixels if pixels > 1 and [height, width] == [pixels * side for side in sides] else None


def protocol(vae: VAE, config: Config) -> dict[str, str]:
    """Return the conditions of `constant_grid` and `constant_border`; empty for a model that has none."""
    if (pixels := period(vae)) is None:
        return {}
    images = constant_images(vae.image_shape, config.data.binarization)
    return {
        "constant_images": f"{len(images)}, decoded from the posterior mean, not rounded; period {pixels} pixels"
        + ("; of the classes in turn" if vae.classes else "")
    }


def constant_images(image_shape: tuple[int, ...], binarization: str) -> Tensor:
    """Return the images of one colour that are decoded: `(N, C, H, W)`, uint8.

    Nine grey levels, of colour images red, green and blue too; of binarised images black and white
    alone.
    """
    channels, *sides = image_shape
    levels = LEVELS if binarization == "none" else (0, 255)
    colours = [(level,) * channels for level in levels] + (list(PRIMARIES) if channels == 3 else [])
    return torch.tensor(colours, dtype=torch.uint8).view(-1, channels, 1, 1).repeat(1, 1, *sides)


def measure(vae: VAE, world: World, config: Config) -> dict[str, Tensor]:
    """Return `constant_grid` and `constant_border` of images of one colour: `(N,)` each, float64, 8-bit levels.

    Empty for a model that has none. Every process calls this.
    """
    if (pixels := period(vae)) is None:
        return {}
    images = constant_images(vae.image_shape, config.data.binarization)
    chunks = world.chunks(len(images), config.evaluate.images_at_once(vae.image_shape))
    values = []
    with torch.inference_mode():
        for chunk in chunks:
            labels = in_turn(vae.classes, chunk, vae.device)
            means = vae.infer(vae.to_input(images[chunk.start : chunk.stop]), labels).mean
            decoded = vae.decode(means, labels=labels).mean
            values.append(torch.stack(artefacts(255 * decoded.cpu().double(), pixels), 1))
    grid, border = world.gather_rows(chunks, values, len(images)).unbind(1)
    return {"constant_grid": grid, "constant_border": border}


def artefacts(decoded: Tensor, period: int) -> Artefacts:
    """Return the grid and the border of images `(N, C, H, W)` in 8-bit levels, which should each have one colour.

    The centre is half of the squares of f x f pixels in each direction (or one more), and p(c, i, j) is their mean.
    The grid is the root mean square of p(c, i, j) - mean of p(c). By Parseval's theorem it is the root of the centre's
    power at the frequencies of the periods f, f/2, f/3 and so on, horizontal and vertical, without the constant term:
    a for a checkerboard of +a and -a. The border is the deviation of the image from p continued over the whole image,
    as the root mean square along a line of pixels, at its largest among the f lines next to each side.
    """
    squares = decoded.unflatten(3, (-1, period)).unflatten(2, (-1, period))  # (N, C, H/f, f, W/f, f)
    rows, columns = squares.shape[2], squares.shape[4]
    centre = squares[:, :, rows // 4 : rows - rows // 4, :, columns // 4 : columns - columns // 4]
    pattern = centre.mean((2, 4), keepdim=True)
    grid = (pattern - pattern.mean((3, 5), keepdim=True)).square().flatten(1).mean(1).sqrt()
    deviation = (squares - pattern).square().mean(1).flatten(3, 4).flatten(1, 2)  # (N, H, W)
    lines = torch.cat(
        [part for means in (deviation.mean(2), deviation.mean(1)) for part in (means[:, :period], means[:, -period:])],
        1,
    )
    return Artefacts(grid, lines.amax(1).sqrt())
