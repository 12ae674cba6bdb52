"""The work of one process of test_two_processes: `python tests/gpu/jobs.py JOBS.json`.

JOBS.json is a list of [command, run, arguments]. One launch does it all, because importing torch takes seconds.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

if __name__ == "__main__":  # run by its path
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import pytest

from vae_dist import config
from vae_dist.data.batches import Batch, Batches
from vae_dist.encoding.encode import encode
from vae_dist.evaluation.evaluate import evaluate
from vae_dist.terminal import console
from vae_dist.training.loop import train
from vae_dist.views.sampling import sample


def is_last() -> bool:
    return int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1


def interrupted(end: Callable[[], None], run: str, arguments: list[str]) -> None:
    """Train; the last process calls `end` once it has taken some steps."""
    draw = Batches.__call__

    def ending(batches: Batches, steps: range) -> Batch:
        if steps.stop > 20:
            end()
        return draw(batches, steps)

    with pytest.MonkeyPatch.context() as patch:
        if is_last():
            patch.setattr(Batches, "__call__", ending)
        train(config.load(arguments))


def fail() -> None:
    raise OSError("this process's disk is gone")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


COMMANDS: dict[str, Callable[[str, list[str]], object]] = {
    "train": lambda run, arguments: train(config.load(arguments)),
    "fail": partial(interrupted, fail),
    "die": partial(interrupted, die),
    "disagree": lambda run, arguments: train(config.load([*arguments, f"seed={17 * is_last()}"])),
    "evaluate": lambda run, arguments: evaluate(Path(run), arguments),
    "sample": lambda run, arguments: sample(Path(run), arguments),
    "encode": lambda run, arguments: encode(Path(run), arguments),
}


def main() -> None:
    for command, run, arguments in json.loads(Path(sys.argv[1]).read_text()):
        COMMANDS[command](run, arguments)


if __name__ == "__main__":
    console.run(main)
