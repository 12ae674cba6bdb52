"""Metrics and pictures go to the run's directory, and to Weights & Biases if it is installed and enabled.

W&B gets nothing that is not in the directory too.
"""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from vae_dist.config import Config
from vae_dist.runs import wandb_run
from vae_dist.runs.metrics_log import MetricsLog
from vae_dist.runs.picture import Picture
from vae_dist.runs.wandb_records import Kind

logger = logging.getLogger(__name__)


class Sink(Protocol):
    """One destination of metrics and pictures."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...
    def pictures(self, step: int, pictures: Mapping[str, Picture]) -> None: ...
    def flush(self) -> None: ...
    def artifact(self, folder: Path) -> None: ...
    def close(self, error: BaseException | None) -> None: ...


class Tracker:
    """Sends metrics and pictures to their destinations, from the main process alone.

    Raises RunError if the run's directory can't be written to. W&B raises nothing and takes no time.
    """

    def __init__(self, sinks: list[Sink]) -> None:
        self._sinks = sinks

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log a record of metrics, such as `train/loss`, after `step` optimizer steps. An empty one is not logged."""
        for sink in self._sinks if values else []:
            sink.scalars(step, values)

    def pictures(self, step: int, draw: Callable[[], Mapping[str, Picture]]) -> None:
        """Log pictures by names that stay the same, so that a slider over the steps shows the learning.

        `draw` is called if there is a destination.
        """
        pictures = draw() if self._sinks else {}
        for sink in self._sinks:
            sink.pictures(step, pictures)

    def flush(self) -> None:
        """Sync all records so far to the disk, before a checkpoint that comes after them is published."""
        for sink in self._sinks:
            sink.flush()

    def artifact(self, folder: Path) -> None:
        """Upload a checkpoint as an artifact of the run; the folder itself stays in the run."""
        for sink in self._sinks:
            sink.artifact(folder)

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        """Close the destinations. W&B takes at most FINISH_SECONDS, and STOP_SECONDS after a StoppedError."""
        for sink in self._sinks:
            sink.close(error)


def track(
    config: Config, run_dir: Path, *, is_main: bool, start: int | None = None, again: str = "", live: bool = False,
    kind: Kind = "training",
) -> Tracker:  # fmt: skip
    """Return a run's tracker.

    `start` is the step that a training starts from. Records of later steps are removed, and so are those of that step
    in the group `again`, such as `validation`, which the training logs again. While a training writes the run (`live`),
    others leave W&B to it: two writers would lose records. `kind` is the kind of W&B's record.
    """
    if not is_main:
        return Tracker([])
    if live:
        logger.info("a training is writing %s: results go to files alone, and not to W&B", run_dir)
        return Tracker([MetricsLog(run_dir, None)])
    sinks: list[Sink] = [MetricsLog(run_dir, start, again)]
    if (run := wandb_run.start(config, run_dir, kind)) is not None:
        sinks.append(run)
    return Tracker(sinks)
