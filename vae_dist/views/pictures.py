"""Grids of images, with labels or a caption. N images, C, H, W image."""

import math
from collections.abc import Collection, Sequence

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from vae_dist.data.source import Source
from vae_dist.errors import UserError
from vae_dist.models.inputs import read_inputs
from vae_dist.models.vae import VAE
from vae_dist.plan import FIXED_SEED, Stream, standard_normal
from vae_dist.runs.picture import LABEL_SPACE, Picture, font_of, widest

PADDING = 2  # pixels between the images of a grid
BACKGROUND = 0.5  # of a grid
LABEL_SIZE = 12
COLUMN_GAP = 10
FEW = 8  # columns, or rows; with no more than these, images may be twice as large
SMALL = 56  # pixels; smaller images are enlarged by a whole factor
WIDEST = 1000  # pixels of a row of enlarged images
WIDEST_REDUCED = 2048  # pixels of the images of a row; larger ones are reduced by a whole factor
SMALLEST = 28  # pixels that the longer side of a reduced image has at least

MOST_CLASS_ROWS = 20  # of more classes, each image has its class below it
LONGEST_CLASS = 24  # characters of a class's name

MOST_PIXELS = 2**29  # of a picture; its numbers then take 2 GiB, three times that in colour

PROGRESS_COLUMNS = 8
PROGRESS_WIDTH = 1040  # pixels of a row of progress images; of larger images there are fewer


