"""The training of one VAE, from its config to its run's directory. Every process runs this code."""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from vae_dist import config as configs
from vae_dist.config import Config
from vae_dist.config.differences import falls_at_the_end
from vae_dist.data.batches import Batches
from vae_dist.distributed import environment, failures, fingerprints, processes
from vae_dist.distributed.precision import param_dtype
from vae_dist.distributed.stopping import StopRequests, Watch
from vae_dist.distributed.world import World
from vae_dist.files import writing
from vae_dist.models.diffusers_start import start_vae
from vae_dist.plan import Plan
from vae_dist.runs import tracking
from vae_dist.runs.claim import Resolved, claim
from vae_dist.runs.run import ANOTHER_RUNS_DIR, LOG
from vae_dist.runs.starts import Start, write_start
from vae_dist.runs.state import TrainingState
from vae_dist.terminal import console
from vae_dist.terminal.progress import TrainingProgress
from vae_dist.training.cadence import Cadence, due, launches
from vae_dist.training.meter import Meter
from vae_dist.training.milestones import Milestones, Outputs
from vae_dist.training.recipes import check_recipe, warn_of_idle_options
from vae_dist.training.update import make_update

logger = logging.getLogger(__name__)


def train(config: Config, *, is_command: bool = True) -> Path:
    """Train one VAE and return its run's directory.

    Raises UserError, on every process and before anything is written, for a config that can't be run here; RunError if
    the run can't continue; StoppedError after a request to stop, once the run is saved. A second request ends the
    process, but of a caller's, unless it `is_command`, a second Ctrl-C is a KeyboardInterrupt.
    """
    with ExitStack() as stack, processes.join(config) as world:
        console.start(world)
        given = {**configs.flatten(config), **fingerprints.versions()}
        world.assert_equal_everywhere(lambda: given)
        world.compare_processors()
        check_recipe(config)
        resolved, training, validation = stack.enter_context(claim(config, world))
        config, run, resumed_from = resolved
        environment.set_threads(config)
        images = {"the training images": training.info.identity, "the validation images": validation.info.identity}
        world.assert_equal_everywhere(lambda: images)
        plan = Plan(config.seed, training.info.count, config.train.batch_size)
        cadence = Cadence.of(config, plan)
        vae = start_vae(config, training.info, resumed_from).to(world.device, param_dtype(config.train.precision))
        update = make_update(vae, config, world, cadence.last_step)
        state = update.restore(resumed_from) if resumed_from else TrainingState()
        if state.step >= cadence.last_step and not state.validation_pending:
            _log_finished(resolved, state.step, cadence.last_step)
            return run.directory
        update.assert_equal_weights(state.step)
        batches = Batches(training, plan, config, world, update.recipe.noise_shape)
        meter = Meter(update, world, plan.batch_size, state.window)
        world.set_timeout(config.runtime.timeout)
        with _outputs(resolved, world, state, cadence, plan, is_command) as outputs:
            milestones = Milestones(
                resolved, world, update, meter, outputs, (training, validation), state, cadence.last_step
            )
            with milestones.saved_when_stopped():
                for steps in launches(state.step, cadence, min(update.most_steps, batches.most_steps), outputs.watch):
                    values = [update.recipe.values(step) for step in steps]
                    update(batches(steps), values)
                    milestones.launched(steps)
                    done = steps.stop
                    if due(done, cadence.log_every, cadence.last_step):
                        milestones.log(done, values[-1])
                    improved = due(done, cadence.validate_every, cadence.last_step) and milestones.validate(done)
                    if due(done, cadence.verify_every, cadence.last_step):
                        update.assert_equal_weights(done)
                    if improved or due(done, cadence.save_every, cadence.last_step):
                        milestones.save(done)
                    if done >= outputs.watch.next_step:
                        milestones.check_stop(done)
    return run.directory


@contextmanager
def _outputs(
    resolved: Resolved, world: World, state: TrainingState, cadence: Cadence, plan: Plan, is_command: bool
) -> Iterator[Outputs]:
    """Open the run's tracker, progress bar and log, and watch for requests to stop, while the context lasts."""
    config, run, _ = resolved
    with ExitStack() as stack:
        requests = stack.enter_context(StopRequests(ends_process=is_command or world.size > 1))
        again = "validation" if state.validation_pending else ""
        trackers = []

        def begin() -> None:
            with writing(run.directory, ANOTHER_RUNS_DIR):
                run.resume_from(state.step)
                configs.save(config, run.directory / "config.yaml")
                write_start(run.directory, _start(config, world, state.step, cadence.last_step, plan))
                stack.enter_context(console.logged_to(run.directory / LOG))
            _log_start(resolved, world, state.step, cadence.last_step, plan)
            trackers.append(tracking.track(config, run.directory, is_main=True, start=state.step, again=again))

        world.on_main(begin)  # if this fails, all processes raise
        tracker = trackers[0] if trackers else tracking.Tracker([])
        progress = TrainingProgress(world.is_main, state.step, cadence.last_step, plan.steps_per_epoch)
        stack.enter_context(tracker)
        shown = stack.enter_context(progress)
        stack.enter_context(failures.full_memory_explained())  # first, so that the log has it too
        yield Outputs(tracker, shown, Watch(requests, world, state.step))
        if world.is_main and config.tracking.artifact and (checkpoint := run.best() or run.newest()) is not None:
            tracker.artifact(checkpoint.folder)
    progress.table(f"{run.directory}, step {cadence.last_step}")


def _start(config: Config, world: World, step: int, last_step: int, plan: Plan) -> Start:
    return Start.now(
        step=step,
        last_step=last_step,
        steps_per_epoch=plan.steps_per_epoch,
        training_images=plan.size,
        processes=world.size,
        device=world.device.type,
        threads=config.train.threads,
        precision=config.train.precision,
        dataset=config.data.name,
        accumulate=config.train.accumulate,
        compiled=config.train.compile,
    )


def _log_start(resolved: Resolved, world: World, step: int, last_step: int, plan: Plan) -> None:
    config, run, _ = resolved
    processes = "1 process" if world.size == 1 else f"{world.size} processes"
    threads = f" (threads: {config.train.threads})" if world.device.type == "cpu" else ""
    logger.info("%s: %s on %s%s, %s", run.directory, processes, world.device.type, threads, config.train.precision)
    logger.info(
        "%s: %d training images, binarize=%s, %d steps an epoch",
        config.data.title, plan.size, config.data.binarization, plan.steps_per_epoch,
    )  # fmt: skip
    if config.train.compile:
        logger.info("the step is compiled, which takes some seconds (train.compile=false runs it uncompiled)")
    warn_of_idle_options(config, last_step)
    if step:
        logger.info("resuming after step %d of %d", step, last_step)
    else:
        logger.info("to resume after a stop: name=%s", config.name)


def _log_finished(resolved: Resolved, step: int, last_step: int) -> None:
    config, run, _ = resolved
    if falls_at_the_end(config):
        then = f"optim.schedule={config.optim.schedule} has fallen to 0, so choose another name to train for longer"
    else:
        then = f"a larger {'train.epochs' if config.train.steps is None else 'train.steps'} extends it"
    logger.info("run %s is finished: %d steps of %d; %s", run.directory, step, last_step, then)
