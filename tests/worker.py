"""The jobs of test_distributed: several commands in one group of processes, each of which runs this program.

    tests/worker.py JOBS.json

JOBS.json is a list of [command, output, arguments]. One launch serves many claims, because a launch takes seconds.
"""

import json
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from functools import partial, partialmethod
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

if __name__ == "__main__":  # run by its path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import save_file

from tests.sources import mapped
from tests.two_networks import TwoNetworks
from vae_dist import config
from vae_dist.compute.compiled import Compiled, Function
from vae_dist.config import Precision
from vae_dist.data import datasets, digit_set
from vae_dist.data.batches import Batch, Batches
from vae_dist.distributed import environment, failures, fingerprints, precision, processes, stopping
from vae_dist.encoding import shards
from vae_dist.encoding.encode import encode
from vae_dist.errors import RunError, StoppedError, UserError
from vae_dist.evaluation import metrics
from vae_dist.evaluation.evaluate import evaluate
from vae_dist.models import build_vae
from vae_dist.models.diffusers_start import start_vae
from vae_dist.models.vae import VAE
from vae_dist.objectives import OBJECTIVES, ElboTerms, Values
from vae_dist.plan import Plan
from vae_dist.runs import checkpoint
from vae_dist.runs.checkpoint import Checkpoint
from vae_dist.runs.claim import claim
from vae_dist.runs.manifest import MANIFEST
from vae_dist.terminal import console
from vae_dist.training import loop, milestones, schedules
from vae_dist.training.loop import train
from vae_dist.training.recipes import RECIPES
from vae_dist.training.update import Update
from vae_dist.views.sampling import sample


def record_batches(output: str, arguments: list[str]) -> None:
    """Write the global batches of the first 25 steps: images, noise, learning rate."""
    with processes.join(config.load(arguments)) as world, claim(config.load(arguments), world) as (run, training, _):
        run_config = run.config
        plan = Plan(run_config.seed, training.info.count, run_config.train.batch_size)
        vae = build_vae(run_config, training.info.image_shape)
        batches = Batches(training, plan, run_config, world, (vae.latent_dim,))
        size = plan.batch_size
        rows = range(world.rank * size // world.size, (world.rank + 1) * size // world.size)
        seen: dict[str, list[torch.Tensor]] = {"images": [], "noise": [], "learning_rate": []}
        for step in range(25):
            images, noise, _ = batches(range(step, step + 1))
            seen["images"].append(world.gather_rows([rows], [images[0]], size))
            seen["noise"].append(world.gather_rows([rows], [noise[0]], size))
            seen["learning_rate"].append(torch.tensor(schedules.learning_rate(run_config.optim, step, 25)))
        if world.is_main:
            save_file({name: torch.stack(values) for name, values in seen.items()}, output)


def record_refusal(output: str, arguments: list[str]) -> None:
    """Train; write the error with which each process ends."""
    try:
        train(config.load(arguments))
    except (UserError, RuntimeError, RunError, StoppedError) as error:
        Path(f"{output}.{os.environ['RANK']}").write_text(f"{type(error).__name__}: {error}")


def disagree(what: str) -> Callable[[str, list[str]], None]:
    """Train, with a last process that differs from the others in `what`."""

    def record(output: str, arguments: list[str]) -> None:
        if int(os.environ["RANK"]) < int(os.environ["WORLD_SIZE"]) - 1:
            return record_refusal(output, arguments)
        with pytest.MonkeyPatch.context() as patch:
            if what == "config":
                arguments = [*arguments, "seed=17"]
            elif what == "code":
                patch.setattr(fingerprints, "code_fingerprint", lambda: "another")
            elif what == "torch":
                patch.setattr(torch, "__version__", "1.0")
            elif what == "data":
                patch.setattr(digit_set, "_read_digits", partial(with_another_pixel, digit_set._read_digits))
            elif what == "checkpoint":
                patch.setattr(checkpoint, "open_when_visible", partial(another_machines, Path(f"{output}.there")))
            elif what == "start":
                patch.setattr(loop, "start_vae", partial(with_another_weight, start_vae))
            elif what in ("weights", "moments"):
                patch.setattr(Update, "__call__", partialmethod(nudge, Update.__call__, what))
            return record_refusal(output, arguments)

    return record


def on_last_process(fault: Callable[[pytest.MonkeyPatch], None]) -> Callable[[str, list[str]], None]:
    """Train, with a fault on the last process alone; write how each process ends."""

    def record(output: str, arguments: list[str]) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(stopping, "CHECK_SECONDS", 0.0)  # after every step
            if int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
                fault(patch)
            record_refusal(output, arguments)

    return record


def ask_to_stop(patch: pytest.MonkeyPatch) -> None:
    """Send a signal in the middle of step 33."""
    draw = Batches.__call__

    def with_signal(batches: Batches, steps: range) -> Batch:
        if 32 in steps:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.05)
        return draw(batches, steps)

    patch.setattr(Batches, "__call__", with_signal)


