"""Failure reports: a failed process tells the others of its run why.

It writes the reason to the store that the processes joined by, which works when a collective does not.
A process whose collective fails reads the reason there, or finds out which processes no longer answer.
"""

import json
import logging
import os
import platform
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from threading import Event, Thread
from typing import Any

import torch
from torch.distributed import PrefixStore, TCPStore, distributed_c10d  # type: ignore[attr-defined]

from vae_dist.errors import RunError, UserError

logger = logging.getLogger(__name__)

REPORT_SECONDS = 2  # to wait for a message that another process is about to write
ANSWER_SECONDS = 5  # after a failed collective, to wait for the other processes to answer
WATCH_SECONDS = 1  # between two looks at the failures of other processes, on GPUs; less than REPORT_SECONDS
NOTICE_SECONDS = 10  # that a process has to notice another one's failure by itself

_RESUME = "give the command again; a training resumes from its newest checkpoint"
_IF_SLOW = "if it is only slow, raise runtime.start_timeout, of a training that has started runtime.timeout; "
_ANY_FAILURE = "vae_dist/ended"  # a key, so that a look every second takes one request, not one per process


@contextmanager
def reported(rank: int, size: int) -> Iterator[None]:
    """Write an error that leaves the context to the store, unless all processes are known to raise it."""
    if size > 1:
        with suppress(RuntimeError):  # some kinds of store can't delete
            store().delete_key(_failure_key(rank))  # of an earlier run in the same processes
    try:
        yield
    except Exception as error:
        known = getattr(error, "reporting_rank", None) is not None
        alike = size > 1 and not known and torch.distributed.is_initialized() and _report(store(), rank, size, error)
        if alike and isinstance(error, UserError | RunError):
            error.on_every_process()
        raise


@contextmanager
def ended_with_another(rank: int, size: int) -> Iterator[None]:
    """Inside the context, end this process with the reason if another one has failed and this one does not notice.

    A collective of NCCL raises nothing: the host waits for a GPU, which waits for the process that has failed.
    """
    left = Event()

    def watch() -> None:
        while not left.wait(WATCH_SECONDS):
            found = _failure_of_another(rank, size) if _is_any_reported() else None
            if found is None or left.wait(NOTICE_SECONDS):
                continue
            failure = _failure_of_another(rank, size)
            if failure is None and _is_any_reported():  # it was of an earlier run in the same processes
                continue
            failure = failure or found  # its launcher, and the store with it, may be gone by now
            if rank == failure.reporting_rank:
                logger.error("the run has ended: %s", failure)
            os._exit(2 if isinstance(failure, UserError) else 1)

    thread = Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        left.set()
        thread.join(ANSWER_SECONDS)  # it may wait for a store whose machine is lost


@contextmanager
def full_memory_explained() -> Iterator[None]:
    """If the memory of the device is full inside the context, raise RunError, which says what takes less."""
    try:
        yield
    except RuntimeError as error:
        text = str(error).strip().partition("\n")[0]
        if not (isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in text):
            raise
        problem = ". ".join(re.sub(".*(?=DefaultCPUAllocator)", "", text).split(". ")[:3]).rstrip(".")
        raise RunError(
            f"{problem}. Steps of a training take less with a larger train.accumulate, or with "
            "train.checkpointing=true; its validations, evaluations and encodings with a smaller evaluate.batch_size "
            "and evaluate.chunk"
        ) from error


@contextmanager
def explained(rank: int, size: int) -> Iterator[None]:
    """Around a collective: if it fails, raise the error that another process wrote, or name the missing processes."""
    try:
        yield
    except RuntimeError as error:
        if (failure := _failure_of_another(rank, size)) is not None:
            raise failure from error
        reason = _reason(str(error))
        if "Duplicate GPU" in reason or "using the same GPU" in reason:  # Accelerate has given them out in turn
            raise UserError(
                f"several processes would compute on one GPU ({reason.rstrip('.')}): start at most one process for "
                "each GPU, by --num_processes of accelerate launch or --nproc-per-node of torchrun"
            ) from error
        missing = missing_processes(rank, size)
        if not missing:
            raise RunError(f"communication between the processes failed ({reason}); {_RESUME}") from error
        ranks = ", ".join(map(str, missing))
        slow = _IF_SLOW if "timed out" in reason.lower() else ""
        dead = RunError(f"process {ranks} of {size} died or hangs ({reason}); {slow}{_RESUME}")
        raise dead.on_every_process(_first_alive(size, missing)) from error


