"""The run that a report is about."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from vae_dist.config import Config
from vae_dist.evaluation import kept
from vae_dist.runs.checkpoint import Checkpoint
from vae_dist.runs.lookup import Opened
from vae_dist.runs.metrics import is_finite
from vae_dist.runs.run import RunDirectory


class Subject(NamedTuple):
    """A run as one of its checkpoints and the records next to it show it."""

    run: RunDirectory
    checkpoint: Checkpoint
    evaluation: Mapping[str, Any]  # of the checkpoint's step, or else of another; empty if there is none
    is_training: bool

    @property
    def step(self) -> int:
        return self.checkpoint.step

    @property
    def config(self) -> Config:
        return self.checkpoint.config

    @property
    def path(self) -> str:
        """The run's path at training time, so that it does not depend on the reader."""
        return str(Path(self.config.runs_dir) / str(self.config.name))

    @property
    def reached(self) -> int:
        """The last known step."""
        return max([self.step, *(step for step, _ in self.run.points("train/loss"))])

    @property
    def last_step(self) -> int | None:
        """The step that the run trains up to; None if that is not recorded."""
        return self.run.starts[-1].last_step if self.run.starts else self.config.train.steps


def subject_of(opened: Opened) -> Subject:
    """Return the subject of a report about an open checkpoint, with an evaluation of the weights that are open."""
    evaluations = [one.values for one in kept.of_checkpoint(opened)]
    evaluations = [values for values in evaluations if is_finite(values.get("negative_elbo"))]
    evaluations = [values for values in evaluations if values.get("split") != "all"]  # of images that are not the run's
    of_this_step = (values for values in evaluations if values.get("step") == opened.step)
    evaluation = next(of_this_step, evaluations[0] if evaluations else {})
    return Subject(opened.run, opened.checkpoint, evaluation, opened.live)
