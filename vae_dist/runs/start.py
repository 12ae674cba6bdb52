"""What a run decides before it starts: its name, where it goes on from, and all that its config left open."""

import hashlib
import logging
import os
import re
import shutil
import time
from contextlib import ExitStack
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch

from vae_dist import config as configs
from vae_dist.config import Config
from vae_dist.data import datasets
from vae_dist.distributed.precision import resolve_precision
from vae_dist.distributed.world import World
from vae_dist.errors import UserError
from vae_dist.files import make_folder, require_no_links, writing
from vae_dist.models import build_vae, check_names
from vae_dist.plan import Plan
from vae_dist.runs import checkpoint, tracking

logger = logging.getLogger(__name__)

ELSEWHERE = "choose another runs_dir"

# About what a step takes on a CPU beside its matrix products, and how many operations a thread does in a second: good
# enough to tell minutes from seconds.
_STEP_SECONDS, _OPERATIONS = 1e-3, 8e10
_COMPILED_FROM_SECONDS = 120.0


class Start(NamedTuple):
    """How a run begins, the same on every process."""

    config: Config  # nothing is left to be decided
    run_dir: Path
    resumed_from: Path | None


def settle(config: Config, world: World, held: ExitStack) -> Start:
    """Decide all that the config leaves open. The main process does this, and the others are told.

    `held` keeps the run's directory for this training. Raises UserError for whatever can't be had; only then is the
    directory made.
    """
    datasets.check_name(config.data.name)
    check_names(config)
    tracking.check_wandb(config.tracking)
    parts = world.size * config.train.accumulate
    if config.train.batch_size < parts:
        raise UserError(
            f"train.batch_size={config.train.batch_size} is too small for {world.size} processes "
            f"with {config.train.accumulate} parts each; it must be at least {parts}"
        )
    with writing(Path(config.runs_dir), ELSEWHERE):  # to look into it takes permissions too
        config = replace(config, name=_name(config))
        run_dir = Path(config.runs_dir) / str(config.name)
        is_new = not run_dir.exists()
    if not is_new:
        _hold(run_dir, config.checkpoint.take_over, held)
    resumed_from = _resumed_from(config, run_dir)
    threads, compiled = config.train.threads, config.train.compile
    identity = config.tracking.id if config.tracking.owner is None else None  # a saved config has an owner
    if resumed_from is not None:
        stored = checkpoint.read_config(resumed_from)
        if config.data.name == "auto" and stored.data.name == datasets.FALLBACK:  # MNIST is not tried again
            datasets.warn_of_fallback()
        config = configs.resume(config, stored)
        if resumed_from.resolve().is_relative_to(
            run_dir.resolve()
        ):  # otherwise this is a branch: another run, on a page of its own
            identity = identity or _stored_id(stored, run_dir)
        # These are a part of what makes a restart bitwise exact; on other processes it can't be anyway.
        if checkpoint.read_state(resumed_from).world_size == world.size:
            threads = threads or stored.train.threads
            compiled = stored.train.compile if compiled is None else compiled
    precision = resolve_precision(config.train.precision, world.device)
    configs.check_numbers(replace(config, train=replace(config.train, precision=precision)))
    name, image_count, image_shape = datasets.prepare(config.data)
    _check_sizes(config, image_count)
    if is_new:
        _hold(run_dir, config.checkpoint.take_over, held)
        if checkpoint.newest(run_dir) is not None:
            raise UserError(f"another training has just written {run_dir}; start this one again to go on from it")
    config = replace(
        config,
        data=replace(config.data, name=name, image_shape=image_shape),
        train=replace(config.train, precision=precision, threads=threads or torch.get_num_threads()),
        tracking=replace(config.tracking, id=identity or tracking.new_id(), owner=tracking.owner(run_dir)),
    )
    if compiled is None:
        compiled = _worth_compiling(config, image_count, world)
    return Start(replace(config, train=replace(config.train, compile=compiled)), run_dir, resumed_from)


