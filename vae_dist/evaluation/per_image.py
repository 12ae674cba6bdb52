"""The metrics of every single image, as a table to find outliers with. N images."""

import csv
from collections.abc import Mapping, Sequence
from io import StringIO

from torch import Tensor

from vae_dist.data.source import Source, every_label, every_name

FIRST = ("mean_squared_error", "psnr")

_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")  # of texts that a spreadsheet would compute


def to_csv(source: Source, by_image: Mapping[str, Tensor]) -> bytes | None:
    """Return metrics `(N,)` by image as CSV, those of FIRST in the first columns.

    Images with the largest mean squared error come first. None if the images have no names. A name or label that a
    spreadsheet would take for a formula begins with an apostrophe. Numbers are exact.
    """
    names = every_name(source)
    if names is None:
        return None
    labels = label_names(source)
    metrics = list(dict.fromkeys((*FIRST, *by_image)))
    columns = [by_image[name].tolist() for name in metrics]
    file = StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(("name", "label", *metrics))
    for index in _worst_first(by_image):
        texts = map(harmless, (names[index], labels[index] if labels else ""))
        writer.writerow((*texts, *(repr(column[index]) for column in columns)))
    return file.getvalue().encode()


def worst(source: Source, by_image: Mapping[str, Tensor]) -> str | None:
    """Return the names of the images with the three largest mean squared errors, and these; None without names."""
    indices = _worst_first(by_image)[:3]
    names = source.names(by_image["mean_squared_error"].new_tensor(indices).long())
    if names is None:
        return None
    errors = by_image["mean_squared_error"][indices].tolist()
    return ", ".join(f"{name} ({error:.3g})" for name, error in zip(names, errors, strict=True))


def _worst_first(by_image: Mapping[str, Tensor]) -> list[int]:
    order: list[int] = by_image["mean_squared_error"].argsort(descending=True, stable=True).tolist()
    return order


def label_names(source: Source) -> Sequence[str] | None:
    """Return the names of all images' labels; None without labels."""
    labels, names = every_label(source), source.info.class_names
    if labels is None:
        return None
    return [str(label) if names is None else names[label] for label in labels.tolist()]


def harmless(text: str) -> str:
    """Return a text that no spreadsheet computes: one that it would take for a formula begins with an apostrophe."""
    return f"'{text}" if text.startswith(_FORMULA_STARTS) else text
