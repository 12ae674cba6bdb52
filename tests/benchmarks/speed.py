"""Measure the trainer's speed against other loops and against the machine's limits.

    python tests/benchmarks/speed.py [DATA_ROOT] [--repeats 7] [--only training convolutional evaluation ...]

The loops of `contestants.py` run in processes of their own and take turns, so that each ratio compares turns of the
same moment. The medians of the repeats' ratios, with their quartiles, are printed and written to docs/speed.md.

- training: this package's trainer as a user runs it (metrics and progress on, pictures and checkpoints off), not
  compiled and compiled; PyTorch's example-style loop; a good in-memory PyTorch loop; JAX with the whole turn in one
  program, if jax is installed; and the matrix products of a step alone
- convolutional: `model.architecture=conv` on 32 x 32 x 3, 32 images a step; a good in-memory PyTorch loop of the same
  network; and its convolutions alone, forward and backward
- evaluation: passes over the test images
- start: from the command to the first step, against six lines that import the same and take one Adam step
- scale: training sets of 10^4, 10^5 and 10^6 embedded digits
- cadence: whole epochs with pictures, validation, checkpoints and W&B at their default cadence, and with them off

DATA_ROOT contains MNIST; without it the embedded digits are used.
"""

import argparse
import importlib.util
import json
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from datetime import date
from pathlib import Path
from types import TracebackType
from typing import IO, Any

REPOSITORY = Path(__file__).resolve().parents[2]
RESULT = REPOSITORY / "docs/speed.md"
CONTESTANTS = "tests/benchmarks/contestants.py"
LAUNCH = ["-m", "accelerate.commands.accelerate_cli", "launch", "--quiet"]
CONV_STEPS = 5  # of a turn
STEPS = {128: 100, 1024: 20, 8192: 4}  # of a turn, by batch size
QUIET = [
    "train.steps=1000000000", "train.validate_every=1000000000", "checkpoint.every=1000000000",
    "tracking.wandb=disabled",
]  # fmt: skip

LOOPS = {
    "ours": "this package",
    "compiled": "this package, compiled",
    "tutorial": "PyTorch's example-style loop",
    "memory": "in-memory PyTorch loop",
    "jax": "JAX, whole turn jitted",
    "floor": "matrix products alone",
}
SIX_LINES = """import torch, torchvision, accelerate, omegaconf, rich
accelerator = accelerate.Accelerator()
layer = accelerator.prepare(torch.nn.Linear(784, 400))
optimizer = accelerator.prepare(torch.optim.Adam(layer.parameters()))
accelerator.backward(layer(torch.rand(128, 784)).sum())
optimizer.step(); print("the first step is done", flush=True)
"""


class Group:
    """A contestant: one or more processes that wait for their turn."""

    def __init__(
        self, name: str, settings: Sequence[str], processes: int = 1, wait: bool = True, root: Path = REPOSITORY,
        log: IO[str] | int = subprocess.DEVNULL,
    ) -> None:  # fmt: skip
        """`root` is the checkout whose code runs. `log` gets what the processes say beside their answers."""
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = str(probe.getsockname()[1])
        self._members = []
        self._started = time.perf_counter()
        for rank in range(processes):
            places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
            group = {
                **{key: str(value) for key, value in places.items()},
                "MASTER_ADDR": "localhost",
                "MASTER_PORT": port,
            }
            command = [sys.executable, str(root / CONTESTANTS), name, *settings]
            self._members.append(subprocess.Popen(
                command, env={**os.environ, **(group if processes > 1 else {})}, stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=log, text=True,
            ))  # fmt: skip
        if wait:
            self.wait_until_ready()

    def wait_until_ready(self) -> None:
        self._answers()
        self.seconds_to_get_ready = time.perf_counter() - self._started

    def __enter__(self) -> "Group":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for member in self._members:
            member.kill()
            member.wait()

    def turn(self, steps: int) -> dict[str, float]:
        """Seconds of the slowest process, mean loss, and total memory in MiB."""
        self.begin(steps)
        return self.finish()

    def begin(self, steps: int) -> None:
        for member in self._members:
            assert member.stdin is not None
            member.stdin.write(f"{steps}\n")
            member.stdin.flush()

    def finish(self) -> dict[str, float]:
        answers = self._answers()
        return {
            "seconds": max(answer["seconds"] for answer in answers),
            "loss": statistics.mean(answer["loss"] for answer in answers),
            "memory": sum(answer["memory"] for answer in answers),
        }

    def _answers(self) -> list[dict[str, Any]]:
        lines = [member.stdout.readline() for member in self._members if member.stdout is not None]
        if not all(lines):
            raise SystemExit(f"a contestant has died: {self._members[0].args!r}; run it by hand to see why")
        return [json.loads(line) for line in lines]


