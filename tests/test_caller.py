"""A library call leaves its caller's process as it was: Accelerate, logging, torch's settings, the environment."""

import logging
import os
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch.distributed import HashStore  # type: ignore[attr-defined]

from tests.conftest import MakeConfig
from tests.forked import unused_port
from vae_dist import config
from vae_dist.distributed import caller, environment, failures, precision, processes
from vae_dist.errors import RunError, StoppedError, UserError
from vae_dist.evaluation.evaluate import evaluate
from vae_dist.reports.comparison import compare
from vae_dist.reports.report import report
from vae_dist.reports.study import study
from vae_dist.training.loop import train
from vae_dist.views.sampling import sample

LOGGER = logging.getLogger("vae_dist")
Calls = dict[str, Callable[[], object]]


@pytest.fixture
def handler() -> Iterator[logging.Handler]:
    """A caller's own settings, all different from the run's and from torch's defaults."""
    own = logging.StreamHandler()
    before = LOGGER.handlers, LOGGER.level, LOGGER.propagate, torch.get_num_threads()
    LOGGER.handlers, LOGGER.propagate = [own], True
    LOGGER.setLevel(logging.WARNING)
    torch.set_num_threads(2)
    yield own
    LOGGER.handlers, LOGGER.propagate = before[0], before[2]
    LOGGER.setLevel(before[1])
    torch.set_num_threads(before[3])


def refused(call: Callable[..., object], *arguments: object) -> None:
    with pytest.raises(UserError):
        call(*arguments)


def readable(read: Callable[[], object]) -> object:
    try:
        return read()
    except RuntimeError:  # torch does not read settings that were made in both of its ways
        return "unreadable"


def world() -> dict[str, object]:
    """Everything that a call could change in its caller's process."""
    backends: Any = torch.backends
    return {
        "environment": dict(os.environ),
        "logger": (list(LOGGER.handlers), LOGGER.level, LOGGER.propagate),
        "other loggers": (logging.root.level, list(logging.root.handlers), logging.getLogger("torch").level),
        "threads": torch.get_num_threads(),
        "deterministic": (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
            torch.backends.cudnn.benchmark,
            torch.backends.cudnn.deterministic,
        ),
        "precision": (
            readable(lambda: torch.backends.cuda.matmul.allow_tf32),
            readable(lambda: torch.backends.cudnn.allow_tf32),
            readable(torch.get_float32_matmul_precision),
            [
                operations.fp32_precision
                for operations in (
                    backends,
                    backends.cuda.matmul,
                    backends.cudnn,
                    backends.cudnn.conv,
                    backends.cudnn.rnn,
                    backends.mkldnn.matmul,
                )
            ],
        ),
        "defaults": (torch.get_default_dtype(), torch.is_grad_enabled(), np.geterr()),
        "random": (torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()),
        "accelerate": [dict(state._shared_state) for state in (AcceleratorState, PartialState, GradientState)],
        "streams": (sys.stdout, sys.stderr, sys.excepthook, list(sys.path)),
        "signals": [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)],
        "folder": Path.cwd(),
        "processes": torch.distributed.is_initialized(),
    }


@pytest.fixture
def calls(make_config: MakeConfig, smoke_arguments: list[str], tmp_path: Path) -> Calls:
    """Every command as a library call, ordered so that each finds its input."""
    run = tmp_path / "runs/a"
    short = ["train.steps=2", "train.threads=1"]
    settings = [*smoke_arguments, *short, f"runs_dir={tmp_path / 'runs'}", "evaluate.importance_samples=0"]
    reading = ["device=cpu", "evaluate.importance_samples=0"]
    return {
        "train": lambda: train(make_config("name=a", *short)),
        "evaluate": lambda: evaluate(run, reading),
        "sample": lambda: sample(run, ["device=cpu", "sample.count=4"]),
        "report": lambda: report(run, reading),
        "compare": lambda: compare([run], [*reading, f"output={tmp_path / 'compared'}"]),
        "study": lambda: study(config.load_study([*settings, "name=s", "train.precision=fp32,bf16"])),
        "a training that can't start": lambda: refused(
            train, make_config("name=b", "train.batch_size=1", "train.accumulate=2")
        ),
        "an evaluation of nothing": lambda: refused(evaluate, tmp_path / "nothing"),
        "a device that is not there": lambda: refused(train, make_config("device=mps")),
    }


def test_a_library_call_leaves_its_caller_s_process_as_it_was(calls: Calls, handler: logging.Handler) -> None:
    for name, call in calls.items():
        before = world()
        call()
        after = world()
        for what in before:
            assert after[what] == before[what], (name, what)


