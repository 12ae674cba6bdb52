"""Images per second of this package on one GPU, of plain torch loops and of JAX: one batch size, all precisions.

    python tests/gpu/speed.py BATCH_SIZE RESULT.json SETTING ... [--repeats 5] [--wait] [--device cpu] [--steps 10]
                              [--only fp32 tf32]

The loops of tests/benchmarks/contestants.py wait in processes of their own and take turns; medians are written. With
--wait, turns begin at a line on stdin: other sizes can compile at the same time, and measure one after another.
"""

import argparse
import importlib.util
import json
import os
import statistics
import sys
from collections.abc import Callable, Collection
from contextlib import ExitStack
from pathlib import Path

if __name__ == "__main__":  # run by its path
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from tests.benchmarks.speed import QUIET, Group

STEPS = {128: 4000, 1024: 1500, 8192: 400}  # of a turn
PLAIN_STEPS = {128: 400, 1024: 400}  # of loops launched step by step: small batches only
PRECISIONS = "fp32", "tf32", "bf16", "fp16"
LOOPS = {
    "ours": ("this package", PRECISIONS, STEPS),
    "jax": ("JAX, whole turn jitted", ("fp32", "tf32", "bf16"), STEPS),
    "memory": ("in-memory PyTorch loop", ("fp32", "bf16"), PLAIN_STEPS),
    "memory_compiled": ("the same, torch.compile", ("fp32", "bf16"), PLAIN_STEPS),
}

READY = "ready"

Rates = dict[str, float | None]


def measure(
    size: int, settings: list[str], folder: str, repeats: int, most_steps: int, await_turn: Callable[[], object],
    note: Callable[[Rates], None], only: Collection[str],
) -> None:  # fmt: skip
    """Note images per second by `loop, precision` after each turn; None for a loop that can't be run.

    `folder` gets their runs, and a file beside it what they say.
    """
    rates: Rates = {}
    with ExitStack() as alive:
        log = alive.enter_context(open(f"{folder}_{size}.log", "w"))
        groups: dict[str, tuple[Group, int]] = {}
        for loop, (_, precisions, steps) in LOOPS.items():
            if size not in steps or (loop == "jax" and importlib.util.find_spec("jax") is None):
                continue
            for precision in filter(only.__contains__, precisions):
                given = [*QUIET, "device=cuda", *settings, f"train.batch_size={size}", f"train.precision={precision}"]
                given += [f"runs_dir={folder}", f"name={loop}_{precision}_{size}"]
                group = alive.enter_context(Group(loop, given, wait=False, log=log))
                groups[f"{loop}, {precision}"] = group, min(steps[size], most_steps)
        # Importing and compiling, all side by side.
        for what in ("wait_until_ready", "begin", "finish"):
            for name, (group, steps_of_turn) in list(groups.items()):
                try:
                    getattr(group, what)(*([steps_of_turn] if what == "begin" else []))
                except (SystemExit, OSError):
                    rates[name] = None
                    del groups[name]
        await_turn()
        seconds: dict[str, list[float]] = {name: [] for name in groups}
        for _ in range(repeats):
            for name, (group, steps_of_turn) in groups.items():
                seconds[name].append(group.turn(steps_of_turn)["seconds"])
                rates[name] = steps_of_turn * size / statistics.median(seconds[name])
                note(rates)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", type=int, choices=STEPS)
    parser.add_argument("result", type=Path)
    parser.add_argument("settings", nargs="*")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--wait", action="store_true")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", nargs="+", choices=PRECISIONS, default=PRECISIONS, help="precisions")
    parser.add_argument("--steps", type=int, default=max(STEPS.values()), help="at most so many in a turn")
    options = parser.parse_args()
    os.environ.update(
        XLA_PYTHON_CLIENT_PREALLOCATE="false", TORCHINDUCTOR_COMPILE_THREADS="1"
    )  # they share the machine

    def note(rates: Rates) -> None:
        options.result.write_text(json.dumps(rates, indent=2))
        print({name: rate and round(rate) for name, rate in rates.items()}, flush=True)

    def await_turn() -> None:
        print(READY, flush=True)
        if options.wait:
            sys.stdin.readline()

    settings = [*options.settings, f"device={options.device}"]
    measure(
        options.size,
        settings,
        str(options.result.parent / "runs"),
        options.repeats,
        options.steps,
        await_turn,
        note,
        options.only,
    )
