import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import psutil
import pytest

import vae_dist
from tests.conftest import REPOSITORY, MakeConfig, newest_checkpoint
from tests.test_trainer import final, timeless
from vae_dist.config import Config
from vae_dist.distributed import stopping
from vae_dist.distributed.stopping import SIGNALS, StopRequests, Watch
from vae_dist.errors import StoppedError
from vae_dist.evaluation import metrics
from vae_dist.objectives import ElboTerms
from vae_dist.runs.checkpoint import Checkpoint
from vae_dist.runs.lookup import find
from vae_dist.training import cadence, loop, milestones
from vae_dist.training.loop import train

TRAIN = str(REPOSITORY / "vae_dist/train.py")


@pytest.fixture(autouse=True)
def none_ignored() -> Iterator[None]:
    """Reset ignored signals: `nohup` or a background shell may have started the tests."""
    before: dict[int, Any] = {
        number: signal.signal(number, signal.SIG_DFL) for number in SIGNALS if number != signal.SIGINT
    }
    before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def train_with_signal(run_config: Config, number: signal.Signals, step: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """Train, with a signal to this process after `step` steps; return the run's exit code."""
    due = cadence.due

    def with_signal(done: int, every: float, last_step: int) -> bool:
        if done == step and every == run_config.train.log_every:
            os.kill(os.getpid(), number)
            time.sleep(0.05)  # for the thread that takes it
        return due(done, every, last_step)

    with monkeypatch.context() as patch, pytest.raises(StoppedError, match="asked to stop; step") as stopped:
        patch.setattr(loop, "due", with_signal)
        patch.setattr("vae_dist.distributed.stopping.CHECK_SECONDS", 0)  # after every step
        train(run_config)
    return stopped.value.exit_code


@pytest.mark.parametrize(
    ("number", "exit_code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 143), (signal.SIGHUP, 143)]
)
def test_a_stopped_run_saves_its_step_and_resumes_bitwise(
    number: signal.Signals, exit_code: int, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ["train.log_every=7", "data.binarize=dynamic"]
    whole = train(make_config("name=whole", *settings))
    run_config = make_config("name=stopped", *settings)
    assert train_with_signal(run_config, number, 33, monkeypatch) == exit_code
    stopped = find(Path("runs/stopped"), Path("runs")).folder
    assert stopped.name == "step_00000033"
    assert "step 33 of 40 is saved" in Path("runs/stopped/log.txt").read_text()
    run_dir = train(run_config)
    assert final(run_dir) == final(whole)
    assert timeless(run_dir) == timeless(whole)


def interrupted(score: Callable[..., ElboTerms], call: int) -> Callable[..., ElboTerms]:
    """Wrap `score`: send a signal to this process before its `call`th call."""
    calls = count(1)

    def with_signal(*arguments: Any) -> ElboTerms:
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.05)
        return score(*arguments)

    return with_signal


def test_a_validation_cut_by_a_stop_is_repeated_on_resume(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ["evaluate.batch_size=10", "checkpoint.every=1000"]
    whole = train(make_config("name=whole", *settings))
    for step, name in ((20, "halfway"), (40, "at_the_end")):
        with monkeypatch.context() as patch, pytest.raises(StoppedError):
            patch.setattr(milestones, "score", interrupted(metrics.score, step // 20))
            train(make_config(f"name={name}", *settings))
        folder = find(Path("runs") / name, Path("runs")).folder
        assert Checkpoint(folder).state.step == step and Checkpoint(folder).state.validation_pending
        assert not [row for row in timeless(Path("runs") / name) if row["step"] == step and "validation/kl" in row]
        with open(
            f"runs/{name}/metrics.jsonl", "a"
        ) as file:  # as if the next start had been killed after the validation
            file.write(json.dumps({"step": step, "validation/kl": 1.0}) + "\n")
        run_dir = train(make_config(f"name={name}", *settings))
        assert final(run_dir) == final(whole)
        assert timeless(run_dir) == timeless(whole)


def test_handlers_are_what_they_were_afterwards() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    with StopRequests():
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] == before


def test_a_caller_s_event_loop_hears_of_signals_afterwards() -> None:
    reader, writer = os.pipe()  # as asyncio and a notebook's kernel have one
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer)
    try:
        with StopRequests():
            pass
    finally:
        restored = signal.set_wakeup_fd(before)
        os.close(reader)
        os.close(writer)
    assert restored == writer


def test_outside_the_main_thread_a_training_runs_without_them(make_config: MakeConfig) -> None:
    done = []
    thread = threading.Thread(target=lambda: done.append(train(make_config("name=a", "train.steps=3"))))
    thread.start()
    thread.join()
    assert done and newest_checkpoint(done[0]) is not None


def test_a_signal_that_is_ignored_from_the_start_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with StopRequests() as requests:
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.05)
            assert requests.poll() == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_first_of_several_signals_counts() -> None:
    with StopRequests() as requests:
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGINT)  # at once, as by a launcher that forwards the request
    assert requests.poll() == signal.SIGUSR1  # leaving waits for the thread that takes them


class Alone:
    is_main, size = True, 1


def test_the_steps_between_two_checks_double_at_most_and_last_half_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of fast steps 512 take half a second; slow ones are checked one by one."""
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    watch, steps, step = Watch(StopRequests(), Alone(), 0), [], 0  # type: ignore[arg-type]
    for seconds in [2.0**-10] * 11 + [2.0] * 2:
        now, step = now + seconds * (watch.next_step - step), watch.next_step
        watch.check_stop_after(step)
        steps.append(watch.next_step - step)
    assert steps == [2, 4, 8, 16, 32, 64, 128, 256, 512, 512, 512, 1, 1]


BLOCKED = """
import ctypes, sys
from vae_dist.distributed.stopping import SIGNALS, StopRequests
with StopRequests():
    print("ready", flush=True)
    ctypes.CDLL(None).sleep(60)  # as in a collective with a process that does not answer
    ctypes.CDLL(None).sleep(60)  # the signal cuts the first one short
    ctypes.CDLL(None).sleep(60)
"""


def test_a_second_signal_ends_even_a_stuck_process_at_once() -> None:
    process = subprocess.Popen([sys.executable, "-c", BLOCKED], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGUSR1)  # the same request: two of one signal may arrive as one
    time.sleep(0.7)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=5) == 143
    process.stdout.close()


def wait_for(folder: Path, pattern: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not list(folder.glob(pattern)):
        assert time.monotonic() < deadline, f"no {pattern} in {folder}"
        time.sleep(0.05)


@pytest.mark.slow
def test_a_worker_whose_launcher_is_killed_saves_and_ends(smoke_arguments: list[str], tmp_path: Path) -> None:
    launcher = subprocess.Popen(
        [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", TRAIN, *smoke_arguments, "name=orphan",
         "train.steps=1000000", "checkpoint.every=100", "train.validate_every=1000000"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    wait_for(tmp_path, "runs/orphan/checkpoints/step_*")
    (worker,) = psutil.Process(launcher.pid).children()
    launcher.kill()
    launcher.wait()
    _, alive = psutil.wait_procs([worker], timeout=20)
    assert not alive
    assert "SIGTERM: asked to stop; step" in (tmp_path / "runs/orphan/log.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_to_torchrun_stops_all_processes_at_one_step(
    number: signal.Signals, smoke_arguments: list[str], tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3",
               "--signals-to-handle=SIGTERM,SIGINT,SIGUSR1", TRAIN, *smoke_arguments, "name=a", "train.steps=1000000",
               "checkpoint.every=50", "train.log_every=50"]  # fmt: skip
    launcher = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait_for(tmp_path, "runs/a/checkpoints/step_*")
    workers = psutil.Process(launcher.pid).children()
    requested_at = time.monotonic()
    launcher.send_signal(number)
    _, output = launcher.communicate(timeout=30)
    assert time.monotonic() - requested_at < 15 and launcher.returncode == 1
    assert not [worker for worker in workers if worker.is_running()]
    (step,) = {
        line.split("; step ")[1].split(" of ")[0] for line in output.splitlines() if "asked to stop; step" in line
    }
    assert find(Path("runs/a"), Path("runs")).folder.name == f"step_{int(step):08d}"


def test_the_tracker_is_closed_when_a_run_is_stopped(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    run_config = make_config("name=a", "tracking.wandb=offline")
    assert train_with_signal(run_config, signal.SIGTERM, 7, monkeypatch) == 143
    record = next(Path("runs/a/wandb").glob("offline-run-*"))
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--summary", "--json", str(record)]
    inspected = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert inspected["exit_code"] != 0


def test_a_second_ctrl_c_interrupts_a_callers_program_and_does_not_end_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "SAME_REQUEST_SECONDS", 0.05)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), StopRequests(ends_process=False) as requests:
        os.kill(os.getpid(), signal.SIGINT)
        while not requests.poll():
            time.sleep(0.01)
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)
    assert signal.getsignal(signal.SIGINT) == before


def test_a_first_ctrl_c_in_a_long_operation_is_no_second_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python calls its handler after the operation, when a second request would count."""
    monkeypatch.setattr(stopping, "SAME_REQUEST_SECONDS", 0.05)
    with StopRequests(ends_process=False) as requests:
        timer = threading.Timer(0.05, os.kill, [os.getpid(), signal.SIGINT])
        timer.start()
        while not requests.poll():
            hashlib.pbkdf2_hmac("sha256", b"", b"", 2_000_000)
        timer.join()
    assert requests.poll() == signal.SIGINT


@pytest.mark.parametrize("is_command", [True, False])
def test_a_library_call_does_not_end_the_process(
    is_command: bool,
    make_config: MakeConfig,
    smoke_arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = []

    def recorded(*, ends_process: bool) -> StopRequests:
        made.append(ends_process)
        return StopRequests(ends_process=ends_process)

    monkeypatch.setattr(loop, "StopRequests", recorded)
    if is_command:
        train(make_config("name=a", "train.steps=1"))
    else:
        vae_dist.fit(*smoke_arguments, f"runs_dir={tmp_path}", "name=a", "train.steps=1")
    assert made == [is_command]


def test_a_handler_that_is_not_of_python_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    known = signal.getsignal
    monkeypatch.setattr(signal, "getsignal", lambda number: None if number == signal.SIGUSR1 else known(number))
    before = known(signal.SIGUSR1)
    with StopRequests():
        assert known(signal.SIGUSR1) == before and known(signal.SIGTERM) not in (before, signal.SIG_DFL)
