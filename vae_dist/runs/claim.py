"""Starting or resuming a run: its name, the checkpoint to resume from, and every option that the config leaves open."""

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch

from vae_dist import config as configs
from vae_dist import objectives
from vae_dist.config import Config, DataConfig
from vae_dist.data import datasets
from vae_dist.data.classes import class_names
from vae_dist.data.source import DataInfo, Source
from vae_dist.data.splits import default_held_out
from vae_dist.distributed.precision import resolve_precision
from vae_dist.distributed.world import World
from vae_dist.errors import UserError
from vae_dist.features import lpips
from vae_dist.files import writing
from vae_dist.models import build_vae, check_names, discriminator
from vae_dist.models.diffusers_start import resolve_start
from vae_dist.models.likelihoods import likelihood_kind
from vae_dist.models.vae import VAE
from vae_dist.plan import Plan
from vae_dist.runs.checkpoint import Checkpoint
from vae_dist.runs.lookup import find
from vae_dist.runs.names import run_name
from vae_dist.runs.run import ANOTHER_RUNS_DIR, RunDirectory
from vae_dist.runs.sigma import with_sigma
from vae_dist.runs.wandb_client import check_wandb
from vae_dist.runs.wandb_identity import new_id, own_id, owner

logger = logging.getLogger(__name__)

# Rough costs of a step on a CPU, good enough to tell minutes from seconds: seconds apart from the matrix products, and
# floating-point operations of a thread per second.
_STEP_SECONDS, _OPERATIONS = 1e-3, 8e10
_COMPILED_FROM_SECONDS = 120.0


class Resolved(NamedTuple):
    """A run that is about to train, equal on every process."""

    config: Config  # with no option left open
    run: RunDirectory
    resumed_from: Checkpoint | None


@contextmanager
def claim(config: Config, world: World) -> Iterator[tuple[Resolved, Source, Source]]:
    """Resolve what the config leaves open, and hold the run's directory while the context lasts.

    Yields the resolved run, its training images and its validation images. The main process resolves; every process
    reads the images once. Raises UserError, before a new directory is made, for what can't be run here.
    """
    with ExitStack() as stack:
        loaded: list[Source] = []  # on the main process, which has to know the images' number and shape
        datasets.forget()
        # Packing images may take longer than a collective's timeout.
        resolved = world.on_main(lambda: _resolve(config, world, stack, loaded), patient=True)
        training, validation = loaded or datasets.load_training(resolved.config.data)
        yield resolved, training, validation


def _resolve(config: Config, world: World, stack: ExitStack, loaded: list[Source]) -> Resolved:
    """Resolve the config. `stack` then holds the run's directory, `loaded` the training and validation images."""
    datasets.check_name(config.data.name)
    check_names(config)
    objectives.check_bound(config.objective)
    check_wandb(config.tracking)
    micro_batches = world.size * config.train.accumulate
    if config.train.batch_size < micro_batches:
        raise UserError(
            f"train.batch_size={config.train.batch_size} is too small for {world.size} processes "
            f"with {config.train.accumulate} micro-batches each; it must be at least {micro_batches}"
        )
    with writing(Path(config.runs_dir), ANOTHER_RUNS_DIR):  # to list it takes permissions too
        name, others = run_name(config)
        config = replace(config, name=name)
        run = RunDirectory(Path(config.runs_dir) / name)
        is_new = others is not None or not run.directory.exists()
    if not is_new:
        stack.enter_context(run.claim(config.checkpoint.take_over))
    resumed_from = _resumed_from(config, run)
    threads, compiled = config.train.threads, config.train.compile
    identity = config.tracking.id if config.tracking.owner is None else None  # a saved config has an owner
    if resumed_from is not None:
        stored = resumed_from.config
        if config.data.name == "auto" and stored.data.name == datasets.FALLBACK:  # MNIST is not tried again
            datasets.warn_of_fallback()
        config = configs.resume(config, stored)
        if resumed_from.folder.resolve().is_relative_to(run.directory.resolve()):  # else a branch, with its own page
            identity = identity or _stored_id(stored, run.directory)
        # Threads and compilation are part of the bitwise promise, which holds at a fixed number of processes.
        if resumed_from.state.world_size == world.size:
            threads = threads or stored.train.threads
            compiled = stored.train.compile if compiled is None else compiled
    precision = resolve_precision(config.train.precision, world.device)
    likelihood = likelihood_kind(config.objective)
    configs.check_numbers(
        replace(config, train=replace(config.train, precision=precision)), has_scale=likelihood.has_scale
    )
    training_set = datasets.load_training_set(config.data)
    info = training_set.info
    config = replace(config, data=_resolved_data(config, info))
    training, validation = datasets.split(training_set, config.data)
    loaded += training, validation
    datasets.log_sizes(config.data, training, validation)
    _check_sizes(config, training.info.count, validation.info.count)
    config = replace(config, objective=with_sigma(config.objective, likelihood, training))
    if resumed_from is None:
        config = resolve_start(config, info.image_shape)
    with torch.device("meta"):
        vae = build_vae(config, info.image_shape)  # refuses images that it can't encode
    discriminator.check_size(config.first_stage, info.image_shape)
    lpips.check_size(config.first_stage, info.image_shape)
    plan = Plan(config.seed, training.info.count, config.train.batch_size)
    last_step = plan.last_step(config.train.epochs, config.train.steps)
    _require_steps_left(run, resumed_from, last_step)
    if others is not None:
        run = _first_free(run, others, stack)
        config = replace(config, name=run.directory.name)
    elif is_new:
        stack.enter_context(run.claim(config.checkpoint.take_over))
        if run.newest() is not None:
            raise UserError(f"another training has just written {run.directory}; run the same command again to resume")
    config = replace(
        config,
        train=replace(config.train, precision=precision, threads=threads or torch.get_num_threads()),
        tracking=replace(config.tracking, id=identity or new_id(), owner=owner(run.directory)),
    )
    if config.train.checkpointing:
        compiled = False
    if compiled is None:
        compiled = _worth_compiling(config, vae, last_step, world)
    return Resolved(replace(config, train=replace(config.train, compile=compiled)), run, resumed_from)


