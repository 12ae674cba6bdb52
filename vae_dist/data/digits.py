"""Grey images of digits in the format of MNIST, drawn from Pillow's built-in font: the data set if MNIST is missing.

A hundred or so masks (digit, stroke, blur) are rendered once. Image r is one of them under a smooth warp; mask and warp
come from the random bits of row r. The arithmetic makes the pixels depend on nothing else: not on other rows,
on the block that r falls into, or on the number of threads.
"""

from functools import cache
from itertools import product

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont, features
from PIL import __version__ as pillow_version
from torch import Tensor
from torch.nn.functional import grid_sample

from vae_dist.plan import FIXED_SEED, Stream, uniform_bits

_DRAWING = 1  # counts the changes to this file that change pixels

_SIDE = 28
_CLASSES = 10
_BLOCK = 512  # images drawn at once, to bound the memory

# The font is drawn on a canvas of 8 x 8 points per pixel, which is blurred and reduced to a mask of 2 x 2.
_CANVAS_SCALE = 8
_MASK_SCALE = 2
_FONT_SIZE = 192  # in canvas points: a digit is then some 18 pixels high
_STROKES = (0, 1, 3, 5)  # canvas points added on either side of the font's own stroke
_BLURS = (2.5, 3.5, 4.5)  # standard deviations in canvas points; much less and strokes would alias
_GAIN = 1.15  # restores the brightness that the blur takes from thin strokes: nearly every image reaches white

# The warp maps each pixel to the point of the mask that it shows; both are (x, y) in (-1, 1). Each coordinate of the
# point is a sum over the terms of `_basis`, with coefficients uniform in centre +- spread.
#                       1     x     y    sin y  cos y  sin x  cos x
_CENTRE = np.array([[0.00, 0.95, 0.10, 0.000, 0.000, 0.000, 0.000],
                    [0.00, 0.00, 1.03, 0.000, 0.000, 0.000, 0.000]])  # fmt: skip
_SPREAD = np.array([[0.05, 0.16, 0.20, 0.070, 0.070, 0.040, 0.040],
                    [0.05, 0.20, 0.10, 0.040, 0.040, 0.060, 0.060]])  # fmt: skip
_WAVE = 5.0  # radians per unit of x or y: a digit is about one wave high


def drawing_version() -> str:
    """Return the versions that the pixels depend on, as a part of a file name."""
    freetype = features.version("freetype2")
    return f"digits{_DRAWING}-pillow{pillow_version}-freetype{freetype}-torch{torch.__version__}"


def draw_digits(rows: range) -> tuple[Tensor, Tensor]:
    """Draw images `(len(rows), 1, 28, 28)` uint8 and labels `(len(rows),)` int64; row r is the same in every range.

    `rows` is contiguous. The caller chooses the rows for training and for testing: all have the same distribution.
    """
    images = torch.empty(len(rows), 1, _SIDE, _SIDE, dtype=torch.uint8)
    labels = torch.empty(len(rows), dtype=torch.int64)
    for start in range(0, len(rows), _BLOCK):
        block = slice(start, start + _BLOCK)
        images[block], labels[block] = _draw_block(rows[block])
    return images, labels


def _draw_block(rows: range) -> tuple[Tensor, Tensor]:
    """Draw one block of rows, as `draw_digits` returns them."""
    bits = uniform_bits(FIXED_SEED, Stream.DIGITS, 0, rows, 1 + _CENTRE.size)
    masks = _masks()
    chosen = torch.from_numpy(bits[:, 0] % len(masks)).long()
    grid = _warp(bits[:, 1:])
    images = grid_sample(masks[chosen], grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return images.mul_(_GAIN).add_(0.5).clamp_(max=255).to(torch.uint8), chosen % _CLASSES


def _warp(bits: npt.NDArray[np.uint32]) -> Tensor:
    """Return the point of the mask that each pixel shows, `(B, 28, 28, 2)` float32, from random bits `(B, 14)`."""
    uniform = (bits + 0.5) * 2.0**-31 - 1
    coefficients = _CENTRE + _SPREAD * uniform.reshape(-1, *_CENTRE.shape)
    coefficients[:, 0, 2] -= coefficients[:, 1, 1]  # a rotation: x moves against y
    points = torch.from_numpy(_exact(coefficients)) @ _basis()
    return points.float().view(-1, 2, _SIDE, _SIDE).permute(0, 2, 3, 1)


def _exact(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Round to multiples of 2^-20: products and sums are then exact in float64, in any order of summation."""
    return np.round(values * 2.0**20) * 2.0**-20


@cache
def _basis() -> Tensor:
    """Evaluate the terms of the warp at every pixel, `(7, 784)` float64."""
    centres = (np.arange(_SIDE) + 0.5) * (2 / _SIDE) - 1
    y, x = (axis.ravel() for axis in np.meshgrid(centres, centres, indexing="ij"))
    waves = [wave(_WAVE * axis) for axis in (y, x) for wave in (np.sin, np.cos)]
    return torch.from_numpy(_exact(np.stack([np.ones_like(x), x, y, *waves])))


@cache
def _masks() -> Tensor:
    """Render every digit in every style, `(120, 1, 56, 56)` float32 from 0 to 255; mask m shows the digit m % 10."""
    styles = product(_STROKES, _BLURS, range(_CLASSES))
    pixels = np.stack([np.asarray(_mask(digit, stroke, blur)) for stroke, blur, digit in styles])
    return torch.from_numpy(pixels).unsqueeze(1).float()


def _mask(digit: int, stroke: int, blur: float) -> Image.Image:
    """Render a digit, white on black, its bounding box in the middle."""
    canvas = Image.new("L", (2 * _FONT_SIZE, 2 * _FONT_SIZE))
    middle, half = (_FONT_SIZE, _FONT_SIZE), _SIDE * _CANVAS_SCALE // 2
    font = ImageFont.load_default(_FONT_SIZE)
    ImageDraw.Draw(canvas).text(middle, str(digit), fill=255, font=font, anchor="mm", stroke_width=stroke)
    left, top, right, bottom = canvas.getbbox() or (0, 0, *canvas.size)
    x, y = (left + right) // 2, (top + bottom) // 2
    centred = canvas.crop((x - half, y - half, x + half, y + half))
    return centred.filter(ImageFilter.GaussianBlur(blur)).reduce(_CANVAS_SCALE // _MASK_SCALE)