def ask_to_stop_in_validation(patch: pytest.MonkeyPatch) -> None:
    score = metrics.score

    def with_signal(*arguments: Any) -> ElboTerms:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.05)
        return score(*arguments)

    patch.setattr(milestones, "score", with_signal)


def spoil_step_8(patch: pytest.MonkeyPatch) -> None:
    """Make the noise NaN at a step after which nothing is logged."""
    draw = Batches.__call__

    def spoiled(batches: Batches, steps: range) -> Batch:
        batch = draw(batches, steps)
        return batch._replace(noise=batch.noise * torch.nan) if 7 in steps else batch

    patch.setattr(Batches, "__call__", spoiled)


def spoil_the_loss_of_step_8(patch: pytest.MonkeyPatch) -> None:
    """Make the loss of a step infinite, and no gradient."""
    draw, elbo, taken = Batches.__call__, OBJECTIVES["elbo"], [range(0)]

    def noted(batches: Batches, steps: range) -> Batch:
        taken[0] = steps
        return draw(batches, steps)

    def spoiled(*given: Any) -> Values:
        values = elbo(*given)
        return {**values, "loss": values["loss"] + torch.inf} if 7 in taken[0] else values

    patch.setattr(Batches, "__call__", noted)
    patch.setitem(OBJECTIVES, "elbo", spoiled)


def warn(output: str, arguments: list[str]) -> None:
    """Log warnings of all processes, of the last one, and of all but the main one."""
    with processes.join(config.load(arguments)) as world:
        console.start(world)
        console.logger.warning("said by all")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(failures, "REPORT_SECONDS", 0.1)  # in vain: the main process does not log these
            if world.rank == world.size - 1:
                console.logger.warning("said by the last")
            if not world.is_main:
                console.logger.warning("said by the others")
        torch.distributed.barrier()


def fill_the_disk(output: str, arguments: list[str]) -> None:
    """Train with a limit on the size of files, which the main process meets when it saves."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
    try:
        record_refusal(output, arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def with_another_pixel(
    read: Callable[..., Any], cache: Path, count: int
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return digits of another intact file."""
    tensors, _ = read(cache, count)
    tensors["train_pixels"][0, 0, 0, 0] += 1
    return tensors, digit_set._digest(tensors)


def another_machines(place: Path, folder: Path) -> Checkpoint:
    """Open the checkpoint of the same name on a machine with a file system of its own: that of another version."""
    sealed = json.loads((shutil.copytree(folder, place) / MANIFEST).read_text())
    (place / MANIFEST).write_text(json.dumps({**sealed, "versions": {"torch": "1.0"}}))
    return Checkpoint(place)


def with_another_weight(start: Callable[..., VAE], *given: Any) -> VAE:
    """Return a first model of which one weight is another one."""
    vae = start(*given)
    next(vae.parameters()).data.view(-1)[0] += 1e-6
    return vae


def nudge(update: Update, take: Callable[..., None], what: str, *inputs: Any) -> None:
    """Take a step; change one bias before it, or one second moment after the second one, on this process alone."""
    optimizer = update.recipe.optimizers["optimizer"]
    with torch.no_grad():
        if what == "weights":
            optimizer.tensors[1].view(-1)[0] += 1e-6
    take(update, *inputs)
    if what == "moments" and optimizer.updates == 2:  # no weight has felt it yet
        optimizer.tensors[-2].view(-1)[0] += 1e-6


