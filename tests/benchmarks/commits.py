"""Measure the speed of the working tree against an older commit.

    python tests/benchmarks/commits.py OLD [DATA_ROOT] [--repeats 15] [--only training two evaluation start]

OLD is a commit, which is checked out into a temporary worktree, or the folder of another checkout; it has this folder's
contestants too. Both sides take turns, so that each ratio compares turns of the same moment. Prints medians of the
ratios, with quartiles: the new side's speed as a multiple of the old one's.
"""

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

if __name__ == "__main__":  # run by its path
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from tests.benchmarks.speed import QUIET, STEPS, Group, seconds_until
from tests.golden import REPOSITORY, checkout

PARTS = ("training", "two", "evaluation", "start")


def compare(old: Path, loop: str, settings: Sequence[str], steps: int, repeats: int, processes: int = 1) -> str:
    """Return the ratio of a loop's speed on both sides, new to old."""
    seconds: dict[Path, list[float]] = {old: [], REPOSITORY: []}
    with ExitStack() as alive:
        groups = {
            root: alive.enter_context(Group(loop, [*settings, f"name={number}"], processes, root=root))
            for number, root in enumerate(seconds)
        }
        for group in groups.values():
            group.turn(steps)
        for repeat in range(repeats):
            for root in list(groups)[:: 1 if repeat % 2 else -1]:
                seconds[root].append(groups[root].turn(steps)["seconds"])
    return quartiles(seconds[old], seconds[REPOSITORY])


def quartiles(old: Sequence[float], new: Sequence[float]) -> str:
    ratios = [before / after for before, after in zip(old, new, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return f"{middle:.3f} ({low:.3f} to {high:.3f}); least times {min(old) / min(new):.3f}"


def start(old: Path, settings: Sequence[str], repeats: int) -> str:
    """Return the ratio of the speed from the command to the first step."""
    seconds: dict[Path, list[float]] = {old: [], REPOSITORY: []}
    for repeat in range(repeats + 1):
        for root in list(seconds)[:: 1 if repeat % 2 else -1]:
            command = [sys.executable, str(root / "vae_dist/train.py"), *settings, f"name={repeat}_{len(root.parts)}"]
            seconds[root].append(seconds_until(command, "the first step is done"))
    return quartiles(*(values[1:] for values in seconds.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old")
    parser.add_argument("data_root", nargs="?")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    options = parser.parse_args()
    with checkout(options.old) as old, tempfile.TemporaryDirectory() as folder:
        data = ["data.name=mnist", f"data.root={options.data_root}"] if options.data_root else []
        base = [*(data or ["data.name=synthetic_digits", f"data.root={folder}"]), *QUIET, "device=cpu"]
        base += ["model.latent_dim=20", f"runs_dir={folder}/runs"]

        def say(what: str, result: str) -> None:
            print(f"{what}: {result}; load {os.getloadavg()[0]:.1f}", flush=True)

        for processes, part in (1, "training"), (2, "two"):
            for size, steps in STEPS.items() if part in options.only else ():
                for compiled in "false", "true":
                    given = [*base, f"train.batch_size={size}", f"train.compile={compiled}"]
                    what = f"{processes} process(es), batch {size}, compile={compiled}"
                    say(what, compare(old, "ours", given, 2 * steps, options.repeats, processes))
        if "evaluation" in options.only:
            say("evaluation", compare(old, "ours_evaluate", [*base, "evaluate.batch_size=500"], 2, options.repeats))
            given = [*base, "evaluate.batch_size=500", "evaluate.importance_samples=16"]
            say("importance weights", compare(old, "ours_likelihood", given, 1, options.repeats))
        if "start" in options.only:
            say("start to the first step", start(old, [*base, "train.compile=false"], options.repeats))


if __name__ == "__main__":
    main()