def _first_free(run: RunDirectory, others: Iterator[str], stack: ExitStack) -> RunDirectory:
    """Make and hold the run's directory; under one of the other names if another run has made it meanwhile."""
    while True:
        with suppress(FileExistsError):
            stack.enter_context(run.claim(is_new=True))
            return run
        run = RunDirectory(run.directory.with_name(next(others)))


def _stored_id(stored: Config, run_dir: Path) -> str | None:
    """Return the run's identity in W&B; None for a copy of a run, which gets a page of its own."""
    identity = own_id(stored, run_dir)
    if identity is None and stored.tracking.id is not None:
        logger.info(
            "%s is a copy of run %s and gets its own W&B page; tracking.id=%s would continue the other run's page",
            run_dir, stored.name, stored.tracking.id,
        )  # fmt: skip
    return identity


def _worth_compiling(config: Config, vae: VAE, last_step: int, world: World) -> bool:
    """Return whether compiling the step pays for itself in this run, and a compiler is installed.

    The answer depends on the config and the machine alone, not on a clock: it is part of the bitwise promise. On a CPU
    compiling an MLP takes 5 s, 17 s the first time on a machine, and saves 7 to 38% of a step: it pays after one to
    three minutes. Convolutions gain nothing: the architecture says so. On a GPU a small model's uncompiled step is
    launch-bound.
    """
    if world.device.type == "cuda":
        return find_spec("triton") is not None and _has_compiler("CC", "cc", "gcc", "clang")
    if world.device.type != "cpu":
        return False
    if not vae.worth_compiling or config.train.recipe == "autoencoder":
        return False
    weights = sum(weight.numel() for weight in vae.parameters())
    operations = 6 * weights * config.train.batch_size / world.size  # of a step, forward and backward
    seconds = last_step * (_STEP_SECONDS + operations / (_OPERATIONS * (config.train.threads or 1)))
    return seconds > _COMPILED_FROM_SECONDS and _has_compiler("CXX", "g++")


def _has_compiler(variable: str, *names: str) -> bool:
    """Return whether a compiler is installed: the one that the environment variable names, or else one of `names`."""
    return any(shutil.which(name) for name in ([os.environ[variable]] if variable in os.environ else names))


def _resolved_data(config: Config, info: DataInfo) -> DataConfig:
    """Return the config's data, with what it leaves open. Raises UserError if own images have changed in a run."""
    data = replace(config.data, name=info.name, image_shape=list(info.image_shape))
    if datasets.may_change(data.name):
        if data.identity not in (None, info.identity):
            where = f"in data.path={data.path}" if data.path else f"of data.name={data.name}"
            raise UserError(
                f"the images {where} are not those that run {config.name} was started with: put them back, or choose "
                "another name for a new run"
            )
        data.identity = info.identity
    if config.model.conditional:
        data.classes = class_names(info, data.classes)
    if data.validation_images is None and not datasets.has_validation_part(data):
        data.validation_images = default_held_out(info.count)
    return data


def _check_sizes(config: Config, training: int, validation: int) -> None:
    if config.train.batch_size > training:
        held_out = config.data.validation_images
        left = "" if not held_out else f" that data.validation_images={held_out} leaves of {training + validation}"
        raise UserError(
            f"train.batch_size={config.train.batch_size} is more than the {training} training images{left}; "
            f"set train.batch_size={training}, or less"
        )


def _require_steps_left(run: RunDirectory, start: Checkpoint | None, last_step: int) -> None:
    """Raise UserError if a branch of another run would end where it starts: it would have no checkpoint."""
    is_own = start is None or start.folder.resolve().is_relative_to(run.directory.resolve())
    if start is not None and not is_own and start.step >= last_step and not start.state.validation_pending:
        reached = f"{start.folder} is of step {start.step}, and {run.directory} would end after step {last_step}"
        raise UserError(f"{reached}: nothing is left to train; set a larger train.epochs or train.steps")


def _resumed_from(config: Config, run: RunDirectory) -> Checkpoint | None:
    resume = config.checkpoint.resume
    newest = run.newest()
    if resume not in ("auto", "must", "never"):
        named = find(Path(resume), Path(config.runs_dir))
        named.require_training_state()
        if newest is None or named.folder.resolve().is_relative_to(run.directory.resolve()):
            return named
        logger.warning("%s has checkpoints of its own and resumes from them, not from %s", run.directory, resume)
    if resume == "never" and newest is not None:
        raise UserError(f"{run.directory} has checkpoints and checkpoint.resume=never; choose another name")
    if resume == "must" and newest is None:
        raise UserError(
            f"{run.directory} has no checkpoint to resume from; check name and runs_dir, or use checkpoint.resume=auto"
        )
    return newest