def _reason(text: str) -> str:
    """Return the reason in an error's text, without places in a library's source and its advice."""
    lines = text.strip().splitlines() or [""]
    if "Last error:" in lines[:-1]:  # NCCL's own reason is in the line after
        return lines[lines.index("Last error:") + 1].strip()
    return re.sub(r"^\[\S+:\d+\] |^NCCL error in: \S+, ", "", lines[0]).partition(". ")[0]


def missing_processes(rank: int, size: int) -> list[int]:
    """Return the processes that do not answer within ANSWER_SECONDS. Those whose own collective failed do answer."""
    try:
        shared = store()
        shared.set_timeout(timedelta(seconds=ANSWER_SECONDS))
        shared.set(f"vae_dist/waits/{rank}", "yes")
        missing = [other for other in range(size) if other != rank]
        deadline = time.monotonic() + ANSWER_SECONDS
        while missing and time.monotonic() < deadline:
            time.sleep(0.1)
            missing = [other for other in missing if not shared.check([f"vae_dist/waits/{other}"])]
        return missing
    except RuntimeError:
        return [0]  # without a launcher's store the main process serves it


def all_fail_alike(error: Exception) -> bool:
    """Return whether all processes of a torchrun fail with this error before they have joined."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return False  # process 0 would serve the store, and does not do so yet
    names = ("TORCHELASTIC_RESTART_COUNT", "MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE")
    restart, address, port, rank, size = (os.environ.get(name, "") for name in names)
    try:
        timeout = timedelta(seconds=ANSWER_SECONDS)
        agents = TCPStore(address, int(port), is_master=False, timeout=timeout, wait_for_workers=False)
        return _report(PrefixStore(restart, agents), int(rank), int(size), error, ANSWER_SECONDS)
    except (RuntimeError, ValueError):
        return False


def store() -> Any:
    """The key-value store that the processes joined by."""
    return distributed_c10d._get_default_store()


def wait_for_keys(shared: Any, keys: list[str], seconds: float) -> bool:
    """Return whether other processes set all of these keys in time. The store's own wait logs a warning if not."""
    deadline = time.monotonic() + seconds
    while not (is_set := bool(shared.check(keys))) and time.monotonic() < deadline:
        time.sleep(0.05)
    return is_set


def _report(shared: Any, rank: int, size: int, error: Exception, seconds: float = REPORT_SECONDS) -> bool:
    """Write the reason of this process's failure; return whether all processes report the same reason in time."""
    kind = "input" if isinstance(error, UserError) else "run"
    reason = str(error) if isinstance(error, UserError | RunError) else f"{type(error).__name__}: {error}"
    keys = [_failure_key(other) for other in range(size)]
    try:
        shared.set(keys[rank], json.dumps([kind, platform.node(), reason]))
        shared.set(_ANY_FAILURE, "yes")
        return wait_for_keys(shared, keys, seconds) and len({json.loads(shared.get(key))[2] for key in keys}) == 1
    except (RuntimeError, ValueError):  # the store is gone
        return False


def _failure_of_another(rank: int, size: int) -> UserError | RunError | None:
    """The failures that other processes reported, as one error; None if there are none."""
    reports = {}
    try:
        shared = store()
        for other in range(size):
            if other != rank and shared.check([_failure_key(other)]):
                reports[other] = json.loads(shared.get(_failure_key(other)))
    except (RuntimeError, ValueError):  # the process that served the store is gone
        pass
    if not reports:
        return None
    reasons = [f"process {other} of {size} on {host}: {reason}" for other, (_, host, reason) in reports.items()]
    kind = UserError if all(kind == "input" for kind, _, _ in reports.values()) else RunError
    error: UserError | RunError = kind("; ".join(reasons))
    return error.on_every_process(_first_alive(size, list(reports)))


def _is_any_reported() -> bool:
    try:
        return bool(store().check([_ANY_FAILURE]))
    except (RuntimeError, ValueError):  # the store is gone
        return False


def _first_alive(size: int, dead: Sequence[int]) -> int:
    return next(rank for rank in range(size) if rank not in dead)


def _failure_key(rank: int) -> str:
    return f"vae_dist/ended/{rank}"
