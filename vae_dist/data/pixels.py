"""Pixels of image files: the one definition of the array that a JPEG, PNG, WebP or AVIF file becomes.

Pillow decodes. The EXIF orientation is applied, 16 bits become the upper 8, transparent pixels show a background, CMYK
is converted, ICC profiles are ignored, and the first frame of an animation is the image. The result does not depend on
the number of threads that decode. A JPEG whose bytes have changed inside decodes to other pixels: it has no checksum.
"""

from io import BytesIO
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageColor, ImageFile
from PIL.Image import Resampling, Transpose

from vae_dist import files
from vae_dist.data.image_files import MAX_BYTES, MAX_PIXELS, DamagedError, Header, explained, header, open_image
from vae_dist.errors import UserError

__all__ = ["DamagedError", "Header", "Rule", "colour", "decode", "decode_bytes", "header"]

Resize = Literal["adm", "lanczos", "bicubic", "bilinear"]

MAX_ASPECT = 16  # of long side to short side, if the image would have more than MAX_PIXELS before it is cropped

_FILTERS = {"lanczos": Resampling.LANCZOS, "bicubic": Resampling.BICUBIC, "bilinear": Resampling.BILINEAR}

_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "I;16", "I;16B", "I;16L", "I;16N")

_TRANSPOSES = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}


class Rule(NamedTuple):
    """How an image becomes an array of `channels` (1 or 3) by `size` by `size`.

    `resize` is `adm`, the rule of Dhariwal and Nichol (2021), "Diffusion Models Beat GANs on Image Synthesis": halve by
    a box filter while the short side has at least 2 `size`, resize the short side to `size` (bicubic), crop the centre.
    The others crop the centre square first and resize it once, antialiased. Small images are enlarged.
    """

    size: int
    channels: int = 3
    resize: Resize = "adm"
    background: str = "white"

    @property
    def shape(self) -> tuple[int, int, int]:
        """C, H, W of the images."""
        return self.channels, self.size, self.size

    @property
    def text(self) -> str:
        """The rule in one line. Rules of equal text give equal pixels. Raises UserError as `colour` does."""
        colours = "grey" if self.channels == 1 else "colour"
        background = "#{:02x}{:02x}{:02x}".format(*colour(self.background))
        return f"{self.size} x {self.size} {colours}, {self.resize}, background {background}"


def colour(name: str) -> tuple[int, int, int]:
    """Return red, green and blue, 0 to 255, of a colour that Pillow knows by name, or of #rrggbb. Raises UserError."""
    try:
        red, green, blue = ImageColor.getrgb(name)[:3]
    except ValueError as error:
        raise UserError(
            f"data.background={name[:40]!a} is no colour; give a name, such as white, or #rrggbb"
        ) from error
    return red, green, blue


def decode(path: Path, rule: Rule) -> NDArray[np.uint8]:
    """Return a file's pixels `(C, size, size)`. Raises DamagedError, and UserError if the system fails to read it."""
    with explained(path):
        content = files.read_bounded(path, MAX_BYTES, follow=False)
    return decode_bytes(content, rule)


def decode_bytes(content: bytes, rule: Rule) -> NDArray[np.uint8]:
    """Return the pixels `(C, size, size)` of a file's content. Raises DamagedError.

    Raises UserError while PIL.ImageFile.LOAD_TRUNCATED_IMAGES is set: Pillow would fill what a file lacks with grey.
    """
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise UserError(
            "PIL.ImageFile.LOAD_TRUNCATED_IMAGES is set, with which files that are cut off pass for whole; set it to "
            "False"
        )
    background = colour(rule.background)
    with explained():
        image = open_image(BytesIO(content))
        layout = str(image.tile[0][3]) if image.tile else ""  # the samples in the file; load() forgets it
        image.load()
        square = _square(_upright(image, layout, background, rule.channels), rule)
    return _to_array(square)


def of_image(image: Image.Image, channels: int, background: str) -> NDArray[np.uint8]:
    """Return the pixels `(channels, H, W)` of an image in memory, of its own size. Raises UserError.

    They are those of `decode_bytes`, before it crops and resizes.
    """
    if image.mode not in _MODES:
        raise UserError(f"a PIL image of mode {image.mode} has no fixed range: convert it to L or RGB")
    # A copy: the caller's own stays as it is.
    return _to_array(_upright(image.copy(), "", colour(background), channels))


def _upright(image: Image.Image, layout: str, background: tuple[int, int, int], channels: int) -> Image.Image:
    """Return the image in mode L or RGB, as it is to be looked at."""
    opaque = _opaque(image, layout, background)
    if (orientation := _orientation(image)) in _TRANSPOSES:
        opaque = opaque.transpose(_TRANSPOSES[orientation])
    return _as(opaque, "L" if channels == 1 else "RGB")


def _to_array(image: Image.Image) -> NDArray[np.uint8]:
    pixels = np.asarray(image)
    return np.ascontiguousarray(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))


def _opaque(image: Image.Image, layout: str, background: tuple[int, int, int]) -> Image.Image:
    """Return the image in mode L or RGB, over the background."""
    transparent: Any = image.info.pop("transparency", None)
    if image.mode == "P" and isinstance(transparent, int | bytes):
        image.info["transparency"] = transparent
    mask = None
    if image.mode in ("P", "PA", "LA", "RGBA"):
        image = image.convert("RGBA")
        mask = image.getchannel("A")
    elif isinstance(transparent, int | tuple):  # neither for a text in a PNG under the key "transparency"
        mask = _mask(np.asarray(image), transparent, layout)
    if image.mode.startswith("I"):  # Pillow would clip 16 bits at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if mask is None:
        return image if image.mode == "L" else _as(image, "RGB")
    canvas = Image.new("RGB", image.size, background)
    canvas.paste(image.convert("RGB"), mask=mask)
    return canvas


def _as(image: Image.Image, mode: str) -> Image.Image:
    return image if image.mode == mode else image.convert(mode)  # which copies an image that has the mode


def _mask(values: NDArray[Any], transparent: int | tuple[int, ...], layout: str) -> Image.Image:
    """Return what is not of the transparent colour. Pillow compares samples that it has scaled with one that it hasn't.

    Of 16 bits of red, green and blue Pillow keeps the upper 8, so these are compared.
    """
    if isinstance(transparent, tuple):
        shift = 8 if "16" in layout else 0
        differs = (values != np.array([value >> shift for value in transparent])).any(-1)
    elif values.dtype == np.bool_:
        differs = values != (transparent > 0)
    else:
        differs = values != transparent * {"L;2": 85, "L;4": 17}.get(layout, 1)
    return Image.fromarray(differs.astype(np.uint8) * 255)


def _orientation(image: Image.Image) -> object:
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Warning:  # Pillow's of corrupt EXIF, in a process that makes errors of warnings
        raise
    except Exception:  # damaged metadata are no damage of the pixels
        return None


def _square(image: Image.Image, rule: Rule) -> Image.Image:
    (width, height), size = image.size, rule.size
    if rule.resize != "adm":
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        square = image.crop((left, top, left + side, top + side))
        return square.resize((size, size), _FILTERS[rule.resize])
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if width * height > max(MAX_PIXELS, MAX_ASPECT * size * size):
        raise DamagedError(f"{image.width} x {image.height} pixels are too narrow; crop it")
    image = image.resize((width, height), Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))
