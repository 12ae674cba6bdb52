"""Finding the checkpoint that a path names, and opening it for evaluation, sampling and reports."""

import fcntl
import logging
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from vae_dist import config as configs
from vae_dist.config import Config
from vae_dist.distributed.world import World
from vae_dist.errors import UserError
from vae_dist.files import reason, require_no_links
from vae_dist.runs import manifest
from vae_dist.runs.checkpoint import INFERENCE_FILES, Checkpoint, open_when_visible
from vae_dist.runs.manifest import MANIFEST, BadCheckpointError
from vae_dist.runs.run import RunDirectory

logger = logging.getLogger(__name__)

READ_ATTEMPTS = 20  # to open a checkpoint of a live training before it is pruned


class Opened(NamedTuple):
    """A checkpoint that is open for evaluation, sampling or a report."""

    checkpoint: Checkpoint
    config: Config  # the run's, with the command's arguments applied
    output: Path  # the folder of the command's files
    live: bool  # whether a training is writing the run now

    @property
    def step(self) -> int:
        return self.checkpoint.step

    @property
    def run(self) -> RunDirectory:
        return RunDirectory(self.checkpoint.run_dir)

    def agreed(self, world: World) -> "Opened":
        """Return the main process's checkpoint on every process. Another process may have seen an older one."""
        own = self.checkpoint
        folder, config, output, live = world.on_main(lambda: (own.folder, self.config, self.output, self.live))
        return Opened(own if folder == own.folder else open_when_visible(folder), config, output, live)


def find(path: Path | None, runs_dir: Path, names: Collection[str] | None = None) -> Checkpoint:
    """Return the checkpoint that `path` names: itself, RUN/best, or a run's newest; by default the newest run's.

    Its files `names` are verified. Raises UserError if there is none.
    """
    try:
        return _find(_newest_run(runs_dir) if path is None else path, names)
    except OSError as error:
        raise UserError(f"can't read {runs_dir if path is None else path} ({reason(error)})") from error


@contextmanager
def open_checkpoint(path: Path | None, arguments: Sequence[str]) -> Iterator[Opened]:
    """Open the checkpoint that `path` names (see `find`), with `key=value` arguments.

    While the context lasts, no training prunes it.
    """
    runs_dir, rest = configs.take(arguments, "runs_dir")
    with _kept(path, Path(runs_dir)) as checkpoint:
        config = configs.load_reader(checkpoint.config, rest)
        run = RunDirectory(checkpoint.run_dir)
        output = Path(config.output) if config.output else run.directory
        if output == run.directory:
            require_no_links(output)
        yield Opened(checkpoint, config, output, run.is_training)


@contextmanager
def _kept(path: Path | None, runs_dir: Path) -> Iterator[Checkpoint]:
    """Call `find`, and hold a shared lock, so that no training prunes the checkpoint."""
    for _ in range(READ_ATTEMPTS):
        checkpoint = find(path, runs_dir, INFERENCE_FILES)
        try:
            file = manifest.open_small(checkpoint.folder / MANIFEST)
        except BadCheckpointError:
            continue  # pruned in the meantime
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError as error:
                logger.info("%s can't be locked (%s)", checkpoint.folder, reason(error))
            if (checkpoint.folder / MANIFEST).exists():
                yield checkpoint
                return
    raise UserError(f"{path or runs_dir}: its checkpoints are pruned faster than they can be opened; try again")


def _newest_run(runs_dir: Path) -> Path:
    runs = {}
    if runs_dir.is_dir():
        next(runs_dir.iterdir(), None)  # a glob skips a folder that may not be listed
    for file in runs_dir.glob("*/checkpoints/step_*/" + MANIFEST):
        with suppress(FileNotFoundError):  # just pruned by a training
            runs[file.stat().st_mtime] = file.parents[2]
    if not runs:
        raise UserError(f"there is no trained run in {runs_dir}; train one first, or name a run's directory")
    return runs[max(runs)]


def _find(path: Path, names: Collection[str] | None) -> Checkpoint:
    if path.name == "checkpoints" and any(path.glob(f"step_*/{MANIFEST}")):
        path = path.parent
    if path.is_file() and (path.parent / MANIFEST).exists():
        path = path.parent
    if (path / MANIFEST).exists():
        return Checkpoint(path).verify(names)
    if path.name == "best" and not path.exists():
        return _best(path.parent, names)
    if not path.is_dir() and path.parent.name == "checkpoints" and path.parents[1].is_dir():
        raise UserError(
            f"there is no checkpoint at {path}: its training may have pruned it (checkpoint.keep keeps more); load "
            f"{path.parents[1]} for the newest"
        )
    if not path.is_dir():
        raise UserError(f"there is no run at {path}; give a run's directory or one of its checkpoints")
    newest = RunDirectory(path).newest(names)
    if newest is None:
        raise UserError(f"{path} has no checkpoint yet; give the directory of a run that has saved one")
    return newest


def _best(run_dir: Path, names: Collection[str] | None) -> Checkpoint:
    best = RunDirectory(run_dir).best(names)
    if best is not None:
        return best
    _find(run_dir, names)  # raises if there is no run or no checkpoint
    raise UserError(f"{run_dir} has no validation yet, so no best checkpoint; give {run_dir} for its newest")