Turns = dict[str, list[dict[str, float]]]


def take_turns(
    contestants: Mapping[str, tuple[str, Sequence[str]]], steps: int, repeats: int, processes: int = 1
) -> Turns:
    """Each contestant's turns, interleaved, after one warm-up turn."""
    with ExitStack() as alive:
        groups = {
            name: alive.enter_context(Group(loop, settings, processes))
            for name, (loop, settings) in contestants.items()
        }
        for group in groups.values():
            group.turn(steps)
        turns: Turns = {name: [] for name in groups}
        for _ in range(repeats):
            for name, group in groups.items():
                turns[name].append(group.turn(steps))
    return turns


def ratio(turns: Turns, ours: str, theirs: str) -> str:
    """Speed of `ours` as a multiple of `theirs`: the median and the quartiles of the repeats."""
    values = [b["seconds"] / a["seconds"] for a, b in zip(turns[ours], turns[theirs], strict=True)]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def median(turns: Turns, name: str) -> float:
    return statistics.median(turn["seconds"] for turn in turns[name])


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(row)} |" for row in [head, *rows]]
    return [lines[0], "| --- |" + " ---: |" * (len(head) - 1), *lines[1:], ""]


def training(base: Sequence[str], folder: Path, repeats: int) -> list[str]:
    cells: dict[str, Turns] = {}
    sizes: dict[str, int] = {}
    for processes, precision in (1, "fp32"), (1, "bf16"), (2, "fp32"):
        for size, steps in STEPS.items():
            shared = [*base, *QUIET, f"train.batch_size={size}", f"train.precision={precision}"]
            cell = f"{precision}, {size}" if processes == 1 else f"2 processes, {size}"
            runs = {
                name: (
                    "ours",
                    [
                        *shared,
                        f"train.compile={compiled}",
                        f"runs_dir={folder / cell.replace(', ', '_')}",
                        f"name={name}",
                    ],
                )
                for name, compiled in {"ours": "false", "compiled": "true"}.items()
            }
            others = {name: (name, shared) for name in ("memory", "floor")}
            if processes == 2:
                contestants = {**runs, "memory": others["memory"]}
            else:
                tutorial = {"tutorial": ("tutorial", shared)} if precision == "fp32" and size == 128 else {}
                jax = {"jax": ("jax", shared)} if importlib.util.find_spec("jax") else {}
                contestants = {**runs, **tutorial, **others, **jax}
            sizes[cell] = size * steps
            cells[cell] = take_turns(contestants, steps, repeats, processes)
            print(cell, {name: f"{sizes[cell] / median(cells[cell], name):.0f}/s" for name in contestants}, flush=True)

    def row(title: str, value: Any) -> list[str]:
        return [title, *(value(cell, turns) for cell, turns in cells.items())]

    rates = [
        row(title, lambda cell, turns, n=name: f"{sizes[cell] / median(turns, n):.0f}" if n in turns else "")
        for name, title in LOOPS.items()
    ]
    losses = [
        row(title, lambda cell, turns, n=name: f"{turns[n][-1]['loss']:.1f}" if n in turns else "")
        for name, title in LOOPS.items() if name != "floor"
    ]  # fmt: skip
    memory = [
        row(title, lambda cell, turns, n=name: f"{turns[n][-1]['memory']:.0f}" if n in turns else "")
        for name, title in LOOPS.items()
    ]
    ratios = [
        row(
            f"{LOOPS[ours]} / {LOOPS[theirs]}",
            lambda cell, turns, a=ours, b=theirs: ratio(turns, a, b) if b in turns else "",
        )
        for ours in ("ours", "compiled") for theirs in ("tutorial", "memory", "jax", "floor")
    ]  # fmt: skip
    head = list(cells)
    return [
        "## Training", "",
        "The tutorial's network (784-400-20), Adam at 1e-3. On two processes the in-memory loop uses",
        "DistributedDataParallel.", "",
        *markdown(["images per second", *head], rates),
        *markdown(["times as fast, median (quartiles)", *head], ratios),
        "A check of equal work: the mean loss of each loop's last turn after equally many steps, nats per image.", "",
        *markdown(["loss", *head], losses),
        *markdown(["peak memory, MiB", *head], memory),
    ]  # fmt: skip


