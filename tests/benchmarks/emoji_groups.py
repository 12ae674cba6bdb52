"""Group the emoji of an npm package by design, and measure how much a random split of them leaks.

    npm pack emoji-datasource-google && tar xzf emoji-datasource-google-*.tgz
    python tests/benchmarks/emoji_groups.py package [--csv emoji.csv] [--classes FOLDER] [--merge-people] [--size 64]

The package's `emoji.json` lists each design with its skin tones; `--merge-people` also joins the genders, hair colours
and directions of a person. `--csv` writes the columns `name,group` for data.group, `--classes` a folder of images for
each category (hard links, or copies on another file system). Image names are relative to `img/google/SIZE`, or with
`--classes` to that folder.

A test image leaks if a training image lies within 25 dB (peak signal-to-noise ratio, transparent pixels white): a
network that has memorised that one needs nothing else to reconstruct it.
"""

import argparse
import csv
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

TWIN = 25.0  # dB
HELD_OUT = 0.1  # of the images
SPLITS = 5  # random ones, of which the mean is printed

_PERSON = {"1f468": "1f9d1", "1f469": "1f9d1", "1f466": "1f9d2", "1f467": "1f9d2"}  # man, woman; boy, girl
_LEFT_OUT = {"200d", "fe0f", "2640", "2642", "27a1", "1f9b0", "1f9b1", "1f9b2", "1f9b3"}


def designs(package: Path, merge_people: bool = False) -> dict[str, str]:
    """Return the group of each image by its file name."""
    groups = {}
    for entry in _entries(package):
        design = Path(entry["image"]).stem
        group = merged(design) if merge_people else design
        for image in entry, *entry.get("skin_variations", {}).values():
            groups[image["image"]] = group
    return groups


def categories(package: Path) -> dict[str, str]:
    """Return the category of each image by its file name, as the name of a folder: `people_body`."""
    return {
        image["image"]: re.sub(r"\W+", "_", entry["category"].lower())
        for entry in _entries(package)
        for image in (entry, *entry.get("skin_variations", {}).values())
    }


def merged(design: str) -> str:
    """Return a design's code points without gender, hair colour and direction: the same for all of one person.

    Signs that are no person's, such as the female sign itself, keep their own.
    """
    points = design.split("-")
    joined = len([point for point in points if point != "fe0f"]) > 1
    rest = [_PERSON.get(point, point) for point in points if not (joined and point in _LEFT_OUT)]
    return "-".join(rest)


def _entries(package: Path) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = json.loads((package / "emoji.json").read_text(encoding="utf-8"))
    return entries


def pixels(paths: Sequence[Path]) -> npt.NDArray[np.uint8]:
    """Return images as colours over white, `(N, H, W, 3)`."""
    images = []
    for path in paths:
        with Image.open(path) as opened:
            image = opened.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        images.append(np.asarray(Image.alpha_composite(white, image).convert("RGB")))
    return np.stack(images)


def nearest(images: npt.NDArray[np.uint8], test: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """Return the peak signal-to-noise ratio of each test image's nearest training image, dB."""
    flat = images.reshape(len(images), -1).astype(np.float32) / 255
    held_out, training = flat[test], flat[~test]
    squares = (held_out**2).sum(1)[:, None] + (training**2).sum(1) - 2 * held_out @ training.T
    mean = squares.min(1).astype(np.float64).clip(1e-12) / flat.shape[1]
    return -10 * np.log10(mean)


def leak(images: npt.NDArray[np.uint8], groups: Sequence[str], seed: int) -> float:
    """Return the fraction of test images with a training twin, if a tenth of the images is held out by group."""
    draw = np.random.default_rng(seed)
    sizes = Counter(groups)
    names = sorted(sizes)
    held_out: set[str] = set()
    count = 0
    for index in draw.permutation(len(names)):
        if count >= HELD_OUT * len(groups):
            break
        held_out.add(names[index])
        count += sizes[names[index]]
    test = np.array([group in held_out for group in groups])
    return float((nearest(images, test) > TWIN).mean())


def write_csv(path: Path, groups: Mapping[str, str]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("name", "group"), *sorted(groups.items())])


def write_classes(folder: Path, source: Path, classes: Mapping[str, str]) -> None:
    for name, category in classes.items():
        target = folder / category / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        try:
            os.link(source / name, target)
        except OSError:  # on another file system
            shutil.copyfile(source / name, target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--classes", type=Path)
    parser.add_argument("--merge-people", action="store_true")
    parser.add_argument("--size", type=int, default=64)
    options = parser.parse_args()
    source = options.package / f"img/google/{options.size}"
    groups, classes = designs(options.package, options.merge_people), categories(options.package)
    if options.csv is not None:
        named = {f"{classes[name]}/{name}": group for name, group in groups.items()} if options.classes else groups
        write_csv(options.csv, named)
    if options.classes is not None:
        write_classes(options.classes, source, classes)
    names = sorted(groups)
    images = pixels([source / name for name in names])
    splits = {
        "at random": names,
        "by design": list(map(designs(options.package).__getitem__, names)),
        "by design, genders and directions together": list(map(designs(options.package, True).__getitem__, names)),
    }
    print(f"{len(images)} images of {source}; test images with a training image above {TWIN:.0f} dB, by split:")
    for title, by in splits.items():
        leaks = [leak(images, by, seed) for seed in range(SPLITS)]
        print(f"{np.mean(leaks):6.1%} ({min(leaks):.1%} to {max(leaks):.1%})  {title}, {len(set(by))} groups")


if __name__ == "__main__":
    main()
