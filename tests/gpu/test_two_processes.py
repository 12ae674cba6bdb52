"""Two processes that share one card and exchange gradients by NCCL, as two machines with a card each would.

NCCL refuses a second process on a card of the same machine. NCCL_HOSTID gives each process a machine of its own, and
sockets join them.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.forked import unused_port
from tests.gpu import jobs
from tests.gpu.conftest import REPOSITORY
from tests.gpu.test_training import outcome

if not torch.cuda.is_available():
    pytest.skip("there is no GPU", allow_module_level=True)
CARD = "cuda"
SECONDS = 240  # of one launch
PRECISIONS = "fp32", "fp16"
UNEVEN = ["train.batch_size=101", "train.accumulate=2"]  # shards of 50 and of 51 images
READERS = {
    "evaluate": ["evaluate.importance_samples=8"],
    "sample": ["sample.count=30"],
    "encode": ["encode.latents=draws", "encode.shard_images=100"],
}

Job = tuple[str, str, list[str]]


def start(work: Sequence[Job], folder: Path, hosts: Sequence[str] = ("one", "other")) -> list[tuple[int, str]]:
    """Do the work on a process for each host: their exit codes and what they printed."""
    (folder / "jobs.json").write_text(json.dumps(work))
    common = {
        **os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(unused_port()), "WORLD_SIZE": str(len(hosts)),
        "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "NCCL_SOCKET_IFNAME": "lo", "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_NET": "Socket", "NCCL_IB_DISABLE": "1", "NCCL_MNNVL_ENABLE": "0",
    }  # fmt: skip
    started = [
        subprocess.Popen(
            [sys.executable, str(REPOSITORY / "tests/gpu/jobs.py"), str(folder / "jobs.json")],
            env={**common, "RANK": str(rank), "NCCL_HOSTID": host},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank, host in enumerate(hosts)
    ]  # fmt: skip
    try:
        printed = [process.communicate(timeout=SECONDS)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, text) for process, text in zip(started, printed, strict=True)]


@pytest.fixture(scope="module")
def done(arguments: list[str], runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of runs in which one process, and then two, have done their work."""
    folder = tmp_path_factory.mktemp("two")
    common = [*arguments, *UNEVEN, "train.log_every=7"]
    in_float64 = [*common, "train.precision=fp64"]

    def read(processes: int) -> list[Job]:
        return [
            (command, str(runs / "alone"), [f"output={folder}/{command}_{processes}", f"device={CARD}", *given])
            for command, given in READERS.items()
        ]

    for command, run, given in [("train", "", [*in_float64, "name=alone"]), *read(1)]:
        jobs.COMMANDS[command](run, given)
    work: list[Job] = [("train", "", [*in_float64, "name=two"])]
    for precision in PRECISIONS:
        given = [*common, f"train.precision={precision}"]
        work += [
            ("train", "", [*given, f"name=two_{precision}_straight"]),
            *[("train", "", [*given, f"name=two_{precision}_cut", f"train.steps={steps}"]) for steps in (41, 70)],
        ]
    for code, printed in start([*work, *read(2)], folder):
        assert code == 0, printed
    return folder


def test_two_processes_train_as_one_does(done: Path, runs: Path) -> None:
    (alone, _, ours), (two, _, theirs) = (outcome(runs / name) for name in ("alone", "two"))
    assert "2 processes" in (runs / "two/log.txt").read_text()
    losses, of_two = (
        [record["train/loss"] for record in records if "train/loss" in record] for records in (ours, theirs)
    )
    assert len(losses) == 10 and of_two == pytest.approx(losses, rel=1e-9)
    assert alone != two  # they have added in another order
    weights = (load_file(runs / f"{name}/checkpoints/step_00000070/model.safetensors") for name in ("alone", "two"))
    torch.testing.assert_close(*weights, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_resumed_run_of_two_processes_is_bitwise_the_uninterrupted_one(
    precision: str, done: Path, runs: Path
) -> None:
    straight, cut = (outcome(runs / f"two_{precision}_{name}")[:2] for name in ("straight", "cut"))
    assert cut == straight


@pytest.mark.parametrize("command", READERS)
def test_two_processes_read_a_run_as_one_does(command: str, done: Path) -> None:
    one, two = (contents(done / f"{command}_{processes}") for processes in (1, 2))
    assert one and two == one


def contents(folder: Path) -> dict[str, Any]:
    """The files of results, without the time of their making and the number of processes."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".safetensors":
            found[path.name] = path.read_bytes()
        elif path.name == "evaluation.json":
            found[path.name] = json.loads(path.read_text())["negative_log_likelihood"]
    return found


def test_a_process_that_waits_for_a_failed_one_ends_with_its_reason(arguments: list[str], tmp_path: Path) -> None:
    work: list[Job] = [("fail", "", [*arguments, "train.steps=100000", "name=failed", f"runs_dir={tmp_path}"])]
    for code, printed in start(work, tmp_path):
        assert code == 1 and "this process's disk is gone" in printed, printed


def test_a_process_that_waits_for_a_killed_one_ends(arguments: list[str], tmp_path: Path) -> None:
    given = [*arguments, "train.steps=100000", "runtime.timeout=30", "name=killed", f"runs_dir={tmp_path}"]
    (waits, printed), (killed, _) = start([("die", "", given)], tmp_path)
    assert killed == -signal.SIGKILL and waits not in (0, killed), printed


def test_processes_that_disagree_end_with_one_message(arguments: list[str], tmp_path: Path) -> None:
    given = [*arguments, "name=odd", f"runs_dir={tmp_path}"]
    codes, printed = zip(*start([("disagree", "", given)], tmp_path), strict=True)
    assert codes == (2, 2) and "".join(printed).count("do not agree on seed: 0 on process 0, 17 on process 1") == 1


def test_two_processes_of_one_machine_are_told_that_each_needs_a_card(arguments: list[str], tmp_path: Path) -> None:
    work: list[Job] = [("train", "", [*arguments, "name=refused", f"runs_dir={tmp_path}"])]
    ended = start(work, tmp_path, hosts=("one", "one"))
    assert {code for code, _ in ended} == {2}
    assert any("start at most one process for each GPU" in printed for _, printed in ended), ended
