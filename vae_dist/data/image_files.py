"""Image files that nobody has checked: what they are, how large, and why one can't be used.

Nothing is decoded here. Sizes are checked before Pillow allocates memory for them.
"""

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

from PIL import ImageFile, features
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from vae_dist import files
from vae_dist.errors import UNPRINTABLE, UserError

# Of one image: more than cameras make, and 256 MiB in memory. A file of 100 kB can claim ten times as many.
MAX_PIXELS = 2**26
MAX_BYTES = 4 * MAX_PIXELS  # of one file: four channels without compression

CUT_OFF = "cut off: the file ends before the image does"
LINK = "a link; copy the file, or give its folder"
NOT_REGULAR = "not a regular file"
NOT_READABLE = "this user may not read it"


class _Jpeg(JpegImageFile):
    def _read_dpi_from_exif(self) -> None:
        """Leave the resolution unread: Pillow warns of odd ones, and as an error the warning would refuse the file."""


# Image.open warns of a large image before it tells the size, and a filter of warnings would be the whole process's.
_READERS: dict[str, Callable[[BinaryIO], ImageFile.ImageFile]] = {"JPEG": _Jpeg, "PNG": PngImageFile}
if features.check("webp"):
    _READERS["WebP"] = WebPImageFile
if features.check("avif"):
    from PIL.AvifImagePlugin import AvifImageFile

    _READERS["AVIF"] = AvifImageFile

# The beginnings of other files that often have an image's name.
_OTHERS = {
    b"GIF8": "a GIF; save it as PNG",
    b"BM": "a BMP; save it as PNG",
    b"II*\0": "a TIFF; save it as PNG",
    b"MM\0*": "a TIFF; save it as PNG",
    b"\xff\x0a": "a JPEG XL; save it as PNG",
    b"\0\0\0\x0cJXL ": "a JPEG XL; save it as PNG",
    b"\0\0\0\x0cjP  ": "a JPEG 2000; save it as PNG",
    b"version https://git-lfs": "a Git LFS pointer; git lfs pull gets the image",
    b"<": "not an image, but HTML or XML",
    b"%PDF": "not an image, but a PDF",
    b"PK\3\4": "not an image, but a ZIP archive",
}


class DamagedError(ValueError):
    """A file without usable pixels. The message is a short reason, without the file's name."""


class Header(NamedTuple):
    """A file's format, and its size in pixels before the EXIF orientation is applied."""

    format: str
    width: int
    height: int


def header(path: Path) -> Header:
    """Read a file's header; nothing is decoded. Raises DamagedError, and UserError if the system fails to read."""
    with explained(path), files.open_regular(path, MAX_BYTES, follow=False) as file:
        image = open_image(file)
        return Header(image.format or "", *image.size)


def open_image(file: BinaryIO) -> ImageFile.ImageFile:
    """Open an image of at most MAX_PIXELS without decoding it. Use it inside `explained`."""
    start = file.read(64)
    kind = _kind(start)
    if kind not in _READERS:
        raise DamagedError(f"{kind}, which this build of Pillow can't read")
    if kind == "WebP":
        _check_webp(start, file)
    file.seek(0)
    image = _READERS[kind](file)
    _check_size(*image.size)
    return image


def _kind(start: bytes) -> str:
    if not start:
        raise DamagedError("empty")
    if start.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if start.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if start.startswith(b"RIFF") and start[8:12] == b"WEBP":
        return "WebP"
    if start[4:8] == b"ftyp":
        if b"avif" in start or b"avis" in start:
            return "AVIF"
        raise DamagedError("a HEIC image or a video; export it as JPEG")
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    for beginning, reason in _OTHERS.items():
        if start.startswith(beginning) or text.startswith(beginning):
            raise DamagedError(reason)
    raise DamagedError("not an image")


def _check_webp(start: bytes, file: BinaryIO) -> None:
    """Check the size of the canvas, for which Pillow allocates memory when it opens the file, and the file's length."""
    if start[12:16] == b"VP8X":
        width, height = (int.from_bytes(start[at : at + 3], "little") + 1 for at in (24, 27))
    elif start[12:16] == b"VP8L":
        sides = int.from_bytes(start[21:25], "little")
        width, height = (sides & 0x3FFF) + 1, (sides >> 14 & 0x3FFF) + 1
    else:
        width, height = (int.from_bytes(start[at : at + 2], "little") & 0x3FFF for at in (26, 28))
    _check_size(width, height)
    if file.seek(0, 2) < 8 + int.from_bytes(start[4:8], "little"):
        raise DamagedError(CUT_OFF)


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        limit = f"{MAX_PIXELS // 10**6} megapixels"
        raise DamagedError(f"{width} x {height} pixels are more than {limit}; make it smaller")


@contextmanager
def explained(path: Path | None = None) -> Iterator[None]:
    """Turn whatever Pillow raises into a DamagedError with a reason.

    So are the errors of a file of the wrong kind, and of one that this user may not read. Other errors of the system,
    such as a full table of open files or a lost disk, are no damage: they become a UserError.
    """
    try:
        yield
    except (DamagedError, UserError, MemoryError):
        raise
    except OSError as error:
        if error.errno is not None and error.errno not in _ERRNO:
            advice = files.advice(error, "make it readable, or move it away")
            raise UserError(f"can't read {path} ({files.reason(error)}); {advice}") from error
        raise DamagedError(_ERRNO.get(error.errno or 0) or _reason(error)) from error
    except Exception as error:
        raise DamagedError(_reason(error)) from error


_ERRNO = {
    errno.ELOOP: LINK,  # by O_NOFOLLOW
    errno.EINVAL: NOT_REGULAR,
    errno.ENXIO: NOT_REGULAR,  # a socket
    errno.EFBIG: f"more than {MAX_BYTES // 2**20} MiB",
    errno.EACCES: NOT_READABLE,
    errno.EPERM: NOT_READABLE,
}


def _reason(error: Exception) -> str:
    text = UNPRINTABLE.sub("?", str(error))[:80]
    if isinstance(error, EOFError) or any(word in text.lower() for word in ("truncated", "incomplete", "unpack")):
        return CUT_OFF
    return "damaged: it has no image" if "not identified" in text else f"damaged: {text or type(error).__name__}"
