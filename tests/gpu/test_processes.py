"""A training on one card in a process of its own, as a user starts it: killed, stopped, and resumed."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.gpu.conftest import REPOSITORY
from tests.gpu.test_training import outcome

if not torch.cuda.is_available():
    pytest.skip("there is no GPU", allow_module_level=True)
LAUNCH = ["-m", "accelerate.commands.accelerate_cli", "launch", "--quiet"]
TRAIN = str(REPOSITORY / "vae_dist/train.py")


SLOW = ["train.steps=60000", "train.log_every=1000", "train.validate_every=20000", "checkpoint.every=5000"]


def command(arguments: list[str], name: str) -> list[str]:
    return [sys.executable, TRAIN, *arguments, *SLOW, f"name={name}"]


def test_a_killed_and_stopped_training_resumes_bitwise(arguments: list[str], runs: Path) -> None:
    straight = subprocess.Popen(command(arguments, "straight"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    for number, code in (signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 128 + signal.SIGTERM):
        newest = newest_step(runs / "resumed")
        process = subprocess.Popen(command(arguments, "resumed"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        give_up = time.monotonic() + 120  # to start and compile, beside the other tests
        while newest_step(runs / "resumed") <= newest and time.monotonic() < give_up and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(number)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == code, output
    done = subprocess.run(command(arguments, "resumed"), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    output, _ = straight.communicate(timeout=120)
    assert straight.returncode == 0, output
    assert outcome(runs / "resumed", 60000) == outcome(runs / "straight", 60000)


def newest_step(run_dir: Path) -> int:
    return max((int(path.name[5:]) for path in run_dir.glob("checkpoints/step_*")), default=0)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU: NCCL needs a card for each process")
def test_several_gpus_train_as_one_does(arguments: list[str], runs: Path) -> None:
    losses = []
    for launch in "one_process", "all_gpus":
        config_file = str(REPOSITORY / f"launch/{launch}.yaml")
        given = [*arguments, "train.steps=300", "train.log_every=10", f"name={launch}"]
        done = subprocess.run(
            [sys.executable, *LAUNCH, "--config_file", config_file, TRAIN, *given],
            capture_output=True, text=True, timeout=200,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        rows = outcome(runs / launch, 300)[2]
        losses.append([row["train/loss"] for row in rows if "train/loss" in row])
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=0)
