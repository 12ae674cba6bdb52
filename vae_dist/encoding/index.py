"""The index of an encoding: what its files hold, and the statistics of all latents."""

import csv
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from io import StringIO
from pathlib import Path
from typing import Any

from vae_dist.data.source import Source, as_indices, every_name
from vae_dist.encoding.request import FORMAT, Request
from vae_dist.encoding.shards import File
from vae_dist.evaluation.per_image import harmless, label_names
from vae_dist.files import ELSEWHERE, parse_object, read_bounded, write_together, writing
from vae_dist.runs import manifest

logger = logging.getLogger(__name__)

INDEX, NAMES = "index.json", "images.csv"
INDEX_BYTES = 2**28


def make(
    request: Request,
    facts: Mapping[str, Any],
    files: Sequence[File],
    statistics: Mapping[str, Any],
    protocol: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the content of the index, as JSON values; `facts` are about the run and its images."""
    return {
        "format": FORMAT,
        **facts,
        "images": request.images,
        "tensors": {
            name: {"shape": [request.images, *shape[1:]], "dtype": str(dtype).removeprefix("torch.")}
            for name, (shape, dtype) in request.tensors(0).items()
        },
        "files": [asdict(file) for file in files],
        "statistics": dict(statistics),
        "protocol": dict(protocol),
        "request": dict(request.values),
    }


def of_source(source: Source) -> dict[str, Any]:
    """Return the facts of an index about its images: the classes by label, and the file of their names."""
    info = source.info
    names = info.class_names or [str(label) for label in range(info.classes or 0)]
    is_named = source.names(as_indices([0])) is not None
    return {"classes": list(names) if info.classes is not None else None, "names": NAMES if is_named else None}


def read(folder: Path) -> dict[str, Any] | None:
    """Return the index of a folder; None without one, or if it is damaged."""
    try:
        return parse_object(read_bounded(folder / INDEX, INDEX_BYTES, follow=False))
    except (OSError, ValueError):
        return None


def write(folder: Path, content: Mapping[str, Any], source: Source) -> None:
    """Write the index and the images' names, unless the index is of the same latents already.

    The conditions that it states are then those of the command that made them. Raises UserError if writing fails.
    """
    old = read(folder)
    if old is not None and isinstance(old.get("protocol"), dict) and old | {"protocol": content["protocol"]} == content:
        content = old
    files = {INDEX: manifest.to_json(content)}
    if (names := names_csv(source)) is not None:
        files = {NAMES: names} | files  # the index last
    with writing(folder, ELSEWHERE):
        write_together({folder / name: text for name, text in files.items() if not _holds(folder / name, text)})


def _holds(path: Path, content: bytes) -> bool:
    try:
        return read_bounded(path, len(content), follow=False) == content
    except OSError:
        return False


def names_csv(source: Source) -> bytes | None:
    """Return the images' names as CSV, by index; None if they have no names.

    A name or label that a spreadsheet would take for a formula begins with an apostrophe.
    """
    names = every_name(source)
    if names is None:
        return None
    labels = label_names(source) or [""] * len(names)
    file = StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(("index", "name", "label"))
    for row, (name, label) in enumerate(zip(names, labels, strict=True)):
        writer.writerow((row, harmless(name), harmless(label)))
    return file.getvalue().encode()
