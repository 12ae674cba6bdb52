"""Pictures: grids of images with a caption. N images, L latents, C, H, W image."""

from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from vae_dist.data import to_unit
from vae_dist.model.vae import VAE
from vae_dist.plan import FIXED_SEED, Stream, standard_normal

PADDING = 2  # pixels between the images of a grid
CAPTION_SIZE = 13
SMALL = 56  # images smaller than this are enlarged by a whole factor, or one could not see them

PROGRESS_COLUMNS = 8
PROGRESS_IMAGES = 64


class Picture(NamedTuple):
    """An image for people, and what it shows."""

    image: Image.Image
    caption: str


def grid(images: Tensor, columns: int) -> Image.Image:
    """Images `(N, C, H, W)` in [0, 1], C 1 or 3, as rows of `columns` images."""
    count, channels, height, width = images.shape
    rows = -(-count // columns)
    canvas = torch.full((rows * columns, channels, height + PADDING, width + PADDING), 0.5)
    canvas[:count, :, PADDING:, PADDING:] = images.detach().float().cpu()
    joined = canvas.view(rows, columns, channels, height + PADDING, width + PADDING).permute(0, 3, 1, 4, 2)
    pixels = joined.reshape(rows * (height + PADDING), columns * (width + PADDING), channels)
    array = pixels.mul(255).round().to(torch.uint8).numpy()
    picture = Image.fromarray(array[:, :, 0] if channels == 1 else array)
    scale = max(1, -(-SMALL // height))
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def with_caption(picture: Picture) -> Image.Image:
    """The picture with its caption in a strip below, broken into lines that fit."""
    font = ImageFont.load_default(size=CAPTION_SIZE)
    lines, line = [], ""
    for word in picture.caption.split():
        longer = f"{line} {word}".strip()
        if line and font.getlength(longer) > picture.image.width - 2 * PADDING:
            lines.append(line)
            longer = word
        line = longer
    text = "\n".join([*lines, line])
    strip = (CAPTION_SIZE + 6) * (len(lines) + 1) + PADDING
    result = Image.new("RGB", (picture.image.width, picture.image.height + strip), "white")
    result.paste(picture.image, (0, 0))
    ImageDraw.Draw(result).multiline_text((PADDING, picture.image.height + PADDING), text, fill="black", font=font)
    return result


def reconstructions(vae: VAE, pixels: Tensor, subject: str) -> Picture:
    """Rows of images `(N, C, H, W)` uint8, each over a row of their reconstructions."""
    device = next(vae.parameters()).device
    originals = to_unit(pixels[: PROGRESS_IMAGES // 2].to(device), next(vae.parameters()).dtype)
    with torch.inference_mode():
        decoded = vae.decode(vae.encode(originals).mean).mean
    pairs = zip(originals.split(PROGRESS_COLUMNS), decoded.split(PROGRESS_COLUMNS), strict=True)
    rows = [torch.cat(pair) for pair in pairs]
    caption = f"{subject}; each row over its reconstruction from the posterior's mean"
    return Picture(grid(torch.cat(rows), min(PROGRESS_COLUMNS, len(originals))), caption)


def samples(vae: VAE, subject: str) -> Picture:
    """Decoded draws from the prior, the same latents at every step and in every run."""
    parameter = next(vae.parameters())
    latents = standard_normal(FIXED_SEED, Stream.PRIOR, 0, range(PROGRESS_IMAGES), vae.latent_dim)
    with torch.inference_mode():
        decoded = vae.decode(latents.to(parameter.device, parameter.dtype)).mean
    return Picture(grid(decoded, PROGRESS_COLUMNS), f"{subject}; samples from the prior (means of p(x|z))")
