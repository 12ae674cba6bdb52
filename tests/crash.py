"""Saves that are killed before each of their operations on the file system; test_checkpoint runs this.

    python tests/crash.py FOLDER

A child process is forked for each of these points and ends there, as by SIGKILL. Prints one JSON object per point.
"""

import json
import os
import shutil
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path

if __name__ == "__main__":  # run by its path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from tests.conftest import Parts, newest_checkpoint
from vae_dist import config
from vae_dist.models import build_vae
from vae_dist.runs import saving
from vae_dist.runs.checkpoint import Checkpoint
from vae_dist.runs.run import RunDirectory
from vae_dist.runs.state import Best, TrainingState

TOUCHING = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "os.chmod", "os.listdir"}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    os.fsync = lambda fd: None  # slow, and only a power cut would tell
    run_config = config.load(["model.hidden_dims=[8]", "model.latent_dim=2", "name=a", "checkpoint.keep=2"])
    run_config.data.image_shape = [1, 6, 6]
    vae = build_vae(run_config, [1, 6, 6])
    parts = Parts(vae, run_config)
    total = vae(torch.rand(4, 1, 6, 6), torch.randn(1, 4, 2)).likelihood.mean.sum()
    parts.optimizer.step(torch.autograd.grad(total, list(vae.parameters())), torch.tensor(1e-3))

    def save(run_dir: Path, step: int, *, pending: bool = False) -> None:
        state = TrainingState(step, best=Best(step, 1.0), validation_pending=pending)
        RunDirectory(run_dir).save(run_config, parts, state)

    for again in (False, True):  # a new step, and one that replaces a checkpoint of the same step
        for point in count(1):
            run_dir = folder / "run"
            shutil.rmtree(run_dir, ignore_errors=True)
            save(run_dir, 1)
            save(run_dir, 2, pending=True)
            touched = crash_at(point, run_dir, lambda: save(run_dir, 2 if again else 3))  # noqa: B023
            if touched is None:
                break
            left = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
            saving.recover(run_dir)
            newest = newest_checkpoint(run_dir)
            assert newest is not None
            other = Parts(build_vae(run_config, [1, 6, 6]), run_config)
            state = Checkpoint(newest).load_training(other)
            save(run_dir, 4)  # the run continues
            after = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
            print(json.dumps({"again": again, "touched": touched, "left": left, "step": state.step, "after": after}))


def crash_at(point: int, run_dir: Path, work: Callable[[], None]) -> str | None:
    """Do `work` in a child process that ends just before it touches the run's directory for the `point`th time."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        seen = count(1)

        def hook(event: str, arguments: tuple[object, ...]) -> None:
            if event in TOUCHING and str(run_dir) in str(arguments) and next(seen) == point:
                os.write(writer, f"{event} {arguments[0]}".encode())
                os._exit(137)

        sys.addaudithook(hook)
        work()
        os._exit(0)
    os.close(writer)
    _, status = os.waitpid(child, 0)
    touched = os.read(reader, 1000).decode()
    os.close(reader)
    assert os.waitstatus_to_exitcode(status) == (137 if touched else 0)
    return touched or None


if __name__ == "__main__":
    main(Path(sys.argv[1]))