def _stored_id(stored: Config, run_dir: Path) -> str | None:
    """The run's identity in W&B, or None where the run is a copy: that gets a page of its own."""
    identity = tracking.own_id(stored, run_dir)
    if identity is None and stored.tracking.id is not None:
        logger.info(
            "%s is a copy of run %s and gets a W&B page of its own; tracking.id=%s would go on with that of the other",
            run_dir, stored.name, stored.tracking.id,
        )  # fmt: skip
    return identity


def _worth_compiling(config: Config, image_count: int, world: World) -> bool:
    """Whether a run gains by a compilation, and there is a compiler.

    The same config on the same machine gives the same answer, as it must: no clock is asked. On a CPU a compilation
    takes 5 s, and 16 s the first time on a machine; a step then takes 5 to 35% less, so that it pays from one to three
    minutes on. On a GPU a small model's step has many times as many operations to launch where it is not compiled.
    """
    if world.device.type == "cuda":
        return find_spec("triton") is not None and _has_compiler("CC", "cc", "gcc", "clang")
    if world.device.type != "cpu":
        return False
    with torch.device("meta"):
        weights = sum(weight.numel() for weight in build_vae(config, config.data.image_shape or []).parameters())
    plan = Plan(config.seed, image_count - config.data.validation_images, config.train.batch_size)
    steps = config.train.steps or config.train.epochs * plan.steps_per_epoch
    operations = 6 * weights * config.train.batch_size / world.size  # of a step, forwards and backwards
    seconds = steps * (_STEP_SECONDS + operations / (_OPERATIONS * (config.train.threads or 1)))
    return seconds > _COMPILED_FROM_SECONDS and _has_compiler("CXX", "g++")


def _has_compiler(variable: str, *names: str) -> bool:
    """Whether a compiler is found: the one that the environment's variable names, or else one of these."""
    return any(shutil.which(name) for name in ([os.environ[variable]] if variable in os.environ else names))


def _check_sizes(config: Config, image_count: int) -> None:
    left = image_count - config.data.validation_images
    if config.train.batch_size > left:
        raise UserError(
            f"train.batch_size={config.train.batch_size} is more than the {max(left, 0)} training images that "
            f"data.validation_images={config.data.validation_images} leaves of {image_count}"
        )


def _name(config: Config) -> str:
    """The run's name with its `{time}` filled in: a new one, unless a launcher has restarted this very run."""
    name = config.name or "run-{time}"
    if "{time}" not in name:
        return name
    launch = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    mark = "" if launch == "none" else "-" + hashlib.sha256(launch.encode()).hexdigest()[:6]
    runs = Path(config.runs_dir)
    pattern = ".*".join(map(re.escape, name.split("{time}"))) + mark
    if mark and (started := sorted(path.name for path in runs.glob("*") if re.fullmatch(pattern, path.name))):
        return started[-1]
    stem = name.replace("{time}", time.strftime("%Y%m%d-%H%M%S")) + mark
    names = [stem, *(f"{stem}-{number}" for number in range(2, 100))]
    return next(candidate for candidate in names if not (runs / candidate).exists())


def _hold(run_dir: Path, take_over: str | None, held: ExitStack) -> None:
    """Take the run's directory for this training alone, and finish or remove what a killed one left half done."""
    make_folder(run_dir, ELSEWHERE)
    require_no_links(run_dir)
    held.enter_context(checkpoint.locked(run_dir, take_over))
    with writing(run_dir, ELSEWHERE):
        checkpoint.recover(run_dir)


def _resumed_from(config: Config, run_dir: Path) -> Path | None:
    resume = config.checkpoint.resume
    newest = checkpoint.newest(run_dir)
    if resume not in ("auto", "must", "never"):
        asked = checkpoint.find(Path(resume), Path(config.runs_dir))
        if newest is None or asked.resolve().is_relative_to(run_dir.resolve()):
            return asked
        logger.warning("%s has checkpoints of its own and goes on from them, not from %s", run_dir, resume)
    if resume == "never" and newest is not None:
        raise UserError(f"{run_dir} has checkpoints and checkpoint.resume=never; choose another name")
    if resume == "must" and newest is None:
        raise UserError(f"{run_dir} has no checkpoint to go on from; check name and runs_dir, or use resume=auto")
    return newest
