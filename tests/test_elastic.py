"""Several machines, simulated by torchrun agents on the loopback interface with a c10d rendezvous."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.conftest import REPOSITORY, newest_checkpoint
from tests.forked import unused_port

TRAIN = str(REPOSITORY / "vae_dist/train.py")


def agent(port: int, options: list[str], arguments: list[str]) -> subprocess.Popen[str]:
    """Start one machine's torchrun."""
    rendezvous = [
        f"--rdzv-endpoint=127.0.0.1:{port}",
        "--rdzv-backend=c10d",
        "--rdzv-id=job-17",
        "--local-addr=127.0.0.1",
    ]
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *rendezvous, *options, TRAIN, *arguments],
        env={**os.environ, "GLOO_SOCKET_IFNAME": "lo"},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )


def losses(run_dir: Path) -> list[tuple[int, float]]:
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(record["step"], record["train/loss"]) for record in records if "train/loss" in record]


def finish(process: subprocess.Popen[str], seconds: float = 120) -> str:
    _, output = process.communicate(timeout=seconds)
    assert process.returncode == 0, output[-3000:]
    return output


@pytest.mark.slow
def test_two_machines_train_bitwise_what_one_with_two_processes_trains(
    smoke_arguments: list[str], tmp_path: Path
) -> None:
    port = unused_port()
    options = ["--nnodes=2", "--nproc-per-node=1"]
    machines = [agent(port, options, [*smoke_arguments, "name=two_machines"]) for _ in range(2)]
    outputs = [finish(machine) for machine in machines]
    assert sum("2 processes on cpu (threads: 1)" in text for text in outputs) == 1
    assert not [text for text in outputs if "OMP_NUM_THREADS" in text]  # Accelerate did not choose the threads instead
    finish(agent(unused_port(), ["--nnodes=1", "--nproc-per-node=2"], [*smoke_arguments, "name=one_machine"]))
    for name in ("model.safetensors", "optimizer.safetensors"):
        ours, theirs = (
            (tmp_path / f"runs/{run}/checkpoints/step_00000040/{name}").read_bytes()
            for run in ("two_machines", "one_machine")
        )
        assert ours == theirs


@pytest.mark.slow
def test_after_a_lost_machine_the_other_continues_the_same_plan_alone(
    smoke_arguments: list[str], tmp_path: Path
) -> None:
    settings = [
        *smoke_arguments,
        "train.precision=fp64",
        "train.steps=4000",
        "train.log_every=1",
        "train.validate_every=4000",
        "checkpoint.every=100",
    ]
    port = unused_port()
    elastic = ["--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=3", "--monitor-interval=1"]
    conf = "last_call_timeout=3,join_timeout=60"
    machines = []
    for is_host in (1, 0):
        machines.append(agent(port, [*elastic, f"--rdzv-conf=is_host={is_host},{conf}"], settings))
        time.sleep(0.5)

    saved: list[Path] = []
    deadline = time.monotonic() + 90
    while not saved or max(saved) < Path("step_00000300"):
        assert time.monotonic() < deadline and machines[0].poll() is None
        saved = [Path(path.name) for path in (tmp_path / "runs").glob("*/checkpoints/step_*")]
        time.sleep(0.02)
    lost = psutil.Process(machines[1].pid)
    for process in [*lost.children(recursive=True), lost]:
        process.kill()
    machines[1].communicate()
    output = finish(machines[0])

    (run_dir,) = (tmp_path / "runs").iterdir()
    assert "2 processes on cpu" in output and "1 process on cpu" in output and "resuming after step" in output
    newest = newest_checkpoint(run_dir)
    assert newest is not None and newest.name == "step_00004000"
    undisturbed = subprocess.run([sys.executable, TRAIN, *settings, "name=undisturbed"], capture_output=True, text=True)
    assert undisturbed.returncode == 0, undisturbed.stderr
    ours, theirs = losses(run_dir), losses(tmp_path / "runs/undisturbed")
    assert [step for step, _ in ours] == list(range(1, 4001))
    # Each step's loss is that of its own images and noise: other ones would change it by nats.
    assert max(abs(ours[step][1] - theirs[step][1]) for step in range(4000)) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "launcher"), [("0", "torchrun"), ("1", "accelerate")])
def test_after_a_killed_process_the_launcher_restarts_the_run(
    rank: str, launcher: str, smoke_arguments: list[str], tmp_path: Path
) -> None:
    start = {
        "torchrun": ["torch.distributed.run", "--nproc-per-node=2", "--max-restarts=1"],
        "accelerate": [
            "accelerate.commands.launch", f"--config_file={REPOSITORY / 'launch/cpu.yaml'}", "--max_restarts=1",
        ],
    }  # fmt: skip
    settings = [*smoke_arguments, "train.steps=2000", "train.validate_every=2000", "checkpoint.every=50", "name=again"]
    process = subprocess.Popen(
        [sys.executable, "-m", *start[launcher], TRAIN, *settings],
        env={**os.environ, "GLOO_SOCKET_IFNAME": "lo"}, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not list((tmp_path / "runs/again/checkpoints").glob("step_*")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    workers = psutil.Process(process.pid).children()
    next(worker for worker in workers if worker.environ().get("RANK") == rank).kill()
    output = finish(process)
    assert "resuming after step" in output and output.count("2 processes on cpu") == 2
    assert newest_checkpoint(tmp_path / "runs/again") == tmp_path / "runs/again/checkpoints/step_00002000"


@pytest.mark.slow
def test_a_process_that_hangs_ends_the_others_within_the_timeout(smoke_arguments: list[str], tmp_path: Path) -> None:
    settings = [*smoke_arguments, "train.steps=100000", "runtime.timeout=4", "train.validate_every=100000", "name=hang"]
    machine = agent(unused_port(), ["--nnodes=1", "--nproc-per-node=2"], [*settings, "checkpoint.every=50"])
    deadline = time.monotonic() + 60
    while not list((tmp_path / "runs/hang/checkpoints").glob("step_*")):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    workers = sorted(psutil.Process(machine.pid).children(), key=lambda worker: worker.create_time())
    workers[1].send_signal(signal.SIGSTOP)
    stopped = time.monotonic()
    workers[0].wait(timeout=20)
    assert 3 < time.monotonic() - stopped < 15
    workers[1].send_signal(signal.SIGKILL)
    _, output = machine.communicate(timeout=60)
    assert machine.returncode == 1 and "Timed out waiting 4000ms" in output
    assert output.count("the run has ended: process 1 of 2 died or hangs") == 1
