"""A run's directory: its writer, its checkpoints, and the records next to them.

A run may be untrusted. Its files are read under fixed names and up to a size, and never through a link that leads out
of the directory; content that no run writes is skipped.
"""

import fcntl
import logging
import re
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from vae_dist import locks
from vae_dist.config import Config
from vae_dist.data.image_files import DamagedError, explained, open_image
from vae_dist.errors import UserError
from vae_dist.files import make_folder, parse_object, reason, require_no_links, writing
from vae_dist.runs import saving
from vae_dist.runs.checkpoint import Checkpoint, Trained
from vae_dist.runs.manifest import MANIFEST, BadCheckpointError
from vae_dist.runs.metrics import METRICS, is_number, read_records
from vae_dist.runs.starts import STARTS, Start, parse_starts
from vae_dist.runs.state import Best, TrainingState

logger = logging.getLogger(__name__)

LOCK, MARK, LOG = ".lock", ".writer.json", "log.txt"
EVALUATION, EVALUATIONS, IMAGES = "evaluation.json", "evaluations", "images"
ANOTHER_RUNS_DIR = "choose another runs_dir"
LOCK_SECONDS = 10.0  # for a training that was asked to stop to release the directory
TEXT_BYTES = 2**26  # of a log or the starts
METRICS_BYTES = 2**30
EVALUATION_BYTES = 2**24  # the KL of each latent takes 30 bytes
PICTURE_BYTES = PICTURE_PIXELS = 2**24
LINE_LENGTH = 1000  # characters of a line of the log

_PICTURE = re.compile(r"([a-z]+)_step_(\d{8,15})\.png")


class Evaluation(NamedTuple):
    """The content of an evaluation's file."""

    path: Path
    values: dict[str, Any]


