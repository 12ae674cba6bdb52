"""Pictures with captions, as PNG files."""

import math
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

CAPTION_SIZE = 13
LABEL_SPACE = 6  # pixels between a label and its image
NARROWEST = 360  # pixels, for a caption
LARGE = 2**21  # pixels; optimising a larger PNG takes many seconds

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


class Picture(NamedTuple):
    """An image with its caption."""

    image: Image.Image
    caption: str


def font_of(texts: Iterable[str], size: int) -> Font:
    """Return a font for the texts: Pillow's, which draws boxes for all but ASCII, or else DejaVu Sans.

    The latter, which matplotlib has, draws boxes for Chinese, Japanese and Korean.
    """
    if all(map(str.isascii, texts)) or (matplotlib := find_spec("matplotlib")) is None:
        return ImageFont.load_default(size=size)
    file = Path(str(matplotlib.origin)).parent / "mpl-data/fonts/ttf/DejaVuSans.ttf"
    return ImageFont.truetype(file, size) if file.exists() else ImageFont.load_default(size=size)


def with_caption(picture: Picture) -> Image.Image:
    """Return the picture with its caption in a strip below, wrapped to its width."""
    font = font_of([picture.caption], CAPTION_SIZE)
    words = picture.caption.split()
    width = max(picture.image.width, NARROWEST, widest(words, font) + 2 * LABEL_SPACE)
    lines, line = [], ""
    for word in words:
        longer = f"{line} {word}".strip()
        if line and font.getlength(longer) > width - 2 * LABEL_SPACE:
            lines.append(line)
            longer = word
        line = longer
    text = "\n".join([*lines, line])
    strip = (CAPTION_SIZE + 6) * (len(lines) + 1) + LABEL_SPACE
    result = Image.new(picture.image.mode, (width, picture.image.height + strip), "white")
    result.paste(picture.image, (0, 0))
    corner = LABEL_SPACE, picture.image.height + LABEL_SPACE
    ImageDraw.Draw(result).multiline_text(corner, text, fill="black", font=font)
    return result


def to_png(image: Image.Image, *, caption: str = "", optimize: bool = False) -> bytes:
    """Return the content of a PNG file. A caption is kept as the file's text `Description`, not in its pixels.

    `optimize` makes smaller files of pictures that are not LARGE.
    """
    text = PngInfo()
    if caption:
        text.add_itxt("Description", caption)
    file = BytesIO()
    image.save(file, "PNG", optimize=optimize and image.width * image.height <= LARGE, pnginfo=text)
    return file.getvalue()


def widest(texts: Sequence[str], font: Font) -> int:
    return max((math.ceil(font.getlength(text)) for text in texts), default=0)
