"""The training of one VAE, from its config to its run directory. Every process runs this same code.

B is the global batch, b a process's share of it, L latents, C, H, W image.
"""

import logging
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from vae_dist import checkpoint, console, data, images, objective, runtime, tracking
from vae_dist import config as configs
from vae_dist.checkpoint import TrainingState
from vae_dist.config import Config
from vae_dist.console import TrainingProgress
from vae_dist.data import Images
from vae_dist.evaluation import score
from vae_dist.images import Picture
from vae_dist.meter import Meter
from vae_dist.model import build_vae
from vae_dist.model.vae import VAE
from vae_dist.plan import Plan, bernoulli_pixels, share
from vae_dist.runtime import World
from vae_dist.start import settle
from vae_dist.tracking import Tracker

logger = logging.getLogger(__name__)


def train(asked: Config) -> Path:
    """Train one VAE and return its run directory.

    Raises UserError, on every process and before anything is written, for a config that can't be run here.
    """
    with runtime.join(asked) as world:
        console.start(is_main=world.is_main)
        world.require_agreement(lambda: {**configs.flatten(asked), "the code": runtime.code_fingerprint()})
        config, run_dir, resumed_from = world.decide(lambda: settle(asked, world))
        runtime.set_threads(config)
        training, validation = data.load_training(config.data)
        world.require_agreement(lambda: {"the training images": runtime.fingerprint([training.pixels])})
        plan = Plan(config.seed, len(training.labels), config.train.batch_size)
        last_step = config.train.steps or config.train.epochs * plan.steps_per_epoch
        validate_every = config.train.validate_every or plan.steps_per_epoch
        save_every = config.checkpoint.every or plan.steps_per_epoch
        verify_every = config.runtime.verify_every or math.inf
        vae = build_vae(config, training.pixels.shape[1:]).to(world.device, runtime.dtype(config.train.precision))
        update = Update(vae, config, world)
        state = update.restore(resumed_from) if resumed_from else TrainingState()
        batches = Batches(training, plan, config, world)
        meter = Meter(world, plan.batch_size, state.window)
        if state.step >= last_step:
            logger.info("run %s is finished: %d steps of %d; train.epochs=... goes on", run_dir, state.step, last_step)
            return run_dir
        world.expect_answers_within(config.runtime.timeout)
        with _recording(config, run_dir, world, state.step, last_step, plan) as (tracker, progress):
            for step in range(state.step, last_step):
                now = objective.schedule(config, step, last_step)
                meter.add(update(*batches(step), now.learning_rate, now.beta))
                done = step + 1
                if due(done, config.train.log_every, last_step):
                    row = {**meter.read(done), "train/learning_rate": now.learning_rate, "train/beta": now.beta}
                    tracker.scalars(done, row)
                    progress.show(done, row)
                if due(done, validate_every, last_step):
                    with meter.paused():
                        figures = score(vae, validation.pixels, world, config).figures("validation")
                        tracker.scalars(done, figures)
                        tracker.pictures(done, partial(_pictures, vae, training, validation, config, done))
                        progress.note(done, figures)
                if due(done, verify_every, last_step):
                    world.require_agreement(partial(update.facts, done), RuntimeError)
                if due(done, save_every, last_step):
                    with meter.paused():
                        state = update.state(done, meter.fold())
                        world.decide(partial(checkpoint.write, run_dir, config, vae, update.optimizer, state))
    return run_dir


def due(done: int, every: float, last_step: int) -> bool:
    """Whether something that happens every so many steps happens after `done` of them. It always does at the end."""
    return done % every == 0 or done == last_step


class Batches:
    """A process's share of each step's batch and of its noise, as the plan has them."""

    def __init__(self, training: Images, plan: Plan, config: Config, world: World) -> None:
        self._pixels = runtime.place(training.pixels, world.device)
        self._plan = plan
        self._rows = share(plan.batch_size, world.rank, world.size)
        self._latent_dim = config.model.latent_dim
        self._dynamic = config.data.binarize == "dynamic"
        self._device = world.device
        self._dtype = runtime.dtype(config.train.precision)

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """Images `(b, C, H, W)` in [0, 1] and standard normal noise `(b, L)` of step `step`."""
        indices = self._plan.batch(step)[self._rows.start : self._rows.stop]
        pixels = self._pixels[indices.to(self._pixels.device)].to(self._device)
        if self._dynamic:
            pixels = bernoulli_pixels(pixels, self._plan.seed, step, self._rows)
        noise = self._plan.noise(step, self._rows, self._latent_dim)
        return data.to_unit(pixels, self._dtype), noise.to(self._device, self._dtype)


