"""Between steps: metrics records, validations, checkpoints, and the end of a run that was asked to stop."""

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from vae_dist import config as configs
from vae_dist.compute.transfers import fetched
from vae_dist.config import Config
from vae_dist.data.source import Source
from vae_dist.distributed import environment
from vae_dist.distributed.contention import Contention
from vae_dist.distributed.stopping import Watch
from vae_dist.distributed.world import World
from vae_dist.errors import RunError, StoppedError
from vae_dist.evaluation.metrics import score
from vae_dist.models.likelihoods import likelihood_kind
from vae_dist.runs.claim import Resolved
from vae_dist.runs.picture import Picture
from vae_dist.runs.state import Best, TrainingState
from vae_dist.runs.tracking import Tracker
from vae_dist.terminal.progress import TrainingProgress
from vae_dist.training.meter import Meter, Window
from vae_dist.training.update import NotFiniteError, Update
from vae_dist.views import pictures

logger = logging.getLogger(__name__)


class Outputs(NamedTuple):
    """The outputs of a running training, and its stop signal."""

    tracker: Tracker
    progress: TrainingProgress
    watch: Watch


class Milestones:
    """Everything that a run does between steps. All processes call each method after the same step.

    The main process writes. If that fails, all processes raise the same RunError.
    """

    def __init__(
        self,
        resolved: Resolved,
        world: World,
        update: Update,
        meter: Meter,
        outputs: Outputs,
        images: tuple[Source, Source],
        state: TrainingState,
        last_step: int,
    ) -> None:
        self._config, self._run, _ = resolved
        self._world = world
        self._update = update
        self._recipe = update.recipe
        self._meter = meter
        self._tracker, self._progress, self._watch = outputs
        self._training, self._validation = images
        self._last_step = last_step
        self._first_step = self._step = self._saved_step = state.step
        self._best = world.on_main(lambda: self._run.kept(state.best))
        self._validation_pending = state.validation_pending
        self._unfinished: tuple[int, Mapping[str, float], Window] | None = None  # record
        self._check: tuple[int, Callable[[], Tensor]] | None = None  # for a request to stop, begun after that step
        self._is_late = update.most_steps > 1  # records and checks: a GPU would be idle meanwhile
        self._contention: Contention | None = None  # from the first step on, until there is a warning

    @contextmanager
    def saved_when_stopped(self) -> Iterator[None]:
        """If the run is asked to stop inside the context, save it, and say how to resume it."""
        try:
            if self._validation_pending:
                self.validate(self._step)
                self.save(self._step)
            yield
        except StoppedError as stopped:
            if self._step > self._saved_step:
                self.save(self._step)
            raise StoppedError(
                f"{stopped}; step {self._step} of {self._last_step} is saved, the same command with "
                f"name={self._config.name} resumes",
                stopped.exit_code,
            ) from None

    def launched(self, steps: range) -> None:
        """Count steps that have just been launched."""
        self._step = steps.stop
        self._finish_log()
        self._meter.count(len(steps))

    def log(self, step: int, now: Mapping[str, float]) -> None:
        """Log the training metrics of the steps since the last record.

        If many steps are launched at once, the record is written after the next launch, or before what else is due.
        """
        self._unfinished = step, now, self._meter.cut()
        if not self._is_late:
            self._finish_log()

    def _finish_log(self) -> None:
        """Write the record that `log` has begun, if there is one."""
        if self._unfinished is None:
            return
        (step, now, window), self._unfinished = self._unfinished, None
        skipped = self._require_healthy(step, window.totals())
        self._update.assert_equal_weights(step)
        record = {**self._meter.metrics(window), **{f"train/{name}": value for name, value in now.items()}}
        if self._config.train.nonfinite == "skip":
            record["train/skipped_updates"] = skipped
        if self._world.is_main and record.get("train/spikes") == 1:
            logger.warning(
                "step %d: no update was applied since the last record: gradients have a norm of %.3g on average, and "
                "first_stage.skip_norm=%g",
                step, record["train/grad_norm"], self._config.first_stage.skip_norm,
            )  # fmt: skip
        self._world.on_main(partial(self._tracker.scalars, step, record))
        self._progress.show(step, record)
        self._warn_of_contention()

    def validate(self, step: int) -> bool:
        """Evaluate the validation images, draw the pictures, and return whether this validation is the best so far."""
        self._finish_log()
        self._require_healthy(step)
        self._validation_pending = True  # until it is done
        with self._meter.paused():
            terms = score(self._recipe.model, self._validation, self._world, self._config, self._watch.check_stop)
            metrics = terms.metrics("validation")
            criterion, best = self._recipe.criterion, self._best
            value = metrics.get(f"validation/{criterion}", math.nan)
            if self._world.is_main and metrics and not math.isfinite(value):
                logger.warning("step %d: validation/%s is %g: the model has diverged", step, criterion, value)
            improved = math.isfinite(value) and (best is None or best.metric != criterion or value < best.value)
            if improved:
                self._best = best = Best(step, value, criterion)
            if best is not None:  # tables of runs are sorted by it
                metrics[f"validation/best_{best.metric}"] = best.value
            self._world.on_main(partial(self._tracker.scalars, step, metrics))
            self._world.on_main(partial(self._tracker.pictures, step, partial(self._pictures, step)))
            self._progress.note(step, metrics)
        self._validation_pending = False
        return improved

    def save(self, step: int) -> None:
        """Publish a checkpoint."""
        self._finish_log()
        skipped = self._require_healthy(step)
        with self._meter.paused():
            self._update.assert_equal_weights(step)
            state = TrainingState(
                step=step,
                world_size=self._world.size,
                window=self._meter.window(),
                loss_scale=self._update.loss_scale(),
                best=self._best,
                skipped_updates=skipped,
                validation_pending=self._validation_pending,
            )
            self._world.on_main(partial(self._publish, state))
        self._saved_step = step

    def check_stop(self, step: int) -> None:
        """Raise RunError if an update was not finite, and StoppedError if any process was asked to stop.

        If many steps are launched at once, one call begins a check and the next completes it, after another launch. The
        check of a run's first step is completed at once.
        """
        is_first = step == self._first_step + 1
        if self._check is None:
            self._check = step, fetched(self._update.totals)
            if self._is_late and not is_first:
                return
        (checked, totals), self._check = self._check, None
        self._require_healthy(checked, totals())
        if is_first:
            self._finish_log()
            logger.info("the first step is done, %.1f s after the start", environment.seconds_since_start())
            self._meter.restart_clock()
            self._progress.restart_clock(step)
            self._contention = Contention() if self._world.is_main and self._world.device.type == "cpu" else None
        self._watch.check_stop_after(checked)

    def _warn_of_contention(self) -> None:
        if self._contention is not None and (warning := self._contention.warning(self._config.train.threads or 1)):
            logger.warning("%s", warning)
            self._contention = None

    def _publish(self, state: TrainingState) -> Path:
        self._tracker.flush()  # a checkpoint is never ahead of the records
        return self._run.save(self._config, self._recipe, state)

    def _require_healthy(self, step: int, totals: Tensor | None = None) -> int:
        """Call `Update.require_healthy`, and add advice to its error."""
        try:
            return self._update.require_healthy(step, totals)
        except NotFiniteError as error:
            now = self._recipe.values(error.step)
            raise RunError(
                f"the loss or the gradient is not finite in step {error.step + 1} (learning rate "
                f"{now['learning_rate']:g}), and the weights are still those of the step before. "
                f"{_advice(self._config, error.step)}"
            ).on_every_process() from None
        except RunError as error:
            raise RunError(f"{error}. {_advice(self._config, step)}").on_every_process() from None

    def _pictures(self, step: int) -> dict[str, Picture]:
        """Draw the grids of a validation. Without validation images they show training images, as the caption says."""
        held_out = self._validation.info.count > 0
        name = self._config.data.title
        subject = f"{name}, {'validation' if held_out else 'TRAINING'} images, step {step}"
        shown = self._validation if held_out else self._training
        return {
            "reconstructions": pictures.reconstructions(self._recipe.model, shown, subject),
            "samples": pictures.samples(
                self._recipe.model, f"model of {name}, step {step}", self._config.data.classes or ()
            ),
        }


