"""What a run's directory tells about the run, as far as it is there.

A run may come from a stranger. Its files are read under their fixed names and up to a size, and never through a link
that leads out of its directory; what no run would have written is passed over.
"""

import json
import re
import shlex
import struct
from collections.abc import Collection, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from vae_dist.config import Config
from vae_dist.runs import checkpoint, manifest, tracking
from vae_dist.runs.checkpoint import Opened, TrainingState

TEXT_BYTES = 2**26  # of metrics or a log; a row of metrics has 300
LINE_LENGTH = 1000  # of a log
PICTURE_BYTES = PICTURE_PIXELS = 2**24
LARGEST = 1e15  # a figure beyond it is none

_PICTURE = re.compile(r"([a-z]+)_step_(\d{8,15})\.png")
_LAUNCH = re.compile(r": (\d+) process(?:es)? on (\w+)(?: \(threads: (\d+)\))?, \w+$", re.MULTILINE)


class Record(NamedTuple):
    """A run, as one of its checkpoints and the files beside it tell."""

    home: Path
    step: int  # the checkpoint's
    config: Config
    state: TrainingState
    manifest: Mapping[str, Any]
    rows: list[dict[str, float]]
    evaluation: Mapping[str, Any]  # of this step, or of another if there is none; empty if there is none at all
    log: str
    is_being_trained: bool

    @property
    def path(self) -> str:
        """What `make ... RUN=` takes for it. It is where it was trained, so that it does not depend on who looks."""
        path = str(Path(self.config.runs_dir) / str(self.config.name))
        quoted = shlex.quote(path)  # for the command that make runs; what else make and the shell would read, for these
        return quoted if quoted == path else shlex.quote(quoted.replace("$", "$$"))

    @property
    def reached(self) -> int:
        """The last step that is known of."""
        return max([self.step, *(int(row["step"]) for row in self.rows if "train/loss" in row)])

    @property
    def last_step(self) -> int | None:
        """The step that it trains up to, where that is known."""
        per_epoch = re.findall(r"(\d+) steps an epoch", self.log)
        return self.config.train.steps or (self.config.train.epochs * int(per_epoch[-1]) if per_epoch else None)

    @property
    def launches(self) -> list[tuple[str, str, str]]:
        """Processes, device and threads of every start; threads are empty on a GPU."""
        return _LAUNCH.findall(self.log)

    def points(self, name: str) -> list[tuple[int, float]]:
        """A figure's values by step."""
        return sorted({int(row["step"]): row[name] for row in self.rows if name in row}.items())

    def grids(self, kinds: Collection[str], most: int) -> dict[tuple[str, int], Image.Image]:
        """The pictures of these kinds by kind and step, in this order; of at most so many steps, evenly chosen."""
        paths = sorted((self.home / "images").glob("*_step_*.png"))
        matches = [match for path in paths if (match := _PICTURE.fullmatch(path.name)) and match[1] in kinds]
        steps = sorted({int(match[2]) for match in matches})
        if len(steps) > most:
            steps = [steps[index * (len(steps) - 1) // (most - 1)] for index in range(most)]
        chosen = [match for match in matches if int(match[2]) in steps]
        pictures = {(match[1], int(match[2])): _grid(self.home, f"images/{match[0]}") for match in chosen}
        return {key: picture for key, picture in pictures.items() if picture is not None}


def read(opened: Opened) -> Record:
    """All that there is about the run of a checkpoint. Evaluations in the folder for output come first."""
    folder = opened.folder
    home = folder.parents[1] if folder.parent.name == "checkpoints" else folder
    lines = _content(home, "log.txt", TEXT_BYTES).decode(errors="replace").splitlines()
    return Record(
        home,
        opened.step,
        checkpoint.read_config(folder),
        checkpoint.read_state(folder),
        manifest.read(folder),
        _rows(_content(home, tracking.METRICS, TEXT_BYTES)),
        _evaluation([opened.output, home], opened.step),
        "\n".join(line[:LINE_LENGTH] for line in lines),
        checkpoint.is_being_trained(home),
    )


def is_number(value: Any) -> bool:
    """Whether a value from a file is a number that can be shown."""
    return type(value) in (int, float) and abs(value) < LARGEST  # which a NaN is not


def _content(home: Path, name: str, most: int) -> bytes:
    """A file below `home` of at most `most` bytes; nothing where there is no such file."""
    path = home / name
    try:
        if path.resolve().is_relative_to(home.resolve()) and path.is_file() and path.stat().st_size <= most:
            return path.read_bytes()
    except (OSError, RuntimeError):  # no permission; links in a circle
        pass
    return b""


def _rows(text: bytes) -> list[dict[str, float]]:
    """The rows of the metrics file, with what in them are numbers."""
    found = []
    for row in map(_parse, text.splitlines()):
        numbers = {name: float(value) for name, value in row.items() if is_number(value)}
        if numbers.get("step", -1) >= 0:
            found.append(numbers)
    return found


def _evaluation(folders: Sequence[Path], step: int) -> dict[str, Any]:
    """The newest evaluation of this step; where there is none, the newest of all."""
    found = []
    for folder in folders:
        kept = sorted(path.name for path in folder.glob(f"evaluations/step_{step:08d}_*.json"))
        for name in ("evaluation.json", *(f"evaluations/{name}" for name in kept)):
            found.append(_parse(_content(folder, name, manifest.SMALL_FILE_BYTES)))
    found = [evaluation for evaluation in found if is_number(evaluation.get("negative_elbo"))]
    return next((one for one in found if one.get("step") == step), found[0] if found else {})


def _parse(text: bytes) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _grid(home: Path, name: str) -> Image.Image | None:
    """A grid without the strip of its caption; None for what no run would have written."""
    content = _content(home, name, PICTURE_BYTES)
    if content[:8] != b"\x89PNG\r\n\x1a\n" or len(content) < 24:
        return None
    width, height = struct.unpack(">II", content[16:24])
    if not 0 < width * height <= PICTURE_PIXELS:  # known before anything is unpacked
        return None
    try:
        picture = Image.open(BytesIO(content), formats=["PNG"]).convert("RGB")
    except (OSError, SyntaxError, ValueError):
        return None
    pixels = np.asarray(picture)
    # A grid's first row and column are grey; what lies beyond it is white.
    right, bottom = (int((line == 255).all(1).argmax()) or len(line) for line in (pixels[0], pixels[:, 0]))
    is_grey = (pixels == pixels[..., :1]).all()
    return picture.crop((0, 0, right, bottom)).convert("L" if is_grey else "RGB")