@pytest.mark.parametrize(
    "make",
    [
        lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
        lambda: torch.set_float32_matmul_precision("high"),
        lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    ],
    ids=["old", "high", "new"],
)
def test_settings_that_only_a_gpu_needs_are_restored(
    make: Callable[[], None], make_config: MakeConfig, handler: logging.Handler
) -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    before_all = world()["precision"]
    with caller.restored_afterwards():
        make()
        before = world()
        with processes.join(make_config()):
            environment.make_cuda_deterministic()
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
            os.environ["OMP_NUM_THREADS"] = "7"
        assert world() == before
    assert world()["precision"] == before_all
    torch.use_deterministic_algorithms(False)


def test_a_caller_s_accelerator_works_during_a_run_and_after_it(
    calls: Calls, make_config: MakeConfig, handler: logging.Handler
) -> None:
    with caller.restored_afterwards():
        own = Accelerator(cpu=True, gradient_accumulation_steps=4)
        layer = own.prepare(torch.nn.Linear(2, 1))
        with processes.join(make_config()):
            precision.accelerator("fp32")
            assert own.gradient_accumulation_steps == 4 and own.device.type == "cpu"
        for name in ("train", "evaluate"):
            before = world()
            calls[name]()
            assert world() == before
            own.backward(layer(torch.ones(1, 2)).sum())
            assert own.is_main_process and own.mixed_precision == "no" and own.sync_gradients
            assert own.gather(torch.ones(1)).tolist() == [1.0]
        assert layer.weight.grad.tolist() == [[0.5, 0.5]]


def test_an_accelerator_of_another_precision_is_refused(
    calls: Calls, make_config: MakeConfig, tmp_path: Path, handler: logging.Handler
) -> None:
    with caller.restored_afterwards():
        own = Accelerator(cpu=True, mixed_precision="bf16")
        before = world()
        with pytest.raises(UserError, match=r"mixed_precision='bf16'.* this run is in fp32: use train.precision=bf16"):
            calls["train"]()
        assert world() == before and not (tmp_path / "runs").exists()
        train(make_config("name=a", "train.steps=2", "train.precision=bf16"))
        calls["evaluate"]()
        assert world() == before and own.mixed_precision == "bf16"


def test_a_caller_s_processes_keep_their_timeouts(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, handler: logging.Handler
) -> None:
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "GLOO_SOCKET_IFNAME": "lo"}.items():
        monkeypatch.setenv(name, value)
    address = f"tcp://127.0.0.1:{unused_port()}"
    torch.distributed.init_process_group("gloo", address, timedelta(seconds=77), world_size=1, rank=0)
    try:
        group: Any = torch.distributed.group.WORLD
        backend = group._get_backend(torch.device("cpu"))
        before = world()
        with processes.join(make_config()) as joined:
            joined.size = 2  # a lone process has no timeout to set
            joined.set_timeout(5)
            assert backend.options._timeout == timedelta(seconds=5)
            monkeypatch.setattr(failures, "ANSWER_SECONDS", 0.1)
            failures.missing_processes(joined.rank, joined.size)
        assert backend.options._timeout == timedelta(seconds=77)
        store: Any = torch.distributed.distributed_c10d._get_default_store()
        assert store.timeout == timedelta(seconds=77)
        assert world() == before
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("backend", "error", "left"),
    [
        ("gloo", RunError("a file can't be read"), True),
        ("nccl", RunError("a file can't be read"), False),
        ("nccl", StoppedError("SIGTERM", 143), True),
        ("nccl", None, True),
    ],
)
def test_a_failed_process_waits_for_no_other_one_to_leave(
    backend: str, error: Exception | None, left: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NCCL's communicators end together, and the others may wait for this one in a collective."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: backend)
    try:
        with suppress(RunError, StoppedError), caller.restored_afterwards():
            torch.distributed.init_process_group("gloo", store=HashStore(), world_size=1, rank=0)
            if error is not None:
                raise error
        assert torch.distributed.is_initialized() == (not left)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def test_one_thread_at_a_time_trains_or_evaluates(make_config: MakeConfig) -> None:
    """Threads, settings and random state are the process's: two trainings would change each other's results."""
    refused: list[str] = []

    def second() -> None:
        try:
            train(make_config("name=b", "train.steps=1"))
        except UserError as error:
            refused.append(str(error))

    with processes.join(make_config()):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert len(refused) == 1 and "another thread of this process trains or evaluates" in refused[0]
    assert train(make_config("name=b", "train.steps=1")).name == "b"
