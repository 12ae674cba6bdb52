"""Make the run directories of tests/fixtures/runs. They were made by the code of commit 36a6cd1, in an empty folder.

    python tests/make_fixtures.py
    torchrun --standalone --nproc-per-node 3 tests/make_fixtures.py

They are not made again when the format changes: they show that runs of earlier versions are read. A later format gets
fixtures of its own next to these. The script names internals of that commit, so a later one may need that checkout.
"""

import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run by its path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import pytest

from vae_dist import config
from vae_dist.errors import StoppedError
from vae_dist.evaluation.evaluate import evaluate
from vae_dist.reports.study import study
from vae_dist.training.loop import train
from vae_dist.views.sampling import sample

SETTINGS = [
    "data.name=synthetic_digits",
    "data.synthetic_images=60",
    "data.validation_images=10",
    "model.hidden_dims=[2]",
    "train.batch_size=5",
    "train.steps=20",
    "train.validate_every=10",
    "train.log_every=4",
    "train.threads=1",
    "train.compile=false",
    "checkpoint.every=1000",
    "evaluate.batch_size=10",
    "evaluate.importance_samples=4",
    "tracking.wandb=disabled",
    "device=cpu",
]
STUDY = ["name=study", "model.latent_dim=1,2", "train.steps=10"]


def calling(function: Callable[..., Any], call: int) -> Callable[..., Any]:
    """`function`, which asks the last of the processes to stop when it is called for this time."""
    calls = 0

    def with_signal(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call and int(os.environ.get("RANK", 0)) == int(os.environ.get("WORLD_SIZE", 1)) - 1:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)  # for the thread that takes it
        return function(*arguments)

    return with_signal


def stopped(name: str, target: str, function: Callable[..., Any], call: int) -> None:
    """A run that is asked to stop at a call of one of its functions."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(StoppedError):
        patch.setattr("vae_dist.distributed.stopping.CHECK_SECONDS", 0.0)  # after every step
        patch.setattr(target, calling(function, call))
        train(config.load([*SETTINGS, f"name={name}", "model.latent_dim=2"]))


def main() -> None:
    from vae_dist.data.batches import Batches
    from vae_dist.evaluation import metrics

    step = ("vae_dist.data.batches.Batches.__call__", Batches.__call__, 6)  # with 2 of a record's 4 steps done
    if "RANK" in os.environ:
        stopped("three_processes", *step)
        return
    stopped("one_process", *step)
    stopped("validation_pending", "vae_dist.training.milestones.score", metrics.score, 1)
    study(config.load_study([*SETTINGS, *STUDY]))
    run_dir = train(config.load([*SETTINGS, "name=evaluated", "model.latent_dim=2", "train.validate_every=20"]))
    evaluate(run_dir)
    sample(run_dir, ["sample.count=4"])
    shutil.rmtree("data")


if __name__ == "__main__":
    main()
