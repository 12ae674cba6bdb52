"""The training of one VAE, from its config to its run directory. Every process runs this same code."""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from vae_dist import config as configs
from vae_dist import objectives
from vae_dist.config import Config
from vae_dist.data import datasets
from vae_dist.data.batches import Batches
from vae_dist.data.datasets import Images
from vae_dist.distributed import environment, fingerprints, processes
from vae_dist.distributed.precision import param_dtype
from vae_dist.distributed.stopping import StopRequests, Watch
from vae_dist.distributed.world import World
from vae_dist.files import writing
from vae_dist.models import build_vae
from vae_dist.plan import Plan
from vae_dist.runs import checkpoint, console, tracking
from vae_dist.runs.checkpoint import TrainingState
from vae_dist.runs.console import TrainingProgress
from vae_dist.runs.start import ELSEWHERE, Start, settle
from vae_dist.training.meter import Meter
from vae_dist.training.milestones import Milestones, Recording
from vae_dist.training.update import Update

logger = logging.getLogger(__name__)


def train(asked: Config) -> Path:
    """Train one VAE and return its run directory.

    Raises UserError, on every process and before anything is written, for a config that can't be run here; RunError for
    a run that can't go on; StoppedError when it was asked to stop, once it has saved.
    """
    with ExitStack() as held, processes.join(asked) as world:
        console.start(world)
        world.assert_equal_everywhere(lambda: {**configs.flatten(asked), **fingerprints.versions()})
        world.compare_processors()
        start = world.on_main(lambda: settle(asked, world, held))
        config, run_dir, resumed_from = start
        environment.set_threads(config)
        training, validation = datasets.load_training(config.data)
        world.assert_equal_everywhere(lambda: _seen(training, validation))
        plan = Plan(config.seed, len(training.labels), config.train.batch_size)
        last_step = config.train.steps or config.train.epochs * plan.steps_per_epoch
        validate_every = config.train.validate_every or plan.steps_per_epoch
        save_every = config.checkpoint.every or plan.steps_per_epoch
        verify_every = config.runtime.verify_every or math.inf
        vae = build_vae(config, training.pixels.shape[1:]).to(world.device, param_dtype(config.train.precision))
        update = Update(vae, config, world)
        state = update.restore(resumed_from) if resumed_from else TrainingState()
        if state.step >= last_step and not state.validation_pending:
            logger.info("run %s is finished: %d steps of %d; train.epochs=... goes on", run_dir, state.step, last_step)
            return run_dir
        update.assert_equal_weights(state.step)
        batches = Batches(training, plan, config, world)
        meter = Meter(update.totals[:5], world, plan.batch_size, state.window)
        most_steps = min(update.most_steps, batches.most_steps)
        ends = config.train.log_every, validate_every, save_every, verify_every
        world.set_timeout(config.runtime.timeout)
        with _recording(start, world, state, last_step, plan) as recording:
            at = Milestones(start, world, update, meter, recording, (training, validation), state, last_step)
            with at.saved_when_stopped():
                for steps in launches(state.step, last_step, most_steps, ends, recording.watch):
                    moving = [objectives.schedule(config, step, last_step) for step in steps]
                    update(*batches(steps), moving)
                    meter.count(len(steps))
                    done = steps.stop
                    if due(done, config.train.log_every, last_step):
                        at.row(done, moving[-1])
                    improved = due(done, validate_every, last_step) and at.validate(done)
                    if due(done, verify_every, last_step):
                        update.assert_equal_weights(done)
                    if improved or due(done, save_every, last_step):
                        at.save(done)
                    if done >= recording.watch.next_step:
                        at.look(done)
    return run_dir


def _seen(training: Images, validation: Images) -> dict[str, str]:
    """Hashes of the images: no process may have others."""
    shown = {"the training images": training, "the validation images": validation}
    return {name: fingerprints.fingerprint([images.pixels]) for name, images in shown.items()}


def due(done: int, every: float, last_step: int) -> bool:
    """Whether something that happens every so many steps happens after `done` of them. It always does at the end."""
    return done % every == 0 or done == last_step


def launches(step: int, last_step: int, most: int, ends: Sequence[float], watch: Watch) -> Iterator[range]:
    """The steps from `step` on, in ranges to be launched at once: as long as a power of two, and at most `most`.

    A range ends where something happens after every so many steps, or where `watch` wants to look up.
    """
    while step < last_step:
        end = min(last_step, watch.next_step, *(step - step % every + every for every in ends))
        count = 2 ** (min(int(end) - step, most).bit_length() - 1)
        yield range(step, step + count)
        step += count


@contextmanager
def _recording(start: Start, world: World, state: TrainingState, last_step: int, plan: Plan) -> Iterator[Recording]:
    """The run's tracker, its progress and its watch for requests to stop, for as long as it trains."""
    config, run_dir, _ = start
    with ExitStack() as kept:
        requests = kept.enter_context(StopRequests())
        again = "validation" if state.validation_pending else ""
        trackers = []

        def begin() -> None:
            with writing(run_dir, ELSEWHERE):
                checkpoint.go_back(run_dir, state.step)
                configs.save(config, run_dir / "config.yaml")
                kept.enter_context(console.logged_to(run_dir / "log.txt"))
            _announce(start, world, state.step, last_step, plan)
            trackers.append(tracking.track(config, run_dir, is_main=True, start=state.step, again=again))

        world.on_main(begin)  # where this fails it does so on all processes
        tracker = trackers[0] if trackers else tracking.Tracker([])
        progress = TrainingProgress(world.is_main, state.step, last_step, plan.steps_per_epoch)
        kept.enter_context(tracker)
        yield Recording(tracker, kept.enter_context(progress), Watch(requests, world, state.step))
        if world.is_main and config.tracking.artifact:
            tracker.artifact(checkpoint.best_or_newest(run_dir))
    progress.table(f"{run_dir}, step {last_step}")


def _announce(start: Start, world: World, step: int, last_step: int, plan: Plan) -> None:
    config, run_dir, _ = start
    processes = "1 process" if world.size == 1 else f"{world.size} processes"
    threads = f" (threads: {config.train.threads})" if world.device.type == "cpu" else ""
    logger.info("%s: %s on %s%s, %s", run_dir, processes, world.device.type, threads, config.train.precision)
    logger.info(
        "%s: %d training images, binarize=%s, %d steps an epoch", config.data.name, plan.size, config.data.binarize,
        plan.steps_per_epoch,
    )  # fmt: skip
    if config.train.compile:
        logger.info("the step is compiled, which takes some seconds (train.compile=false does without)")
    if step:
        logger.info("going on after step %d of %d", step, last_step)
    else:
        logger.info("to continue after a stop: name=%s", config.name)
