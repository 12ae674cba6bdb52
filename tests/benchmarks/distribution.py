"""Measure a training on two CPU processes against a bare DistributedDataParallel loop and the machine's limits.

    python tests/benchmarks/distribution.py [--repeats 20] [--steps 8]

Five loops train the tutorial's network on the embedded digits, one thread a process, denormals flushed:

- one: this package's loop (its batches, update, metrics and metrics file, as in `train`) in one process, while the
  other one sleeps
- two: the same on two processes
- independent: two copies of `one` at the same time, each on half the batch: the limit of two processes here
- ddp: the same network in a lean hand-written loop under DistributedDataParallel, without a log
- flat: that loop without DistributedDataParallel, its gradients averaged by `average_gradients`

All loops run in one group of two processes and take turns. A turn is a warm-up, a barrier, and a few steps that are
timed until the slower process is done; a ratio compares turns of the same repeat. Repeats in which other programs used
the machine are repeated, up to five times as many in all, and the quietest count. The medians are printed and written
to docs/distribution.md.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

if __name__ == "__main__":  # run by its path
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from vae_dist import config as configs
from vae_dist.config import Config
from vae_dist.data import datasets
from vae_dist.data.batches import Batches
from vae_dist.data.source import InMemory
from vae_dist.distributed import processes
from vae_dist.distributed.gradients import average_gradients
from vae_dist.distributed.world import World
from vae_dist.models import build_vae
from vae_dist.models.pixel_distributions import Bernoulli
from vae_dist.plan import Plan
from vae_dist.runs import tracking
from vae_dist.training.cadence import due
from vae_dist.training.loss_scaler import LossScaler
from vae_dist.training.meter import Meter
from vae_dist.training.update import Update
from vae_dist.training.vae_recipe import VAERecipe

RESULT = Path(__file__).resolve().parents[2] / "docs/distribution.md"
BATCH_SIZES = (128, 1024, 8192)
LAST_STEP = 2**31  # none of the loops ends
QUIET = 0.02  # fraction of the machine's CPU time that other programs may use

LOOPS = {
    "one": "this package, 1 process",
    "two": "this package, 2 processes",
    "independent": "two independent copies, half the batch each",
    "ddp": "bare DistributedDataParallel loop, 2 processes",
    "flat": "bare loop with one flat all-reduce, 2 processes",
}
RATIOS = {
    "2 processes / 1 process": ("two", "one"),
    "two independent copies / 1 process": ("independent", "one"),
    "2 processes / two independent copies": ("two", "independent"),
    "this package / bare DistributedDataParallel": ("two", "ddp"),
    "flat all-reduce / DistributedDataParallel": ("flat", "ddp"),
}

Step = Callable[[], None]
Rates = dict[str, list[float]]  # by loop, images per second in each repeat; "others": their fraction of CPU time


class Alone(World):
    """A run of one process, inside a larger group."""

    def __init__(self) -> None:
        self.rank, self.size, self.device, self.is_main = 0, 1, torch.device("cpu"), True


def our_loop(training: InMemory, config: Config, world: World, run_dir: Path) -> Step:
    """The steps of `train` without validation, pictures and checkpoints, one per call."""
    plan = Plan(config.seed, training.info.count, config.train.batch_size)
    scaler = LossScaler(config.train.precision, world.device)
    recipe = VAERecipe(build_vae(config, training.info.image_shape), config, world, scaler, LAST_STEP)
    update = Update(recipe, config, world, scaler)
    batches = Batches(training, plan, config, world, recipe.noise_shape)
    meter = Meter(update, world, plan.batch_size)
    tracker = tracking.track(config, run_dir, is_main=world.is_main, start=0)
    steps = count()

    def step() -> None:
        number = next(steps)
        update(batches(range(number, number + 1)), [recipe.values(number)])
        meter.count(1)
        if due(number + 1, config.train.log_every, LAST_STEP):
            tracker.scalars(number + 1, meter.metrics(meter.cut()))

    return step


def bare_loop(training: InMemory, config: Config, world: World, *, ddp: bool) -> Step:
    """The same training by hand. Without `ddp`, this package averages the gradients."""
    vae = build_vae(config, training.info.image_shape)
    parameters = list(vae.parameters())
    network = DistributedDataParallel(vae) if ddp else vae
    optimizer = torch.optim.Adam(parameters, lr=config.optim.learning_rate, fused=True)
    shard_size = config.train.batch_size // world.size

    def shards() -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(0)  # the same order on every process
        while True:
            order = torch.randperm(training.info.count, generator=generator)[world.rank :: world.size]
            yield from order[: len(order) // shard_size * shard_size].split(shard_size)

    batches = shards()

    def step() -> None:
        images = training.pixels[next(batches)].float().div_(255)
        optimizer.zero_grad()
        inference = network(images, torch.randn(1, shard_size, vae.latent_dim))
        assert isinstance(inference.likelihood, Bernoulli)
        reconstruction = F.binary_cross_entropy_with_logits(inference.likelihood.logits, images, reduction="sum")
        mean, log_variance = inference.posterior
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum()
        loss = (reconstruction + kl) / shard_size
        loss.backward()
        if not ddp:
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            means, _ = average_gradients(gradients, loss.detach(), world)
            for parameter, mean in zip(parameters, means, strict=True):
                parameter.grad = mean
        optimizer.step()

    return step


def settings(folder: Path, batch_size: int) -> Config:
    return configs.load([
        "data.name=synthetic_digits", f"data.root={folder}", f"train.batch_size={batch_size}", "train.threads=1",
        "train.precision=fp32", "device=cpu", "tracking.wandb=disabled",
    ])  # fmt: skip


def turn(step: Step, steps: int, world: World) -> float:
    """Seconds that the slower process takes for the steps, after a warm-up. A gloo process that waits sleeps."""
    for number in (max(steps // 8, 1), steps):
        torch.distributed.barrier()
        started = time.perf_counter()
        for _ in range(number):
            step()
    seconds = torch.zeros(world.size)
    seconds[world.rank] = time.perf_counter() - started
    return world.sum(seconds).max().item()


def elapsed(world: World) -> Tensor:
    """CPU seconds so far of other programs (those of other virtual machines included), and CPU seconds available."""
    times = psutil.cpu_times()._asdict()
    all_programs = sum(times.get(kind, 0.0) for kind in ("user", "nice", "system", "irq", "softirq", "steal"))
    available = time.perf_counter() * (os.cpu_count() or 1) / world.size
    others = all_programs * world.is_main - time.process_time()
    return world.sum(torch.tensor([others, available], dtype=torch.float64))


def measure(training: InMemory, batch_size: int, steps: int, repeats: int, world: World, folder: Path) -> Rates:
    """Images per second of each loop in each of the quietest repeats."""
    whole, half = settings(folder, batch_size), settings(folder, batch_size // world.size)
    one = our_loop(training, whole, Alone(), folder / f"{batch_size}_one")
    loops: dict[str, Step] = {
        "one": one if world.is_main else lambda: None,
        "two": our_loop(training, whole, world, folder / f"{batch_size}_two"),
        "independent": our_loop(training, half, Alone(), folder / f"{batch_size}_independent"),
        "ddp": bare_loop(training, whole, world, ddp=True),
        "flat": bare_loop(training, whole, world, ddp=False),
    }
    rows: list[dict[str, float]] = []
    while len(rows) < 5 * repeats and sum(row["others"] <= QUIET for row in rows) < repeats:
        before = elapsed(world)
        row = {name: batch_size * steps / turn(step, steps, world) for name, step in loops.items()}
        others, available = (elapsed(world) - before).tolist()
        rows.append({**row, "others": others / available})
        if world.is_main:
            print(f"batch {batch_size}:", ", ".join(f"{name} {value:.5g}" for name, value in rows[-1].items()))
    rows = sorted(rows, key=lambda row: row["others"])[:repeats]
    return {name: [row[name] for row in rows] for name in rows[0]}


def ratio(rates: Rates, above: str, below: str) -> str:
    """The quartiles of the repeats' ratios, the median first."""
    values = [a / b for a, b in zip(rates[above], rates[below], strict=True)]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def machine() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{(models or [platform.processor()])[0]}, {os.cpu_count()} cores, torch {torch.__version__}"