def on_unlike_processors(output: str, arguments: list[str]) -> None:
    """Train as if the last process ran on another processor and rounded differently."""
    with pytest.MonkeyPatch.context() as patch:
        if int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
            patch.setattr(environment, "processor", lambda device: "an abacus")
            patch.setattr(Update, "__call__", partialmethod(nudge, Update.__call__, "weights"))
        record_refusal(output, arguments)


def scaled_accelerator(scaler: torch.amp.GradScaler) -> Callable[[Precision], Accelerator]:
    """A maker of Accelerators, as `precision.accelerator`, with fp16's scaler on a CPU."""
    make = precision.accelerator

    def scaled(chosen: Precision) -> Accelerator:
        accelerator = make(chosen)
        accelerator.scaler = scaler
        return accelerator

    return scaled


def with_a_loss_scaler(output: str, arguments: list[str]) -> None:
    """Train with fp16's scaler, whose first scale is too large; compiled programs are the functions themselves."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120, growth_interval=7)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precision, "accelerator", scaled_accelerator(scaler))
        patch.setattr(Compiled, "_compile", lambda made, inputs: made._function)
        train(config.load(arguments))


def compiled_where(program: int | None) -> Callable[[str, list[str]], None]:
    """Train with compiled programs that round differently from eager operations.

    On the last process the compilation of one program fails; if `program` is None, none fails, and the programs round
    differently on each process.
    """

    def record(output: str, arguments: list[str]) -> None:
        rank, compilations = int(os.environ["RANK"]), count()

        def compile_one(made: Compiled, inputs: Any) -> Function:
            if next(compilations) == program and rank == int(os.environ["WORLD_SIZE"]) - 1:
                raise OSError("no compiler")
            factor = 1 + (rank if program is None else 1) * 2.0**-20
            return lambda *inputs: [value * factor for value in made._function(*inputs)]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Compiled, "_compile", compile_one)
            record_refusal(output, arguments)

    return record


def encode_until_killed(run: str, arguments: list[str]) -> None:
    """Encode; the last process is killed once it has written a shard."""
    write = shards.write

    def write_one(*of_shard: Any) -> None:
        write(*of_shard)
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.MonkeyPatch.context() as patch:
        if int(os.environ.get("RANK", 0)) == int(os.environ.get("WORLD_SIZE", 1)) - 1:
            patch.setattr(shards, "write", write_one)
        encode(Path(run), arguments)


def train_from_a_file(output: str, arguments: list[str]) -> None:
    """Train on images that do not lie in memory."""
    with pytest.MonkeyPatch.context() as patch, TemporaryDirectory() as folder:
        load = datasets.DATASETS["synthetic_digits"]
        patch.setitem(datasets.DATASETS, "synthetic_digits", mapped(load, Path(folder)))
        train(config.load(arguments))


assert RECIPES["two_networks"] is TwoNetworks  # its import has registered it

COMMANDS: dict[str, Callable[[str, list[str]], object]] = {
    "batches": record_batches,
    "refusal": record_refusal,
    **{
        f"disagree_{what}": disagree(what)
        for what in ("config", "code", "torch", "data", "checkpoint", "start", "weights", "moments")
    },
    "unlike_processors": on_unlike_processors,
    "with_a_loss_scaler": with_a_loss_scaler,
    **{f"compiled_where_{name}": compiled_where(name) for name in (0, 2, None)},
    "stop": on_last_process(ask_to_stop),
    "stop_in_validation": on_last_process(ask_to_stop_in_validation),
    "spoil": on_last_process(spoil_step_8),
    "spoil_the_loss": on_last_process(spoil_the_loss_of_step_8),
    "full_disk": fill_the_disk,
    "warn": warn,
    "train_from_a_file": train_from_a_file,
    "train": lambda output, arguments: train(config.load(arguments)),
    "evaluate": lambda output, arguments: evaluate(Path(output), arguments),
    "encode": lambda output, arguments: encode(Path(output), arguments),
    "encode_until_killed": encode_until_killed,
    "sample": lambda output, arguments: sample(Path(output), arguments),
}


def main(jobs: list[tuple[str, str, list[str]]]) -> None:
    if "RANK" in os.environ:
        torch.distributed.init_process_group("gloo")  # one group for all jobs
    for command, output, arguments in jobs:
        COMMANDS[command](output, arguments)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
    # Everything is on the disk. After thirty trainings in one group, tearing down torch's threads sometimes aborts.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
