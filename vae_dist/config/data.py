"""Options of the data: which images there are, how their files become pixels, and how they are split."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vae_dist.config.fields import option

OWN_IMAGES = ("folder", "array")  # data sets of the user's own images, in data.path
BINARY_SETS = ("binarized_mnist",)  # data sets whose pixels are published as black or white


@dataclass
class DataConfig:
    name: str = option(
        "auto",
        "mnist, fashion_mnist, kmnist, binarized_mnist (drawn once by Larochelle and Murray 2011), cifar10 or "
        "synthetic_digits; folder or array: your own images in data.path; auto: MNIST if it is under data.root or can "
        "be downloaded, otherwise synthetic_digits",
    )
    root: str = option("data", "folder of the data sets, in torchvision's layout")
    download: bool = option(True, "download a data set that is missing under data.root")
    mirror: str | None = option(None, "URL to download from instead of the data set's own mirrors")
    validation_images: int | None = option(
        None,
        "training images held out for validation; 0: train on all; null: a tenth of them, at most 5000, unless "
        "the set has a validation part of its own",
        at_least=0,
    )
    binarize: Literal["none", "threshold", "dynamic"] = option(
        "none",
        "none: grey pixels; threshold: 1 from 128 up; dynamic: Bernoulli draws, new at each step for training images, "
        "fixed for all others",
    )
    image_shape: list[int] | None = option(None, "channels, height and width; null: the data set's", at_least=1)
    synthetic_images: int = option(
        60_000,
        "training images of synthetic_digits; it has a sixth as many test images",
        at_least=6,
        at_most=2**32,
    )
    flip: bool = option(False, "flip training images horizontally at random, new at each step")

    # ---- Your own images
    path: str | None = option(
        None,
        "your own images; folder: a folder of JPEG, PNG, WebP or AVIF files, or a packed one; array: a .npy, .npz or "
        ".safetensors file",
    )
    size: int | None = option(
        None, "side in pixels of the images of a folder, after crop and resize; null: 64", at_least=1, at_most=4096
    )
    channels: int | None = option(
        None, "1: grey, 3: colour; null: colour for a folder, as they are for an array", at_least=1, at_most=3
    )
    resize: Literal["adm", "lanczos", "bicubic", "bilinear"] = option(
        "adm",
        "how the images of a folder are resized and cropped to a centre square; adm: as by Dhariwal and Nichol (2021)",
    )
    background: str = option("white", "colour behind transparent pixels: a name, or #rrggbb")
    test_images: int | None = option(
        None,
        "images held out as the test set; null: a tenth of them, at most 5000, unless data.path has a test part",
        at_least=1,
    )
    group: str | None = option(
        None,
        "images that are split together, such as copies of one picture: a regular expression on file names, whose "
        "first group or whole match names the group, or the path of a CSV file with the columns name and group",
    )
    check: Literal["headers", "decode"] = option(
        "headers", "how damaged files are found at the start: by their headers, or by decoding all; packing decodes all"
    )
    skip_damaged: bool = option(False, "leave damaged files out, and list them in the log and in the pack")
    pack: Literal["auto", "always", "never"] = option(
        "auto",
        "decode a folder once, into one file of pixels, at its first use; auto: if the file takes at most half of the "
        "free disk space; never: decode in every epoch",
    )
    pack_dir: str | None = option(None, "folder of packed files; null: packed in data.root")
    workers: int | None = option(
        None, "threads that decode; 0: none of their own; null: one per CPU", at_least=0, at_most=1024
    )
    identity: str | None = option(
        None, "hash of your own images, or identity of a registered set; the run sets it, not you"
    )
    classes: list[str] | None = option(
        None, "names of the classes of a conditional model; null: the data set's, if model.conditional"
    )

    @property
    def title(self) -> str:
        """The data set's name in captions; of own images that of their folder or file."""
        return self.name if self.path is None else Path(self.path).name or self.name

    @property
    def binarization(self) -> str:
        """How pixels became black or white: `binarize`, or "fixed" for a set published so; "none" if they are grey."""
        return "fixed" if self.name in BINARY_SETS else self.binarize