def _advice(config: Config, updates: int) -> str:
    """Return options that may keep numbers finite, without those that this config has already.

    Before the first update (`updates` is 0) neither the learning rate nor gradient clipping can be the cause.
    """
    optim, suspects = config.optim, configs.suspects(config, has_scale=likelihood_kind(config.objective).has_scale)
    if updates == 0:
        suspects = [suspect for suspect in suspects if not suspect.startswith("optim.")]
    options = {
        "a lower optim.learning_rate": updates > 0 and optim.stages is None,
        "lower rates in optim.stages": updates > 0 and optim.stages is not None,
        "optim.max_grad_norm=100": updates > 0 and (optim.max_grad_norm is None or optim.max_grad_norm > 100),
        "optim.warmup_steps=500": updates > 0 and optim.warmup_steps < 500,
        "train.precision=fp32": config.train.precision in ("fp16", "bf16", "tf32"),
        "train.precision=fp64": updates == 0 and config.train.precision == "fp32",
    }
    remedies = [option for option, helps in options.items() if helps]
    if config.train.nonfinite != "skip" and updates > 0:
        remedies.append("or skip such updates by train.nonfinite=skip")
    cause = f"The likely cause is {' or '.join(suspects)}. " if suspects else ""
    if not remedies:
        return cause.rstrip(". ") or "Check the images and the sizes of the model"
    return f"{cause}Try {', '.join(remedies)}"