def table(results: dict[int, Rates], steps: dict[int, int], repeats: int) -> str:
    """The results as Markdown."""
    sizes = "".join(f" batch {batch_size} |" for batch_size in results)
    rule = "| --- |" + " ---: |" * len(results)
    rows = {
        title: [f"{statistics.median(rates[name]):.0f}" for rates in results.values()] for name, title in LOOPS.items()
    }
    ratios = {title: [ratio(rates, *pair) for rates in results.values()] for title, pair in RATIOS.items()}
    timed = ", ".join(f"{steps[batch_size]} of {batch_size} images" for batch_size in results)
    most = max(max(rates["others"]) for rates in results.values())
    return "\n".join([
        "# A training on two CPU processes", "",
        "This page is for those who want to know what two processes gain on two cores, and how the trainer",
        "compares with DistributedDataParallel. `python tests/benchmarks/distribution.py` writes it and describes",
        "the method. The tutorial's network (784-400-40) on the embedded digits, one thread per process, gloo,",
        "batches counted over all processes.", "",
        f"Machine: {machine()}. Medians of {repeats} interleaved repeats, in which other programs used up to",
        f"{most:.0%} of the machine; timed steps in each: {timed}.", "",
        f"| images per second |{sizes}", rule,
        *(f"| {title} | {' | '.join(cells)} |" for title, cells in rows.items()), "",
        f"| ratio, median (quartiles) |{sizes}", rule,
        *(f"| {title} | {' | '.join(cells)} |" for title, cells in ratios.items()), "",
    ])  # fmt: skip


def compare(repeats: int, steps_of_1024: int) -> None:
    """Measure all loops; each of the two processes calls this."""
    steps = {batch_size: max(steps_of_1024 * 1024 // batch_size, 2) for batch_size in BATCH_SIZES}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)  # this process's own
        config = settings(folder, BATCH_SIZES[0])
        with processes.join(config) as world:
            training, _ = datasets.load_training(config.data)
            assert isinstance(training, InMemory)
            results = {size: measure(training, size, steps[size], repeats, world, folder) for size in BATCH_SIZES}
            if world.is_main:
                text = table(results, steps, repeats)
                print(f"\n{text}")
                RESULT.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20, help="2 or more")
    parser.add_argument("--steps", type=int, default=8, help="timed steps of 1024 images; others by as many images")
    given = parser.parse_args()
    if "RANK" in os.environ:
        compare(given.repeats, given.steps)
    else:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        subprocess.run([*launcher, __file__, *sys.argv[1:]], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