def grid(images: Tensor, columns: int) -> Image.Image:
    """Draw images `(N, C, H, W)` in [0, 1], C 1 or 3, in rows of `columns` images. Large ones are reduced."""
    images = _reduced(images, columns)
    count, channels, height, width = images.shape
    rows = -(-count // columns)
    require_pixels(rows * columns, height + PADDING, width + PADDING)
    canvas = torch.full((rows * columns, channels, height + PADDING, width + PADDING), BACKGROUND)
    canvas[:count, :, PADDING:, PADDING:] = images.detach().float().cpu()
    joined = canvas.view(rows, columns, channels, height + PADDING, width + PADDING).permute(0, 3, 1, 4, 2)
    picture = _to_picture(joined.reshape(rows * (height + PADDING), columns * (width + PADDING), channels))
    return _enlarged(picture, _scale(height, width, columns))


def labelled_grid(
    images: Tensor,
    columns: int,
    *,
    left: Sequence[str] = (),
    right: Sequence[str] = (),
    top: Sequence[str] = (),
    below: Sequence[str] = (),
    gaps: Collection[int] = (),
    most_rows: int | None = None,
) -> Image.Image:
    """Draw images `(N, C, H, W)` in [0, 1], C 1 or 3, in rows of `columns` images on white, with labels.

    `left` and `right` label the rows, `top` the columns, `below` the images. Each column in `gaps` has a gap before it.
    If columns are too narrow or rows too low for their labels, every n-th label is drawn. Large images are reduced. Few
    columns are drawn twice as large, unless there are more than `most_rows` rows.
    """
    images = _reduced(images, columns)
    count, channels, height, width = images.shape
    font = font_of([*left, *right, *top, *below], LABEL_SIZE)
    is_few = columns <= FEW and (most_rows is None or count <= columns * most_rows)
    scale = _scale(height, width, columns, 2 * SMALL if is_few else SMALL)
    margins = [widest(texts, font) + 2 * LABEL_SPACE if texts else PADDING for texts in (left, right)]
    column = max(width * scale, widest(below, font)) + PADDING
    row = height * scale + PADDING + (LABEL_SIZE + LABEL_SPACE) * bool(below)
    require_pixels(-(-count // columns) * columns, row, column)
    head = (LABEL_SIZE + LABEL_SPACE) * bool(top) + PADDING
    starts = [margins[0] + index * column + COLUMN_GAP * sum(gap <= index for gap in gaps) for index in range(columns)]
    end = starts[-1] + column
    result = Image.new("L" if channels == 1 else "RGB", (end + margins[1], head + row * -(-count // columns)), "white")
    draw = ImageDraw.Draw(result)
    for index, image in enumerate(images.detach().float().cpu()):
        x, y = starts[index % columns] + (column - width * scale) // 2, head + index // columns * row
        result.paste(_enlarged(_to_picture(image.permute(1, 2, 0)), scale), (x, y))
        if below:
            bottom = y + height * scale + LABEL_SPACE // 2
            draw.text((x + width * scale / 2, bottom), below[index], fill="black", font=font, anchor="ma")
    every = -(-LABEL_SIZE // row)
    for x, anchor, texts in (margins[0] - LABEL_SPACE, "rm", left), (end + LABEL_SPACE, "lm", right):
        for index, text in list(enumerate(texts))[::every]:
            draw.text((x, head + index * row + height * scale / 2), text, fill="black", font=font, anchor=anchor)
    every = -(-(widest(top, font) + LABEL_SPACE) // column)
    for x, text in list(zip(starts, top, strict=False))[::every]:
        draw.text((x + column / 2, LABEL_SPACE // 2), text, fill="black", font=font, anchor="ma")
    return result


def grid_by_class(images: Tensor, names: Sequence[str]) -> Image.Image:
    """Draw images `(N, C, H, W)` of classes in turn: image i is of the class `names[i % len(names)]`.

    A class has a row, with its name on the left, or all rows if it is the only one; above MOST_CLASS_ROWS classes, an
    image has its class below it.
    """
    names = [name if len(name) <= LONGEST_CLASS else f"{name[:LONGEST_CLASS]}..." for name in names[: len(images)]]
    if len(names) > MOST_CLASS_ROWS:
        below = [names[index % len(names)] for index in range(len(images))]
        return labelled_grid(images, math.ceil(math.sqrt(len(images))), below=below)
    if len(names) == 1:
        columns = math.ceil(math.sqrt(len(images)))
        return labelled_grid(images, columns, left=[*names, *[""] * (-(-len(images) // columns) - 1)])
    columns = -(-len(images) // len(names))
    blank = images.new_ones(columns * len(names) - len(images), *images.shape[1:])
    rows = torch.cat([images, blank]).unflatten(0, (columns, len(names))).transpose(0, 1)
    return labelled_grid(rows.flatten(0, 1), columns, left=names, most_rows=FEW)


def require_pixels(count: int, height: int, width: int) -> None:
    """Raise UserError if a picture of `count` images, also empty ones, would have more than MOST_PIXELS."""
    if (pixels := count * height * width) > MOST_PIXELS:
        raise UserError(
            f"a picture with room for {count:,} images would have {pixels:,} pixels, and {MOST_PIXELS:,} are the most: "
            "draw fewer images, or fewer columns"
        )


def require_drawable(count: int, image_shape: Sequence[int]) -> None:
    """Raise UserError if a picture of images of this shape is too large, however far they are reduced."""
    height, width = image_shape[1:]
    factor = max(max(height, width) // SMALLEST, 1)
    require_pixels(count, -(-height // factor), -(-width // factor))


def _scale(height: int, width: int, columns: int, small: int = SMALL) -> int:
    """Return the whole factor that enlarges small images as far as the width of a row allows."""
    return max(1, min(-(-small // max(height, width)), WIDEST // (columns * (width + PADDING))))


def _reduced(images: Tensor, columns: int) -> Tensor:
    """Average squares of pixels, so that a row of images `(N, C, H, W)` is not too wide to look at."""
    height, width = images.shape[2:]
    factor = min(-(-columns * width // WIDEST_REDUCED), max(height, width) // SMALLEST)
    return F.avg_pool2d(images.float(), factor, ceil_mode=True) if factor > 1 else images


def _to_picture(pixels: Tensor) -> Image.Image:
    """Convert pixels `(H, W, C)` in [0, 1], C 1 or 3."""
    array = pixels.mul(255).round().to(torch.uint8).numpy()
    return Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)


def _enlarged(picture: Image.Image, scale: int) -> Image.Image:
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def reconstructions(vae: VAE, source: Source, subject: str) -> Picture:
    """Draw rows of the first images of a source, each over a row of their reconstructions."""
    columns = _progress_columns(source.info.image_shape[2])
    count = min(max(columns * columns // 2, columns), source.info.count)
    originals, labels = read_inputs(vae, source, range(count))
    with torch.inference_mode():
        decoded = vae.decode(vae.infer(originals, labels).mean, labels=labels).mean
    return over_reconstructions(originals, decoded, subject)


def over_reconstructions(originals: Tensor, decoded: Tensor, subject: str) -> Picture:
    """Draw rows of images `(N, C, H, W)`, each over a row of their reconstructions `(N, C, H, W)`, all in [0, 1]."""
    columns = min(_progress_columns(originals.shape[3]), len(originals))
    rows = zip(_in_whole_rows(originals, columns), _in_whole_rows(decoded, columns), strict=True)
    caption = f"{subject}; each row over its reconstruction from the posterior's mean"
    return Picture(grid(torch.cat([part for pair in rows for part in pair]), columns), caption)


def _in_whole_rows(images: Tensor, columns: int) -> Sequence[Tensor]:
    """Cut images `(N, C, H, W)` into rows of `columns`, the last one filled up with the grey between images."""
    blank = images.new_full((-len(images) % columns, *images.shape[1:]), BACKGROUND)
    return torch.cat([images, blank]).split(columns)


def samples(vae: VAE, subject: str, classes: Sequence[str] = ()) -> Picture:
    """Draw decoded samples from the prior, the same latents at every step and in every run.

    `classes` are the names of a conditional model's classes; its samples are of all of them in turn.
    """
    columns = _progress_columns(vae.image_shape[2])
    count = columns * (vae.classes if 0 < vae.classes <= MOST_CLASS_ROWS else columns)
    labels = torch.arange(count, device=vae.device) % vae.classes if vae.classes else None
    noise = standard_normal(FIXED_SEED, Stream.PRIOR, 0, range(count), vae.prior_numbers)
    with torch.inference_mode():
        decoded = vae.decode(vae.prior(noise.to(vae.device, vae.dtype)), labels=labels).mean
    if vae.classes:
        return Picture(
            grid_by_class(decoded, classes), f"{subject}; samples by class from the prior (means of p(x|z,y))"
        )
    return Picture(grid(decoded, columns), f"{subject}; samples from the prior (means of p(x|z))")


def _progress_columns(width: int) -> int:
    """The columns of a picture that is drawn during training: 8, or for wide images 4, 2 or 1."""
    columns = PROGRESS_COLUMNS
    while columns > 1 and columns * (width + PADDING) > PROGRESS_WIDTH:
        columns //= 2
    return columns
