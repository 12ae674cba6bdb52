"""MNIST as Larochelle and Murray (2011) binarised it: drawn once, 50,000 training, 10,000 validation and test images.

A file is text, a line an image: 784 digits 0 or 1, from left to right and from top to bottom, with spaces between.
"""

from pathlib import Path
from typing import Literal

import numpy as np
import torch

from vae_dist.data.download import Published
from vae_dist.data.public_files import identity_of, obtain, read_published
from vae_dist.data.source import Source, in_memory

Part = Literal["train", "validation", "test"]

NAME = "binarized_mnist"
SIDE = 28
LINE_BYTES = 2 * SIDE * SIDE

_ADDRESS = "https://www.cs.toronto.edu/~larocheh/public/datasets/binarized_mnist"

# Sizes and digests are those of TensorFlow Datasets.
FILES: dict[Part, Published] = {
    "train": Published(
        _ADDRESS,
        "binarized_mnist_train.amat",
        78_400_000,
        "ad693b29f94c14277b095f5238ddefbbdaaae0939789dd2f4f0205278cee3e4d",
    ),
    "validation": Published(
        _ADDRESS,
        "binarized_mnist_valid.amat",
        15_680_000,
        "1de3d397c40fe8eeb33dafd4099a1f665ec01e96d9be234aaeeac8a34930e2e2",
    ),
    "test": Published(
        _ADDRESS,
        "binarized_mnist_test.amat",
        15_680_000,
        "e6687bfea3f820c174f33b7865140b2a2dd2930ef786f35d45795fc193b5ab2c",
    ),
}


def load(root: Path, part: Part, *, download: bool, mirror: str | None) -> Source:
    """Return a part's images. They have no labels.

    Raises UnreachableError if files are missing and can't be downloaded, UserError if this part's is damaged.
    """
    folder = root / NAME
    obtain(list(FILES.values()), folder, download=download, mirror=mirror)
    file = FILES[part]
    digits = np.frombuffer(read_published(folder / file.name, file), np.uint8).reshape(-1, LINE_BYTES)[:, ::2]
    pixels = torch.from_numpy(255 * (digits - ord("0"))).view(-1, 1, SIDE, SIDE)
    processing = "binary: drawn once by Larochelle and Murray (2011)"
    return in_memory(NAME, pixels, None, identity_of([file]), processing=processing)
