"""Folders of images for tests."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from vae_dist.data.packing import Packing
from vae_dist.data.pixels import Rule


def image_bytes(number: int, kind: str = "PNG", size: tuple[int, int] = (12, 10)) -> bytes:
    """Encode an image of random pixels, the same for the same number."""
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, kind)
    return content.getvalue()


def write_images(folder: Path, names: Sequence[str], first: int = 0) -> Path:
    """Write an image under each name; what it shows depends on its place in the list."""
    for number, name in enumerate(names, first):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image_bytes(number, "JPEG" if path.suffix == ".jpg" else "PNG"))
    return folder


def numbered(count: int, folder: str = "") -> list[str]:
    return [f"{folder}{number:03}.{'jpg' if number % 3 else 'png'}" for number in range(count)]


def packing(place: Path, size: int = 8, workers: int | None = 0, *, skip_damaged: bool = False) -> Packing:
    return Packing(Rule(size), place, workers, skip_damaged)
