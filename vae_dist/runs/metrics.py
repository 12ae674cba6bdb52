"""`metrics.jsonl`: one JSON object per line, a record of metrics after a number of optimizer steps."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vae_dist.config.text import LARGEST
from vae_dist.files import parse_object

METRICS = "metrics.jsonl"
LONGEST_LINE = 2**16  # bytes; a record has 300


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the whole records of a metrics file, in the order of the file.

    A live or killed run can end in half a line, and an untrusted file can hold anything: other lines are skipped.
    """
    with open(path, "rb") as file:
        while line := file.readline(LONGEST_LINE):
            try:
                record = parse_object(line)
            except ValueError:
                continue
            if type(record.get("step")) is int and 0 <= record["step"] < LARGEST:
                yield record


def is_number(value: Any) -> bool:
    """Return whether a value from a file can be a logged metric. A NaN is none, and a number from LARGEST up."""
    return type(value) in (int, float) and abs(value) < LARGEST


def is_finite(value: Any) -> bool:
    """Return whether a value from a file is a finite number, however large: also that of a model that has diverged."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max