class Update:
    """One optimizer step from a process's share of a batch. It draws nothing and decides nothing by itself."""

    def __init__(self, vae: VAE, config: Config, world: World) -> None:
        self._vae = vae
        self._parameters = list(vae.parameters())
        self._world = world
        self._accumulate = config.train.accumulate
        self._max_grad_norm = config.optim.max_grad_norm
        # What this process's loss is divided by, so that the mean over the processes is the batch's mean, however
        # unevenly the batch is shared.
        self._share_size = config.train.batch_size / world.size
        self._accelerator = runtime.accelerator(config.train.precision)
        # The learning rate is a tensor: it moves with the step without the optimizer being another one.
        learning_rate = torch.tensor(config.optim.learning_rate, device=world.device)
        optimizer = torch.optim.Adam(self._parameters, lr=learning_rate, fused=True)
        # Accelerate's wrapper is there for the loss scale of fp16; elsewhere it would only cost time at every step.
        self.optimizer = self._accelerator.prepare(optimizer) if self._accelerator.scaler is not None else optimizer

    def __call__(self, images: Tensor, noise: Tensor, learning_rate: float, beta: float) -> Tensor:
        """Update the weights from images `(b, C, H, W)` and noise `(b, L)`.

        Returns what the `Meter` adds up, `(4,)`: the sums over these images of loss, reconstruction and KL (nats), and
        this process's part of the gradient's norm before clipping.
        """
        sums = []
        for part in range(self._accumulate):
            rows = share(len(images), part, self._accumulate)
            part_images = images[rows.start : rows.stop]
            with self._accelerator.autocast():
                output = self._vae(part_images, noise[rows.start : rows.stop])
            terms = objective.elbo_terms(output, part_images)
            loss = objective.training_loss(terms, beta, self._share_size)
            self._accelerator.backward(loss)
            sums.append(torch.stack([loss * self._share_size, terms.reconstruction.sum(), terms.kl.sum()]).detach())
        runtime.average_gradients(self._parameters, self._world)
        grad_norm = self._clip()
        for group in self.optimizer.param_groups:
            group["lr"].fill_(learning_rate)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return torch.cat([torch.stack(sums).sum(0), grad_norm.view(1) / self._world.size])

    def _clip(self) -> Tensor:
        """Bound the gradient's norm where the config says so; the norm before that."""
        if self._max_grad_norm is not None:
            norm: Tensor = self._accelerator.clip_grad_norm_(self._parameters, self._max_grad_norm)
        else:
            self._accelerator.unscale_gradients()
            norm = torch.nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        if self._accelerator.scaler is None:
            return norm
        return torch.where(norm.isfinite(), norm, 0.0)  # fp16's loss scale was too large: this update is left out

    def facts(self, step: int) -> dict[str, object]:
        """What is the same on all processes, always: a hash of the weights' bits."""
        return {f"the weights after step {step}": runtime.fingerprint(self._parameters)}

    def state(self, step: int, window: dict[str, float]) -> TrainingState:
        """What a checkpoint after `step` steps holds beside the tensors."""
        scaler = self._accelerator.scaler
        return TrainingState(
            step=step,
            world_size=self._world.size,
            window=window,
            loss_scale=scaler.state_dict() if scaler is not None else None,
        )

    def restore(self, folder: Path) -> TrainingState:
        """Take weights, moments and loss scale from a checkpoint."""
        state = checkpoint.load_training(folder, self._vae, self.optimizer)
        if self._accelerator.scaler is not None and state.loss_scale is not None:
            self._accelerator.scaler.load_state_dict(state.loss_scale)
        return state


@contextmanager
def _recording(
    config: Config, run_dir: Path, world: World, start: int, last_step: int, plan: Plan
) -> Iterator[tuple[Tracker, TrainingProgress]]:
    """The run's directory, its tracker and its progress, for as long as it trains."""
    with ExitStack() as recording:
        if world.is_main:
            run_dir.mkdir(parents=True, exist_ok=True)
            configs.save(config, run_dir / "config.yaml")
            recording.enter_context(console.logged_to(run_dir / "log.txt"))
        _announce(config, run_dir, world, start, last_step, plan)
        tracker = recording.enter_context(tracking.track(config, run_dir, is_main=world.is_main, start=start))
        progress = TrainingProgress(world.is_main, start, last_step, plan.steps_per_epoch)
        yield tracker, recording.enter_context(progress)
    progress.table(f"{run_dir}, step {last_step}")


def _announce(config: Config, run_dir: Path, world: World, start: int, last_step: int, plan: Plan) -> None:
    processes = "1 process" if world.size == 1 else f"{world.size} processes"
    threads = f" (threads: {config.train.threads})" if world.device.type == "cpu" else ""
    logger.info("%s: %s on %s%s, %s", run_dir, processes, world.device.type, threads, config.train.precision)
    logger.info(
        "%s: %d training images, binarize=%s, %d steps an epoch", config.data.name, plan.images, config.data.binarize,
        plan.steps_per_epoch,
    )  # fmt: skip
    if start:
        logger.info("going on after step %d of %d", start, last_step)
    else:
        logger.info("to continue after a stop: name=%s", config.name)


def _pictures(vae: VAE, training: Images, validation: Images, config: Config, step: int) -> dict[str, Picture]:
    """The grids of a validation. Without validation images the training images are shown, and the caption says so."""
    held_out = len(validation.labels) > 0
    subject = f"{config.data.name}, {'validation' if held_out else 'TRAINING'} images, step {step}"
    return {
        "reconstructions": images.reconstructions(vae, (validation if held_out else training).pixels, subject),
        "samples": images.samples(vae, f"model of {config.data.name}, step {step}"),
    }
