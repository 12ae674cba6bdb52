"""`starts.jsonl`: one JSON object for each time that a training was started or resumed."""

import json
import platform
import time
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args, get_type_hints

from vae_dist.files import append, parse_object

STARTS = "starts.jsonl"


@dataclass(frozen=True)
class Start:
    """Facts of one start of a training."""

    time: str  # local, such as 2026-01-02 03:04:05
    host: str
    step: int  # that it starts from
    last_step: int
    steps_per_epoch: int
    training_images: int
    processes: int
    device: str  # its type, such as cuda
    threads: int  # of each process on a CPU
    precision: str
    dataset: str
    torch: str  # its version
    accumulate: int | None = None  # None: not recorded, by an earlier version
    compiled: bool | None = None

    @classmethod
    def now(cls, **facts: Any) -> "Start":
        """Return the facts of a start on this host at this moment."""
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        return cls(time=now, host=platform.node(), torch=version("torch"), **facts)


def write_start(run_dir: Path, start: Start) -> None:
    append(run_dir / STARTS, json.dumps(asdict(start)))


def parse_starts(content: bytes) -> list[Start]:
    """Parse a file of starts. Lines that are not a start, such as half a line of a killed run, are skipped."""
    types = {name: get_args(hint) or (hint,) for name, hint in get_type_hints(Start).items()}
    names = [field.name for field in fields(Start)]
    starts = []
    for line in content.splitlines():
        try:
            values = parse_object(line)
        except ValueError:
            continue
        facts: dict[str, Any] = {name: values.get(name) for name in names}
        if all(type(facts[name]) in types[name] for name in names):
            starts.append(Start(**facts))
    return starts