class RunDirectory:
    """One run's directory. Files are read on access, and the directory need not exist."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    # ---- Writing

    @contextmanager
    def claim(self, take_over: str | None = None, *, is_new: bool = False) -> Iterator[None]:
        """Hold the directory for one training: make it, lock it, and finish what a killed training was saving.

        Raises UserError if the directory can't be written to, holds links, or belongs to another live training, and
        FileExistsError if it has to be new and exists.
        """
        make_folder(self.directory, ANOTHER_RUNS_DIR, is_new=is_new)
        require_no_links(self.directory)
        with self._locked(take_over):
            with writing(self.directory, ANOTHER_RUNS_DIR):
                saving.recover(self.directory)
            yield

    def save(self, config: Config, trained: Trained, state: TrainingState) -> Path:
        """Publish a checkpoint, prune older ones, and return its folder. Raises RunError if it can't be written."""
        return saving.save_checkpoint(self.directory, config, trained, state)

    def resume_from(self, step: int) -> None:
        """Set aside checkpoints of later steps, so that an interrupted training does not resume from them.

        So are evaluations of later steps: the training may reach those steps with other weights.
        """
        saving.set_aside_after(self.directory, step)
        for path, values in filter(None, [self.evaluation, *self.evaluations()]):
            if is_number(values.get("step")) and values["step"] > step:
                for file in (path, path.with_suffix(".csv")):
                    if file.is_file():
                        saving.set_aside(file)

    def kept(self, best: Best | None) -> Best | None:
        """Return the best validation of a state that a training starts from; None if its checkpoint is not here.

        A branch's may be in another run, and one that the training has gone back behind may have replaced it.
        """
        is_here = best is not None and (saving.folder_of(self.directory, best.step) / MANIFEST).exists()
        return best if is_here else None

    @contextmanager
    def _locked(self, take_over: str | None) -> Iterator[None]:
        """Lock the directory; if the file system has no locks, hold the file MARK. `take_over` names a dead one."""
        subject = f"another training is writing {self.directory}"
        with ExitStack() as stack:
            try:
                with writing(self.directory, ANOTHER_RUNS_DIR):
                    problem = stack.enter_context(locks.locked(self.directory / LOCK, LOCK_SECONDS, subject))
                    if problem is not None:
                        stack.enter_context(locks.marked(self.directory / MARK, LOCK_SECONDS, subject, take_over))
            except locks.InUseError as error:
                raise UserError(self._in_use(error)) from None
            if problem is not None:
                logger.warning(
                    "%s can't be locked (%s): the file %s keeps other trainings out, and stays if this process is "
                    "killed",
                    self.directory, reason(problem), MARK,
                )  # fmt: skip
            yield

    def _in_use(self, error: locks.InUseError) -> str:
        remedy = "wait for its end, or choose another name for a run of its own"
        if error.mark is not None:
            remedy += f"; if it is gone (this file system has no locks to tell), give checkpoint.take_over={error.mark}"
        return f"another training is writing {self.directory} ({error}); {remedy}"

    # ---- Reading

    @property
    def is_training(self) -> bool:
        """True while a training holds the directory."""
        return locks.is_held(self.directory / LOCK, fcntl.LOCK_SH, self.directory / MARK)

    def newest(self, names: Collection[str] | None = None) -> Checkpoint | None:
        """Return the newest checkpoint whose files `names`, by default all, are intact, None if there is no checkpoint.

        Raises UserError if all are damaged.
        """
        folders = saving.step_folders(self.directory)
        for folder in folders:
            try:
                return Checkpoint(folder).verify(names)
            except BadCheckpointError as error:
                if folder.exists():  # otherwise it was pruned at this moment
                    logger.warning("skipping a checkpoint: %s", error)
        if folders:
            where = self.directory / "checkpoints"
            raise UserError(
                f"all checkpoints in {where} are damaged; nothing was started or changed. Put an intact copy of one "
                "there, or train under another name"
            )
        return None

    def best(self, names: Collection[str] | None = None) -> Checkpoint | None:
        """Return the best checkpoint by validation, None if there was none. Raises UserError if it is damaged."""
        newest = self.newest(names)
        if newest is None or newest.state.best is None:
            return None
        folder = saving.folder_of(self.directory, newest.state.best.step)
        return newest if folder == newest.folder else Checkpoint(folder).verify(names)

    @cached_property
    def metrics(self) -> list[dict[str, float]]:
        """The records of metrics in the order of the file. Values that are not numbers are left out."""
        path = self._inside(METRICS, METRICS_BYTES)
        records = read_records(path) if path else ()
        return [{name: float(value) for name, value in record.items() if is_number(value)} for record in records]

    def points(self, metric: str) -> list[tuple[int, float]]:
        """Return a metric's values by step, such as those of `train/loss`."""
        return sorted({int(record["step"]): record[metric] for record in self.metrics if metric in record}.items())

    @property
    def evaluation(self) -> Evaluation | None:
        """The newest evaluation; None if there is none."""
        return self._evaluation(EVALUATION)

    def evaluations(self, name: str = "*") -> list[Evaluation]:
        """Return the kept evaluations by name, those whose names match a pattern such as `step_00000040_test*`."""
        names = sorted(path.name for path in (self.directory / EVALUATIONS).glob(f"{name}.json"))
        return [kept for name in names if (kept := self._evaluation(f"{EVALUATIONS}/{name}")) is not None]

    def pictures(self, kinds: Collection[str], most: int) -> dict[tuple[str, int], Image.Image]:
        """Return the pictures of these kinds by (kind, step), in this order, of at most `most` evenly spaced steps."""
        paths = sorted((self.directory / IMAGES).glob("*_step_*.png"))
        matches = [match for path in paths if (match := _PICTURE.fullmatch(path.name)) and match[1] in kinds]
        steps = sorted({int(match[2]) for match in matches})
        if len(steps) > most:
            steps = [steps[index * (len(steps) - 1) // max(most - 1, 1)] for index in range(most)]
        chosen = [match for match in matches if int(match[2]) in steps]
        pictures = {(match[1], int(match[2])): self._picture(f"{IMAGES}/{match[0]}") for match in chosen}
        return {key: picture for key, picture in pictures.items() if picture is not None}

    @cached_property
    def starts(self) -> list[Start]:
        """The starts of the training, the first one first. Runs of earlier versions have none."""
        return parse_starts(self._content(STARTS, TEXT_BYTES))

    @cached_property
    def log(self) -> str:
        """The text of the log; the rest of a long line is left out."""
        lines = self._content(LOG, TEXT_BYTES).decode(errors="replace").splitlines()
        return "\n".join(line[:LINE_LENGTH] for line in lines)

    def _inside(self, name: str, most: int) -> Path | None:
        """Return the path of a file of at most `most` bytes that lies in the directory once links are resolved."""
        path = self.directory / name
        try:
            if path.resolve().is_relative_to(self.directory.resolve()) and path.is_file():
                if path.stat().st_size <= most:
                    return path
                logger.warning("%s is not read: it has more than %d MiB", path, most // 2**20)
        except (OSError, RuntimeError):  # no permission; links in a circle
            pass
        return None

    def _content(self, name: str, most: int) -> bytes:
        path = self._inside(name, most)
        try:
            return path.read_bytes() if path else b""
        except OSError:
            return b""

    def _evaluation(self, name: str) -> Evaluation | None:
        try:
            values = parse_object(self._content(name, EVALUATION_BYTES) or b"{}")
        except ValueError:
            logger.warning("skipping an evaluation: %s does not hold a JSON object", self.directory / name)
            return None
        return Evaluation(self.directory / name, values) if values else None

    def _picture(self, name: str) -> Image.Image | None:
        with suppress(DamagedError), explained():
            picture = open_image(BytesIO(self._content(name, PICTURE_BYTES)))
            if picture.format == "PNG" and picture.width * picture.height <= PICTURE_PIXELS:
                return picture.convert("L" if picture.mode == "L" else "RGB")
        return None