def convolutional(base: Sequence[str], folder: Path, repeats: int) -> list[str]:
    shared = [*QUIET, "data.name=noise", "data.validation_images=0", "train.batch_size=32", "model.architecture=conv"]
    shared += [f"runs_dir={folder / 'convolutional'}", "train.compile=false"]
    loops = {"ours": "ours", "memory": "conv_memory", "floor": "conv_floor"}
    contestants = {
        f"{name} {precision}": (loop, [*shared, f"train.precision={precision}", f"name={precision}"])
        for precision in ("fp32", "bf16")
        for name, loop in loops.items()
    }
    turns = take_turns(contestants, CONV_STEPS, repeats)
    rates = {name: f"{32 * CONV_STEPS / median(turns, name):.0f}" for name in turns}
    print("convolutional", rates, flush=True)
    titles = {"ours": LOOPS["ours"], "memory": LOOPS["memory"], "floor": "convolutions alone"}
    rows = [
        [title, *(rates[f"{name} {precision}"] for precision in ("fp32", "bf16"))] for name, title in titles.items()
    ]
    for title, other in ("the in-memory loop in fp32", "memory fp32"), ("the in-memory loop", "memory"):
        others = [other if " " in other else f"{other} {precision}" for precision in ("fp32", "bf16")]
        compared = zip(("ours fp32", "ours bf16"), others, strict=True)
        rows.append([f"times as fast as {title}", *(ratio(turns, ours, theirs) for ours, theirs in compared)])
    times = [ratio(turns, f"floor {precision}", f"ours {precision}") for precision in ("fp32", "bf16")]
    return [
        "## Convolutions", "",
        "Images per second of `model.architecture=conv` with its default options, on images of 32 x 32 x 3, 32 a step.",
        "", *markdown(["", "fp32", "bf16"], [*rows, ["a step / its convolutions alone", *times]]),
    ]  # fmt: skip


def evaluation(base: Sequence[str], folder: Path, repeats: int) -> list[str]:
    shared = [*base, "evaluate.batch_size=500"]
    turns = take_turns({"ours": ("ours_evaluate", shared), "memory": ("memory_evaluate", shared)}, 2, repeats)
    rates = [
        [title, f"{20_000 / median(turns, name):.0f}"]
        for name, title in (("ours", LOOPS["ours"]), ("memory", LOOPS["memory"]))
    ]
    return [
        "## Evaluation", "",
        "Negative ELBO of 10,000 test images, with one posterior sample; this package gathers each image's terms.", "",
        *markdown(["images per second", "fp32"], [*rates, ["times as fast", ratio(turns, "ours", "memory")]]),
    ]  # fmt: skip


def seconds_until(command: Sequence[str], mark: str, most: float = 600.0) -> float:
    """Seconds from the command to the line that contains `mark`.

    Then all that the command has started is killed, as it is after `most` seconds without such a line.
    """
    started, said = time.perf_counter(), ""
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        alarm = threading.Timer(most, kill_session, [process])
        alarm.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if mark in line:
                    return time.perf_counter() - started
                said = line.strip() or said
        finally:
            alarm.cancel()
            kill_session(process)
    raise SystemExit(
        f"the command ended, or took {most:g} s, without printing {mark!r}: {' '.join(command)}\nIt ended with: {said}"
    )


