"""Pixels of image files: every odd file has its right pixels or a reason, and no file costs much memory."""

import os
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile, ImageOps, features

from tests.conftest import REPOSITORY
from tests.test_fuzz import mutated
from vae_dist.data import image_files
from vae_dist.data.image_files import CUT_OFF
from vae_dist.data.pixels import DamagedError, Header, Resize, Rule, colour, decode, decode_bytes, header
from vae_dist.errors import UserError

Array = NDArray[Any]

FORMATS = ["JPEG", "PNG", "WEBP", *(["AVIF"] if features.check("avif") else [])]
RULES: tuple[Resize, ...] = get_args(Resize)


def noise(height: int, width: int, *channels: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, *channels), dtype=np.uint8)


def photograph(height: int, width: int) -> Image.Image:
    """Smooth colours with some noise: JPEG and its relatives keep most of it."""
    coarse = Image.fromarray(noise(6, 5, 3)).resize((width, height), Image.Resampling.BICUBIC)
    return Image.fromarray(np.asarray(coarse) // 8 * 7 + noise(height, width, 3) // 8)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(width: int, height: int, bits: int, kind: int, rows: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of rows that begin with a filter byte, with chunks (name, content) before the pixels."""
    size = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    named = [(b"IHDR", size), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in named
    )


def pixels_of(content: bytes, channels: int = 3, size: int | None = None, **changes: Any) -> Array:
    """The pixels (H, W, 3), or (H, W) if grey, of a square file at its own size: no rule resizes it."""
    if size is None:
        size = Image.open(BytesIO(content)).width
    pixels = decode_bytes(content, Rule(size, channels, **changes))
    assert pixels.dtype == np.uint8 and pixels.shape == (channels, size, size) and pixels.flags.c_contiguous
    return pixels.transpose(1, 2, 0).squeeze()


def reason_of(content: bytes) -> str:
    with pytest.raises(DamagedError) as caught:
        decode_bytes(content, Rule(8))
    return str(caught.value)


# Files that Pillow's defaults, or other decoders', get wrong.


@pytest.mark.parametrize("kind", FORMATS)
def test_a_file_that_is_cut_off_is_damaged(kind: str) -> None:
    content = encoded(photograph(20, 22), kind)
    whole = decode_bytes(content, Rule(8))
    for length in range(len(content) - 21):
        assert reason_of(content[:length]).startswith(("cut off", "damaged", "not an image", "empty", "a HEIC"))
    for length in range(len(content) - 21, len(content)):  # all pixels may be there, and a checksum and an end missing
        try:
            assert np.array_equal(decode_bytes(content[:length], Rule(8)), whole)
        except DamagedError as error:
            assert str(error) == CUT_OFF
    assert reason_of(content[: len(content) // 2]) == CUT_OFF


@pytest.mark.parametrize("compression", [0, 9])
def test_a_png_is_never_decoded_to_other_pixels_than_were_written(compression: int) -> None:
    image = noise(6, 6, 3)
    content = encoded(Image.fromarray(image), compress_level=compression)
    for place in range(33, len(content)):  # after the header, whose size a flip may change together with its checksum
        flipped = bytearray(content)
        flipped[place] ^= 1
        try:
            assert np.array_equal(pixels_of(bytes(flipped), size=6), image)
        except DamagedError:
            continue


def test_files_that_are_no_images_are_named() -> None:
    assert reason_of(b"") == "empty"
    assert "HTML" in reason_of(b"\n<!DOCTYPE html><html>404</html>")
    assert "git lfs pull" in reason_of(b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n")
    assert reason_of(bytes(1000)) == "not an image"
    assert "GIF" in reason_of(encoded(Image.new("L", (4, 4)), "GIF"))
    assert "TIFF" in reason_of(encoded(Image.new("L", (4, 4)), "TIFF"))
    assert "HEIC" in reason_of(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(50))


def test_16_bits_of_grey_are_shifted_and_not_clipped() -> None:
    ramp = np.arange(2**16, dtype=np.uint16).reshape(256, 256)
    content = png(256, 256, 16, 0, b"".join(b"\0" + row.astype(">u2").tobytes() for row in ramp))
    for pixels in (pixels_of(content)[..., 0], pixels_of(content, 1)):
        assert np.array_equal(pixels, ramp >> 8) and pixels.mean() == 127.5


def test_16_bits_of_colour_are_shifted() -> None:
    values = np.random.default_rng(0).integers(0, 2**16, (16, 16, 3), dtype=np.uint16)
    content = png(16, 16, 16, 2, b"".join(b"\0" + row.astype(">u2").tobytes() for row in values))
    assert np.array_equal(pixels_of(content), values >> 8)


def over(colours: Array, opacity: Array, background: tuple[int, int, int]) -> Array:
    """Composite in exact fractions, rounded to the nearest: colours (H, W, 3), opacity (H, W) of 255."""
    result = np.empty(colours.shape, np.uint8)
    for at in np.ndindex(*colours.shape):
        part = Fraction(int(opacity[at[:2]]), 255)
        result[at] = round(int(colours[at]) * part + background[at[2]] * (1 - part))
    return result


@pytest.mark.parametrize("background", ["white", "#102030"])
def test_transparent_pixels_show_the_background(background: str) -> None:
    colours, opacity = noise(16, 16, 3), noise(16, 16, seed=1)
    for content in (
        encoded(Image.fromarray(np.dstack([colours, opacity]), "RGBA")),
        encoded(Image.fromarray(np.dstack([colours, opacity]), "RGBA"), "WEBP", lossless=True, exact=True),
    ):
        assert np.array_equal(pixels_of(content, background=background), over(colours, opacity, colour(background)))
    grey = noise(16, 16, seed=2)
    content = encoded(Image.merge("LA", [Image.fromarray(grey), Image.fromarray(opacity)]))
    expected = over(np.dstack([grey] * 3), opacity, colour(background))
    assert np.array_equal(pixels_of(content, background=background), expected)


def test_hidden_colours_are_not_seen() -> None:
    hidden = np.dstack([noise(16, 16, 3), np.zeros((16, 16), np.uint8)])
    assert (pixels_of(encoded(Image.fromarray(hidden, "RGBA"))) == 255).all()
    assert (pixels_of(encoded(Image.fromarray(hidden, "RGBA")), 1, background="black") == 0).all()
    small = pixels_of(encoded(Image.fromarray(hidden, "RGBA")), size=4)
    assert (small == 255).all()  # composited before it is resized


def test_transparent_colours_of_palettes_show_the_background() -> None:
    numbers = noise(16, 16) % 4
    palette = np.array([[1, 2, 3], [4, 5, 6], [7, 8, 9], [200, 100, 0]], np.uint8)
    image = Image.fromarray(numbers, "P")
    image.putpalette(palette.tobytes())
    white = (255, 255, 255)
    one = np.where(numbers == 2, 0, 255)
    assert np.array_equal(pixels_of(encoded(image, transparency=2)), over(palette[numbers], one, white))
    some = np.array([0, 128, 255, 255], np.uint8)
    several = encoded(image, transparency=some.tobytes())
    assert np.array_equal(pixels_of(several), over(palette[numbers], some[numbers], white))
    assert np.array_equal(pixels_of(encoded(image)), palette[numbers])


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_a_transparent_grey_shows_the_background_at_any_depth(bits: int) -> None:
    values = np.random.default_rng(0).integers(0, 2**bits, (8, 8))
    if bits == 16:
        values[:, ::2] = 0x1234
        values[:, 1::4] = 0x1235  # equal in the upper 8 bits
    transparent = int(values[3, 4])
    fields = [np.array([format(value, f"0{bits}b") for value in row]) for row in values]
    rows = b"".join(b"\0" + int("".join(row), 2).to_bytes(bits) for row in fields)
    pixels = pixels_of(png(8, 8, bits, 0, rows, (b"tRNS", struct.pack(">H", transparent))), 1, background="#808080")
    grey = values >> 8 if bits == 16 else values * 255 // (2**bits - 1)
    assert np.array_equal(pixels, np.where(values == transparent, 128, grey))


@pytest.mark.parametrize("bits", [8, 16])
def test_a_transparent_colour_shows_the_background(bits: int) -> None:
    values = np.random.default_rng(0).integers(0, 2**bits, (8, 8, 3), dtype=np.uint16)
    values[2:5] = values[0, 0]
    values[6:, :, :2] = values[0, 0, :2]  # other in one channel
    rows = b"".join(b"\0" + row.astype(">u2" if bits == 16 else "u1").tobytes() for row in values)
    pixels = pixels_of(png(8, 8, bits, 2, rows, (b"tRNS", values[0, 0].astype(">u2").tobytes())))
    transparent = (values == values[0, 0]).all(-1, keepdims=True)
    assert np.array_equal(pixels, np.where(transparent, 255, values >> (bits - 8)))


def test_a_text_named_transparency_is_a_text() -> None:
    image = noise(8, 8, 3)
    rows = b"".join(b"\0" + row.tobytes() for row in image)
    for text in (b"transparency\0hello", b"exif\0Exif\0\0II*\0", b"icc_profile\0x"):
        assert np.array_equal(pixels_of(png(8, 8, 8, 2, rows, (b"tEXt", text))), image)


def test_black_and_white_grey_and_colour_files_agree() -> None:
    bits = noise(16, 16) % 2 * 255
    for mode in ("1", "L", "RGB", "RGBA", "LA", "P"):
        content = encoded(Image.fromarray(bits).convert(mode))
        assert np.array_equal(pixels_of(content), np.dstack([bits] * 3))
        assert np.array_equal(pixels_of(content, 1), bits)


def test_grey_is_the_luma_of_the_colours() -> None:
    image = noise(16, 16, 3)
    grey = pixels_of(encoded(Image.fromarray(image)), 1)
    assert np.abs(grey - image @ [0.299, 0.587, 0.114]).max() < 0.51  # ITU-R 601-2
    assert np.array_equal(pixels_of(encoded(Image.fromarray(grey)), 1), grey)


def test_cmyk_is_converted() -> None:
    levels = np.full((16, 16, 4), [0, 255, 255, 0], np.uint8)  # red: of magenta and yellow
    pixels = pixels_of(encoded(Image.fromarray(levels, "CMYK"), "JPEG", quality=95))
    assert np.abs(pixels.astype(int) - [255, 0, 0]).max() <= 4


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_the_exif_orientation_is_applied(kind: str) -> None:
    upright = np.asarray(photograph(32, 32))
    stored = {  # what a camera saves whose orientation is said to be this
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.transpose(1, 0, 2),
        6: np.rot90(upright), 7: np.rot90(upright, 2).transpose(1, 0, 2), 8: np.rot90(upright, -1),
    }  # fmt: skip
    options: dict[str, Any] = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {"lossless": True}
    for orientation, image in stored.items():
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        content = encoded(Image.fromarray(np.ascontiguousarray(image)), kind, exif=exif.tobytes(), **options)
        pixels = pixels_of(content)
        assert np.abs(pixels.astype(int) - upright).max() <= (4 if kind == "JPEG" else 0)
        pillows = ImageOps.exif_transpose(Image.open(BytesIO(content))).convert("RGB")
        assert np.array_equal(pixels, np.asarray(pillows))


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
def test_avif_is_read_and_turned() -> None:
    image = photograph(32, 32)
    for orientation, turned in ((1, image), (6, image.transpose(Image.Transpose.ROTATE_270))):
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        pixels = pixels_of(encoded(image, "AVIF", quality=100, subsampling="4:4:4", exif=exif.tobytes()))
        assert np.abs(pixels.astype(int) - np.asarray(turned)).mean() < 3


def test_an_odd_resolution_is_not_warned_of(tmp_path: Path) -> None:
    image = photograph(16, 16)
    tags = [(ExifTags.Base.Orientation, 3, 1, 3 << 16), (ExifTags.Base.XResolution, 5, 2, 50)]  # two of one number
    tags += [(ExifTags.Base.ResolutionUnit, 3, 1, 2 << 16)]
    exif = b"Exif\0\0MM\0*" + struct.pack(">IH", 8, 3) + b"".join(struct.pack(">HHII", *tag) for tag in tags)
    (tmp_path / "a.jpg").write_bytes(encoded(image, "JPEG", exif=exif + bytes(4) + struct.pack(">4I", 72, 1, 72, 1)))
    assert header(tmp_path / "a.jpg") == Header("JPEG", 16, 16)
    turned = pixels_of(encoded(image, "JPEG"))[::-1, ::-1]
    assert np.array_equal(decode(tmp_path / "a.jpg", Rule(16)).transpose(1, 2, 0), turned)


def test_corrupt_exif_never_gives_other_pixels_because_warnings_are_errors() -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    content = encoded(photograph(16, 16), "JPEG", exif=exif.tobytes().replace(b"\0\x01\x01\x12", b"\0\x02\x01\x12"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        turned = pixels_of(content)
    assert "Corrupt EXIF" in str(caught[0].message)
    assert np.array_equal(turned, np.rot90(pixels_of(encoded(photograph(16, 16), "JPEG")), -1))
    assert reason_of(content).startswith("damaged: Corrupt EXIF")  # the tests make errors of warnings


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_metadata_are_no_damage_of_the_pixels() -> None:
    image = photograph(16, 16)
    plain = pixels_of(encoded(image, "JPEG"))
    for exif in (b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01", b"Exif\0\0nonsense", b"Exif\0\0", b"MM\0*" + bytes(40)):
        assert np.array_equal(pixels_of(encoded(image, "JPEG", exif=exif)), plain)
    for orientation in (0, 9, 65535):
        tags = Image.Exif()
        tags[ExifTags.Base.Orientation] = orientation
        assert np.array_equal(pixels_of(encoded(image, "JPEG", exif=tags.tobytes())), plain)
    assert np.array_equal(pixels_of(encoded(image, "JPEG", icc_profile=b"no profile")), plain)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", *FORMATS[3:]])
def test_the_first_frame_of_an_animation_is_the_image(kind: str) -> None:
    frames = [photograph(32, 32).transpose(turn) for turn in (Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180)]
    options = {"lossless": True} if kind == "WEBP" else {}
    content = encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=100, **options)
    assert getattr(Image.open(BytesIO(content)), "n_frames", 1) == 2
    difference = np.abs(pixels_of(content).astype(int) - np.asarray(frames[0]))
    assert difference.mean() < 8 if kind == "AVIF" else difference.max() == 0


# Crop and resize.


def adm(image: Image.Image, size: int) -> Array:
    """The crop of Dhariwal and Nichol (2021): https://github.com/openai/guided-diffusion, image_datasets.py."""
    while min(*image.size) >= 2 * size:
        image = image.resize((image.size[0] // 2, image.size[1] // 2), resample=Image.Resampling.BOX)
    scale = size / min(*image.size)
    width, height = (round(side * scale) for side in image.size)
    array = np.asarray(image.resize((width, height), resample=Image.Resampling.BICUBIC))
    crop_y, crop_x = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    return array[crop_y : crop_y + size, crop_x : crop_x + size]


SHAPES = [(32, 32), (64, 64), (63, 65), (200, 90), (33, 500), (7, 11), (1, 1), (128, 31), (257, 129), (1, 40)]


@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_adm_is_the_published_rule(height: int, width: int) -> None:
    image = photograph(height, width)
    for size in (32, 5):
        assert np.array_equal(pixels_of(encoded(image), size=size), adm(image, size))
        assert np.array_equal(pixels_of(encoded(image), 1, size=size), adm(image.convert("L"), size))


def kernel(name: str, x: Array) -> Array:
    x = np.abs(x)
    if name == "bilinear":
        return np.clip(1 - x, 0, None)
    if name == "lanczos":
        return np.where(x < 3, np.sinc(x) * np.sinc(x / 3), 0)
    return np.where(x < 1, 1.5 * x**3 - 2.5 * x**2 + 1, np.where(x < 2, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2, 0))


def resized(name: str, image: Array, size: int) -> Array:
    """Resize a square (S, S, 3) by the kernel's definition, widened by the scale when it shrinks."""
    scale = len(image) / size
    centres = (np.arange(size) + 0.5) * scale
    weights = kernel(name, (np.arange(len(image)) + 0.5 - centres[:, None]) / max(scale, 1))
    weights /= weights.sum(1, keepdims=True)
    across = np.clip(np.einsum("hwc,xw->hxc", image.astype(float), weights), 0, 255)
    return np.clip(np.einsum("hxc,yh->yxc", across, weights), 0, 255)


@pytest.mark.parametrize("name", ["lanczos", "bicubic", "bilinear"])
@pytest.mark.parametrize(("height", "width"), [(50, 50), (90, 51), (30, 77), (8, 9)])
def test_the_other_rules_crop_the_square_and_resize_it_antialiased(name: Resize, height: int, width: int) -> None:
    image = noise(height, width, 3)
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    expected = resized(name, image[top : top + side, left : left + side], 16)
    pixels = pixels_of(encoded(Image.fromarray(image)), size=16, resize=name)
    assert np.abs(pixels - expected).max() <= 1.01  # rounded twice


@pytest.mark.parametrize("rule", RULES)
def test_pixels_that_have_the_size_stay_as_they_are(rule: Resize) -> None:
    once = pixels_of(encoded(photograph(70, 45)), size=16, resize=rule)
    assert np.array_equal(pixels_of(encoded(Image.fromarray(once)), resize=rule), once)
    flat = pixels_of(encoded(Image.new("RGB", (70, 45), (10, 20, 30))), size=16, resize=rule)
    assert (flat == [10, 20, 30]).all()


def test_narrow_images_are_damaged_before_they_cost_memory() -> None:
    content = encoded(Image.new("L", (60_000, 1)))
    assert pixels_of(content, size=8).shape == (8, 8, 3)
    with pytest.raises(DamagedError, match="60000 x 1 pixels are too narrow"):
        decode_bytes(content, Rule(256))
    assert pixels_of(content, size=256, resize="lanczos").shape == (256, 256, 3)


def test_the_text_of_a_rule_tells_rules_of_other_pixels_apart() -> None:
    rules = [Rule(size, channels, rule, back) for size in (8, 9) for channels in (1, 3) for rule in RULES
             for back in ("white", "#fffffe")]  # fmt: skip
    assert len({rule.text for rule in rules}) == len(rules)
    assert Rule(8, background="white").text == Rule(8, background="#FFF").text


def test_an_unknown_background_is_an_error_of_the_user() -> None:
    for name in ("nocolour", "", "#12", "white\x1b[2J"):
        with pytest.raises(UserError, match=r"^data\.background='.*or #rrggbb$"):
            decode_bytes(encoded(Image.new("L", (2, 2))), Rule(2, background=name))


# Files, threads, memory.


def test_a_file_is_decoded_as_its_content_is(tmp_path: Path) -> None:
    for kind in FORMATS:
        content = encoded(photograph(40, 30), kind)
        path = tmp_path / "misnamed.txt"
        path.write_bytes(content)
        assert np.array_equal(decode(path, Rule(16)), decode_bytes(content, Rule(16)))
        assert header(path) == Header(kind, 30, 40)


def test_links_pipes_and_folders_are_damaged_and_no_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "image.png").write_bytes(encoded(Image.new("L", (2, 2))))
    (tmp_path / "link.png").symlink_to("image.png")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    reasons = {"link": "a link; copy the file", "pipe": "not a regular file", "folder": "not a regular file"}
    for read in (header, lambda path: decode(path, Rule(2))):
        for name, reason in reasons.items():
            with pytest.raises(DamagedError, match=reason):
                read(tmp_path / f"{name}.png")
        with pytest.raises(UserError, match=r"nothing\.png \(No such file"):
            read(tmp_path / "nothing.png")


def test_any_number_of_threads_decodes_the_same_bits() -> None:
    contents = [encoded(photograph(60 + k, 50), FORMATS[k % len(FORMATS)]) for k in range(12)] * 3
    alone = [decode_bytes(content, Rule(24)) for content in contents]
    for threads in (1, 7):
        with ThreadPoolExecutor(threads) as pool:
            together = list(pool.map(lambda content: decode_bytes(content, Rule(24)), contents))
        assert all(map(np.array_equal, together, alone))


def test_a_process_that_accepts_cut_off_files_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    content = encoded(photograph(64, 64), "JPEG")
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    for some in (content, content[: len(content) // 2]):
        with pytest.raises(UserError, match="LOAD_TRUNCATED_IMAGES"):
            decode_bytes(some, Rule(8))


def zeros(width: int, height: int) -> bytes:
    """A PNG of black pixels that is made a row at a time."""
    packer = zlib.compressobj(1)
    rows = b"".join(packer.compress(bytes(1 + width // 8)) for _ in range(height)) + packer.flush()
    size = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in ((b"IHDR", size), (b"IDAT", rows), (b"IEND", b""))
    )


def webp_header(width: int, height: int) -> bytes:
    body = b"WEBPVP8X\x0a\0\0\0\0\0\0\0" + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return b"RIFF" + struct.pack("<I", len(body)) + body


def bombs() -> dict[str, bytes]:
    rows = b"\0" + bytes(3)
    compressed, some = zlib.compress(bytes(200 * 2**20), 1), zlib.compress(bytes(2**20 - 100))
    texts = [(b"zTXt", b"key%d\0\0" % k + some) for k in range(200)]
    return {
        "huge.png": zeros(30_000, 30_000),
        "large.png": zeros(12_000, 12_000),
        "huge.webp": webp_header(2**24, 2**24),
        "large.webp": webp_header(16_000, 16_000),
        "text.png": png(1, 1, 8, 2, rows, (b"zTXt", b"key\0\0" + compressed)),
        "itxt.png": png(1, 1, 8, 2, rows, (b"iTXt", b"key\0\1\0\0\0" + compressed)),
        "texts.png": png(1, 1, 8, 2, rows, *texts),
        "profile.png": png(1, 1, 8, 2, rows, (b"iCCP", b"name\0\0" + compressed)),
        "exif.png": png(1, 1, 8, 2, rows, (b"zTXt", b"Raw profile type exif\0\0" + compressed)),
    }


MEASURED = """
import resource, sys
from pathlib import Path
from vae_dist.data.pixels import DamagedError, Rule, decode, header

def peak():
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 1024
    except FileNotFoundError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

first = peak()
for path in sorted(Path(sys.argv[1]).iterdir()):
    for read in (header, lambda path: decode(path, Rule(64))):
        try:
            read(path)
        except DamagedError as error:
            print(path.name, error)
        else:
            print(path.name, "decoded")
print(peak() - first)
"""


def test_bombs_cost_no_memory_and_no_warning(tmp_path: Path) -> None:
    files = bombs()
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    command = [sys.executable, "-W", "error", "-c", MEASURED, str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=120)
    *lines, mebibytes = done.stdout.splitlines()
    assert not done.stderr
    assert len(lines) == 2 * len(files)
    sizes = {"huge.png": 30_000, "large.png": 12_000, "huge.webp": 2**24, "large.webp": 16_000}
    for name, side in sizes.items():
        assert f"{name} {side} x {side} pixels are more than 67 megapixels; make it smaller" in lines
    assert not [line for line in lines if "decoded" in line]
    assert float(mebibytes) < 150  # Pillow keeps at most 64 MiB of texts


def test_as_many_pixels_as_are_allowed_pass(tmp_path: Path) -> None:
    path = tmp_path / "largest.png"
    path.write_bytes(zeros(2**13, 2**13))
    assert header(path) == Header("PNG", 2**13, 2**13)
    path.write_bytes(zeros(2**13, 2**13 + 1))
    with pytest.raises(DamagedError, match="8192 x 8193 pixels"):
        header(path)


def test_a_file_of_too_many_bytes_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "large.png"
    with open(path, "wb") as file:
        file.truncate(image_files.MAX_BYTES + 1)
    for read in (header, lambda path: decode(path, Rule(2))):
        with pytest.raises(DamagedError, match="more than 256 MiB"):
            read(path)


# Any bytes.


@pytest.fixture(params=[1, pytest.param(20, marks=pytest.mark.slow)], ids=["quick", "deep"])
def depth(request: pytest.FixtureRequest) -> int:
    """Factor on the number of examples."""
    return int(request.param)


def good_files() -> list[bytes]:
    image, orientation = photograph(9, 7), Image.Exif()
    orientation[ExifTags.Base.Orientation] = 6
    exif = orientation.tobytes()
    frames = [photograph(9, 7), photograph(9, 7).rotate(180)]
    grey = Image.fromarray(np.arange(63, dtype=np.uint16).reshape(9, 7) * 1000)
    some = [encoded(image, kind, exif=exif) for kind in FORMATS]
    some += [encoded(image.convert("P"), transparency=3), encoded(image.convert("CMYK"), "JPEG"), encoded(grey)]
    some += [encoded(image, "JPEG", progressive=True, icc_profile=bytes(20)), encoded(image.convert("RGBA"), "WEBP")]
    some += [encoded(frames[0], kind, save_all=True, append_images=frames[1:]) for kind in ("PNG", "WEBP")]
    return [*some, encoded(image.convert("LA")), encoded(image.convert("1"), transparency=0), webp_header(5, 5)]


GOOD = good_files()


def repaired(content: bytes) -> bytes:
    """A PNG whose checksums are right again, as far as its chunks go: Pillow refuses wrong ones before it looks."""
    whole, place = bytearray(content), 8
    while content.startswith(b"\x89PNG") and place + 12 <= len(whole):
        end = place + 8 + int.from_bytes(whole[place : place + 4])
        whole[end : end + 4] = struct.pack(">I", zlib.crc32(whole[place + 4 : end])) if end + 4 <= len(whole) else b""
        place = end + 4
    return bytes(whole)


numbers = st.sampled_from([b"\0", b"\xff", b"\x7f\xff\xff\xff", b"\xff\xff\xff\xff", b"\0\0\0\0", b"IDAT", b"tRNS"])
changed = mutated(st.sampled_from(GOOD), numbers | st.binary(max_size=4))
starts = st.builds(
    lambda good, length, rest: good[:length] + rest, st.sampled_from(GOOD), st.integers(0, 40), st.binary(max_size=80)
)


@pytest.mark.timeout(900)
def test_any_bytes_are_pixels_or_damage(depth: int, tmp_path: Path) -> None:
    path = tmp_path / "any.jpg"

    def outcome(read: Callable[[], object]) -> object:
        try:
            return read()
        except DamagedError as error:
            assert 3 < len(str(error)) < 120 and str(error).isprintable()
            return None

    @settings(max_examples=300 * depth)
    @given(changed | changed.map(repaired) | starts | st.binary(max_size=60))
    def claim(content: bytes) -> None:
        path.write_bytes(content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pixels = outcome(lambda: decode(path, Rule(4)))
            said = outcome(lambda: header(path))
        if pixels is not None:
            assert isinstance(pixels, np.ndarray) and pixels.shape == (3, 4, 4)
            assert said is not None

    claim()
    for content in GOOD[:-1]:
        assert decode_bytes(content, Rule(4)).shape == (3, 4, 4)
