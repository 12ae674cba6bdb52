"""W&B's records below a folder of runs: the kind of each, and the list of them that W&B's browser shows.

W&B's client makes a record each time that a run is trained, resumed, evaluated or sampled, in
`RUN/wandb/(offline-)run-<time>-<id>/run-<id>.wandb`. Its browser, `wandb leet`, lists the folders of one folder whose
names begin with `run-`, in the order of these names, and takes the id from `run-<time>-<id>` in the name. So the list
is a folder of links, `run-<name> <number> <kind> run-<time>-<id>`, and the records stay where they are.
"""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Literal, NamedTuple, NoReturn, get_args

from vae_dist.errors import UserError
from vae_dist.files import make_folder, open_regular, writing
from vae_dist.runs.wandb_client import is_installed

Kind = Literal["training", "evaluation", "samples"]

KIND = "kind.txt"  # in a record's folder
LIST = ".wandb"  # in the folder of the runs
_DEPTH = 3  # of run directories below it; comparisons/<names>/<run> is one if the run itself is read-only
_INSIDE_A_RUN = {"wandb", "checkpoints", "samples", "images", "evaluations"}
_PROGRAMS: dict[bytes, Kind] = {
    b"train.py": "training", b"evaluate.py": "evaluation", b"compare.py": "evaluation", b"sample.py": "samples",
}  # fmt: skip
_PROGRAM = re.compile(rb"/vae_dist/(" + b"|".join(map(re.escape, _PROGRAMS)) + rb")")
_PROGRAM_WITHIN = 2**16  # bytes; it comes after the config
_FOLDER = re.compile(r"(?:offline-)?run-(\d{8}_\d{6})-.+", re.DOTALL)
_FILE = re.compile(r"run-([\w.-]{1,64})\.wandb", re.ASCII)
_LONGEST = 140  # bytes of a run's name in the list, so that all of an entry fits into the 255 of a file's name


class WandbRecord(NamedTuple):
    """A record of a run."""

    folder: Path
    time: str  # of its start, such as 20260102_030405
    id: str
    kind: str  # a Kind, or `record` if it is unknown


def mark(folder: Path, kind: Kind) -> None:
    """Note a record's kind in its folder, unless the folder is read-only."""
    with suppress(OSError):
        (folder / KIND).write_text(f"{kind}\n")


def browse(runs_dir: Path) -> NoReturn:
    """Replace this process by W&B's browser over the runs' records. It sends nothing.

    Raises UserError if there is no record or no terminal, if wandb is not installed, or if the list can't be made.
    """
    if not is_installed():
        raise UserError("wandb is not installed, and its browser shows the runs; pip install wandb")
    listed = str(make_list(runs_dir).absolute())  # begins with a slash, so it is never taken for an option
    if not _has_terminal():
        raise UserError("W&B's browser needs a terminal; `vae-dist report RUN` writes a page about a run without one")
    command = [sys.executable, "-m", "wandb", "leet", listed]
    # Online, the client would report its errors and its use.
    os.execve(sys.executable, command, {**os.environ, "WANDB_MODE": "offline"})


def _has_terminal() -> bool:
    """Whether keys can be read: from stdin, or from the terminal that this process belongs to."""
    if os.isatty(0):
        return True
    try:
        os.close(os.open("/dev/tty", os.O_RDWR))
    except OSError:
        return False
    return True


def make_list(runs_dir: Path) -> Path:
    """Make or update the folder of links to the records of all runs in `runs_dir`, and return it.

    Raises UserError if there is no record, or if the folder can't be written to.
    """
    wanted = dict(entries(runs_dir))
    if not wanted:
        raise UserError(f"no run in {runs_dir} has a W&B record; train with tracking.wandb=offline, or give runs_dir=")
    folder = runs_dir / LIST
    make_folder(folder, "make it writable")
    with writing(folder, "make it writable"):
        for link in folder.glob("*run-*"):
            if link.is_symlink() and link.readlink() != wanted.get(link.name):
                link.unlink()
        for name, target in wanted.items():
            if not os.path.lexists(folder / name):
                (folder / name).symlink_to(target)
    return folder


def entries(runs_dir: Path) -> Iterator[tuple[str, Path]]:
    """Yield the name of each link in the list, unique, and its target relative to the list."""
    labels: set[str] = set()
    for run_dir, records in runs_with_records(runs_dir):
        label = _label(run_dir.relative_to(runs_dir))
        while label in labels:
            label += "~"
        labels.add(label)
        digits = len(str(len(records)))
        for number, record in enumerate(records, start=1):
            name = f"run-{label} {number:0{digits}d} {record.kind} run-{record.time}-{record.id}"
            yield name, Path("..") / record.folder.relative_to(runs_dir)


def runs_with_records(folder: Path, depth: int = _DEPTH) -> Iterator[tuple[Path, list[WandbRecord]]]:
    """Yield the run directories below a folder that have records, with their records, the oldest first."""
    try:
        paths = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError:  # not readable by this user
        return
    for path in paths:
        if depth < _DEPTH and path.name in _INSIDE_A_RUN:
            continue
        if records := _records(path):
            yield path, records
        if depth > 1:
            yield from runs_with_records(path, depth - 1)


def _records(run_dir: Path) -> list[WandbRecord]:
    records = []
    for folder in (run_dir / "wandb").glob("*run-*"):
        for file in folder.glob("run-*.wandb"):
            begun, named = _FOLDER.fullmatch(folder.name), _FILE.fullmatch(file.name)
            if begun and named:
                records.append(WandbRecord(folder, begun[1], named[1], _kind(file)))
    return sorted(records, key=lambda record: (record.time, record.folder.name))


def _kind(file: Path) -> str:
    """Return the kind noted next to a record; for records of earlier versions, that of the program that made it."""
    with suppress(OSError), open_regular(file.with_name(KIND)) as note:
        kind = note.read(100).decode(errors="replace").strip()
        return kind if kind in get_args(Kind) else "record"
    with suppress(OSError), open_regular(file) as record:
        if match := _PROGRAM.search(record.read(_PROGRAM_WITHIN)):
            return _PROGRAMS[match[1]]
    return "record"


def _label(path: Path) -> str:
    """The name of a run in the list: in one line, without anything that `wandb leet` takes for its record's time."""
    text = "".join(character if character.isprintable() else "?" for character in ":".join(path.parts))
    text = re.sub(r"(\d{8})_(\d{6})", r"\1-\2", text)
    if len(text.encode()) <= _LONGEST:
        return text
    return text.encode()[: _LONGEST - 7].decode(errors="ignore") + "~" + sha256(os.fsencode(path)).hexdigest()[:6]