def kill_session(process: subprocess.Popen[Any]) -> None:
    """Kill a process that leads a session, and the processes that it has started there."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def start(base: Sequence[str], folder: Path, repeats: int) -> list[str]:
    script = folder / "six_lines.py"
    script.write_text(SIX_LINES)
    launch = [sys.executable, *LAUNCH, "--config_file", str(REPOSITORY / "launch/one_process.yaml")]
    train = [*launch, str(REPOSITORY / "vae_dist/train.py"), *base, f"runs_dir={folder / 'starts'}"]
    turns: Turns = {"ours": [], "six lines": []}
    for number in range(repeats + 1):
        for name, command in ("six lines", [*launch, str(script)]), ("ours", [*train, f"name=start_{number}"]):
            turns[name].append({"seconds": seconds_until(command, "the first step is done")})
    turns = {name: values[1:] for name, values in turns.items()}  # the first ones read the disk
    pairs = zip(turns["ours"], turns["six lines"], strict=True)
    middle = statistics.median(a["seconds"] / b["seconds"] for a, b in pairs)
    rows = [[name, f"{median(turns, name):.2f}"] for name in turns]
    return [
        "## Start", "",
        "From `accelerate launch` to the first optimizer step, data read and W&B offline, against six lines that",
        "import the same and take one Adam step.", "",
        *markdown(["seconds", "one process"], [*rows, ["ours / six lines, median", f"{middle:.2f}"]]),
    ]  # fmt: skip


def scale(base: Sequence[str], folder: Path, repeats: int) -> list[str]:
    shared = [
        *QUIET,
        "model.latent_dim=20",
        "train.batch_size=1024",
        "train.compile=false",
        "data.name=synthetic_digits",
    ]
    shared += [f"data.root={folder / 'digits'}", f"runs_dir={folder / 'scale'}"]
    rows = []
    for images in (10**4, 10**5, 10**6):
        settings = [*shared, f"data.synthetic_images={images}"]
        with Group("ours", [*settings, f"name=draw_{images}"]) as group:  # drawn once, then cached
            drawn = group.seconds_to_get_ready
        with Group("ours", [*settings, f"name=again_{images}"]) as group:
            group.turn(STEPS[1024])
            turns = [group.turn(STEPS[1024]) for _ in range(repeats)]
            rate = STEPS[1024] * 1024 / statistics.median(turn["seconds"] for turn in turns)
            ready, memory = group.seconds_to_get_ready, turns[-1]["memory"]
            rows.append([f"{images:,}", f"{drawn:.1f}", f"{ready:.1f}", f"{memory:.0f}", f"{rate:.0f}"])
        print(rows[-1], flush=True)
    head = ["training images", "s to load, digits drawn first", "s to load", "peak memory, MiB", "images per second"]
    return ["## Scale", "", "Embedded digits, batches of 1024.", "", *markdown(head, rows)]


def cadence(base: Sequence[str], folder: Path, repeats: int) -> list[str]:
    rows = []
    for held_out, compiled, title in (
        (0, "false", "pictures, a checkpoint, W&B's record"),
        (0, "true", "the same, compiled"),
        (5000, "false", "and a validation on 5,000 images"),
    ):
        shared = [*base, f"train.compile={compiled}", "train.batch_size=128"]
        shared += [f"runs_dir={folder / f'cadence_{compiled}'}"]
        shared += [f"data.validation_images={held_out}", "train.steps=1000000000"]
        contestants = {
            "on": ("ours", [*shared, "tracking.wandb=offline", f"name=on_{held_out}"]),
            "off": ("ours", [*shared, *QUIET, f"name=off_{held_out}"]),
        }
        turns = take_turns(contestants, (60_000 - held_out) // 128, repeats)
        ratios = [a["seconds"] / b["seconds"] for a, b in zip(turns["on"], turns["off"], strict=True)]
        seconds = [f"{median(turns, name):.3f}" for name in ("on", "off")]
        rows.append([title, *seconds, f"{statistics.median(ratios):.3f}"])
        print(rows[-1], flush=True)
    return [
        "## Cadence", "",
        "Seconds per epoch in batches of 128, with and without what happens once per epoch.", "",
        *markdown(["once per epoch", "with", "without", "with / without, median"], rows),
    ]  # fmt: skip


def machine() -> str:
    import torch

    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{(models or [platform.processor()])[0]}, {os.cpu_count()} cores{gpu}, torch {torch.__version__}"


PARTS = {
    "training": training,
    "convolutional": convolutional,
    "evaluation": evaluation,
    "start": start,
    "scale": scale,
    "cadence": cadence,
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", nargs="?", default="data")
    parser.add_argument("--repeats", type=int, default=7, help="2 or more")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    given = parser.parse_args()
    root = Path(given.root).resolve()
    name = "mnist" if (root / "MNIST").is_dir() else "synthetic_digits"
    with tempfile.TemporaryDirectory() as directory:
        data_root = root if name == "mnist" else Path(directory)
        base = [f"data.root={data_root}", f"data.name={name}", "data.validation_images=0", "model.latent_dim=20"]
        text = [
            "# Speed", "",
            "This page has the whole tables behind the summary in [performance.md](performance.md). `make bench`",
            "writes it; `tests/benchmarks/speed.py` describes the method. Loops take turns, a ratio compares turns of",
            "the same moment, and the numbers are medians, because rates vary on a shared machine.", "",
            f"Machine: {machine()}. Data: {name}. {given.repeats} repeats, {date.today()}.", "",
        ]  # fmt: skip
        for part in given.only:
            text += PARTS[part](base, Path(directory), given.repeats)
    print("\n" + "\n".join(text))
    if given.only == list(PARTS):
        RESULT.write_text("\n".join(text), encoding="utf-8")
