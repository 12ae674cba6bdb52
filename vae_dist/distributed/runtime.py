"""The processes of a run: who they are, where they compute, and how they agree.

One process is the main process; what only one may decide (a name, a download) it decides, and the others are told.
"""

import ctypes
import hashlib
import json
import logging
import os
import platform
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState, is_initialized
from accelerate.utils import GradientAccumulationPlugin, broadcast_object_list
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore, distributed_c10d  # type: ignore[attr-defined]

import vae_dist
from vae_dist.config import Config, Precision
from vae_dist.distributed import caller, launcher
from vae_dist.errors import RunError, UserError

logger = logging.getLogger(__name__)

T = TypeVar("T")

SAY_SECONDS = 2  # for another process to say what this one is about to say
ANSWER_SECONDS = 5  # after a failed exchange, for the others to say that they are there

_WORDS_AT_ONCE = 2**20  # of a checksum: they take some memory
_NEXT_PART = 0x9E3779B97F4A7C15 - 2**64  # odd, and as a signed number

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h

_LAUNCHER_PRECISIONS: dict[str, Precision] = {"no": "fp32", "fp16": "fp16", "bf16": "bf16"}
_ACCELERATE_PRECISIONS = {"fp32": "no", "tf32": "no", "fp64": "no", "fp16": "fp16", "bf16": "bf16"}


class World:
    """This process among those of its run, as the launcher started them."""

    def __init__(self, state: PartialState) -> None:
        self.rank: int = state.process_index
        self.size: int = state.num_processes
        # As a tensor on it says it, with its index: Accelerate's "cuda" is not equal to the "cuda:0" that it means.
        self.device = torch.empty(0, device=state.device).device
        self.is_main: bool = state.is_main_process
        self.alike = True  # whether all processes run on processors of one kind, see `compare_processors`

    def on_main(self, choose: Callable[[], T]) -> T:
        """What `choose` returns on the main process, on every process; what it raises there, all of them raise."""
        if self.size == 1:
            return choose()
        outcome: list[T | Exception | None] = [None]
        if self.is_main:
            try:
                outcome[0] = choose()
            except (UserError, RunError) as error:
                outcome[0] = error
            except Exception as error:
                with self._answers():
                    broadcast_object_list([RunError(f"process 0 has failed: {type(error).__name__}: {error}")])
                raise
        with self._answers():
            result = broadcast_object_list(outcome)[0]
        if isinstance(result, UserError | RunError):
            raise result.on_every_process()
        return result

    def assert_equal_everywhere(self, find: Callable[[], Mapping[str, object]]) -> None:
        """Raise UserError on every process where the facts that each finds are not the same. All must call this."""
        if self.size == 1:
            return
        known = self.gather_objects(find())
        for name in dict.fromkeys(name for theirs in known for name in theirs):
            values = [theirs.get(name) for theirs in known]
            others = [rank for rank, value in enumerate(values) if value != values[0]]
            if others:
                raise UserError(
                    f"the processes do not agree on {name}: {values[0]} on process 0, {values[others[0]]} on process "
                    f"{others[0]}; start all of them alike, with the same code and data"
                ).on_every_process()

    def compare_processors(self) -> None:
        """Set `alike`. Where it is False one warning names the processors: the same operations round differently there.

        All processes call this.
        """
        kinds = self.gather_objects(processor(self.device))
        self.alike = len(set(kinds)) == 1
        if self.is_main and not self.alike:
            logger.warning(
                "the processes run on unlike processors (%s), which round differently: the weights and moments of "
                "process 0 are copied to the others at every row of metrics and every save",
                "; ".join(
                    f"{kind} on process {', '.join(str(rank) for rank, other in enumerate(kinds) if other == kind)}"
                    for kind in dict.fromkeys(kinds)
                ),
            )

    def copy_from_main(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite the tensors, in place, by the main process's. They are contiguous."""
        with self._answers():
            copies = [torch.distributed.broadcast(tensor.detach(), 0, async_op=True) for tensor in tensors]
            for copy in copies:
                assert copy is not None  # all processes take part
                copy.wait()

    def says_first(self, text: str) -> bool:
        """Whether a message is news: the main process always says it, another one if no other process has."""
        if self.size == 1:
            return True
        key = f"vae_dist/said/{hashlib.sha256(text.encode(errors='replace')).hexdigest()}"
        try:
            store = distributed_c10d._get_default_store()
            if self.is_main:
                store.set(key, "yes")
                return True
            return not _come(store, [key], SAY_SECONDS) and store.add(f"{key}/others", 1) == 1
        except (RuntimeError, ValueError):  # the store is gone; the processes have parted
            return True

    @contextmanager
    def reasons_told(self) -> Iterator[None]:
        """Leave to the other processes why this one ends, where they don't know; their next exchange with it fails."""
        if self.size > 1:
            with suppress(RuntimeError):  # not every kind of store can
                distributed_c10d._get_default_store().delete_key(_end_key(self.rank))  # an earlier run's
        try:
            yield
        except Exception as error:
            known = getattr(error, "reporting_rank", None) is not None
            if self.size > 1 and not known and torch.distributed.is_initialized():
                store = distributed_c10d._get_default_store()
                if _ends_alike(store, self.rank, self.size, error) and isinstance(error, UserError | RunError):
                    error.on_every_process()
            raise

    def expect_answers_within(self, seconds: float) -> None:
        """Give up on the other processes after this long from now on; until the run has begun they get more time."""
        if self.size > 1:
            # Public since torch 2.14; before that it had another name.
            set_timeout = getattr(torch.distributed, "set_timeout", None) or distributed_c10d._set_pg_timeout
            set_timeout(timedelta(seconds=seconds), torch.distributed.group.WORLD)

    def main_first(self, load: Callable[[], T]) -> T:
        """What `load` returns, on every process; the main one goes first, and the others find what it downloaded."""
        loaded: list[T] = []
        self.on_main(lambda: loaded.append(load()))
        return loaded[0] if loaded else load()

    def sum(self, values: Tensor) -> Tensor:
        """The sum of the processes' tensors, on the CPU."""
        if self.size > 1:
            values = values.to(self.device, copy=True)
            self.all_reduce(values)
        return values.cpu()

    def gather_objects(self, value: T) -> list[T]:
        """All processes' values, in the order of their ranks. The values are pickled."""
        values = [value] * self.size
        if self.size > 1:
            with self._answers():
                torch.distributed.all_gather_object(values, value)
        return values

    def gather(self, values: Tensor) -> Tensor:
        """All processes' tensors, stacked in the order of their ranks, on the CPU."""
        values = values.to(self.device)
        parts = [torch.empty_like(values) for _ in range(self.size)] if self.size > 1 else [values]
        if self.size > 1:
            with self._answers():
                torch.distributed.all_gather(parts, values)
        return torch.stack(parts).cpu()

    def all_reduce_max(self, values: Tensor) -> Tensor:
        """The elementwise maximum of the processes' tensors, on the CPU."""
        if self.size > 1:
            values = values.to(self.device, copy=True)
            self.all_reduce(values, torch.distributed.ReduceOp.MAX)
        return values.cpu()

    def all_reduce(self, values: Tensor, operation: Any = torch.distributed.ReduceOp.SUM) -> None:
        """Replace `values` by the sum of the processes' tensors. Raises RunError where one of them does not answer."""
        with self._answers():
            torch.distributed.all_reduce(values, operation)

    def chunks(self, count: int, size: int) -> list[range]:
        """This process's blocks of `range(count)`: cut the same way for any number of processes, then dealt in turn."""
        cut = [range(start, min(start + size, count)) for start in range(0, count, size)]
        return cut[self.rank :: self.size]

    def gather_rows(self, blocks: Sequence[range], values: Sequence[Tensor], count: int) -> Tensor:
        """All processes' values in row order, `(count, ...)` on the CPU; `values[i]` holds the rows of `blocks[i]`.

        Rows are moved, not added up, so the result is bitwise the same on any number of processes.
        """
        mine = [(block, value.cpu()) for block, value in zip(blocks, values, strict=True)]
        by_start = sorted((pair for part in self.gather_objects(mine) for pair in part), key=lambda pair: pair[0].start)
        rows = torch.cat([value for _, value in by_start])
        assert len(rows) == count, f"{len(rows)} rows were gathered, {count} were dealt"
        return rows

    @contextmanager
    def _answers(self) -> Iterator[None]:
        """Around an exchange: where it fails, RunError names the processes that have not taken part."""
        try:
            yield
        except RuntimeError as error:
            if (told := self._told()) is not None:
                raise told from error
            missing = self._missing()
            # Without the place in gloo's source, and its advice.
            reason = re.sub(r"^\[\S+:\d+\] ", "", str(error).strip().partition("\n")[0]).partition(". ")[0]
            if not missing:
                raise RunError(f"an exchange between the processes failed: {reason}") from error
            gone = RunError(
                f"process {', '.join(map(str, missing))} of {self.size} died or hangs ({reason}); the run goes on "
                "from its newest checkpoint when it is started again"
            )
            raise gone.on_every_process(self._first_without(missing)) from error

    def _told(self) -> UserError | RunError | None:
        """What other processes have told of their ends, None where none has."""
        told = {}
        try:
            store = distributed_c10d._get_default_store()
            for rank in range(self.size):
                if rank != self.rank and store.check([_end_key(rank)]):
                    told[rank] = json.loads(store.get(_end_key(rank)))
        except (RuntimeError, ValueError):  # the store was another process's, and is gone with it
            pass
        if not told:
            return None
        ends = [f"process {rank} of {self.size} on {host}: {reason}" for rank, (_, host, reason) in told.items()]
        kind = UserError if all(kind == "input" for kind, _, _ in told.values()) else RunError
        error: UserError | RunError = kind("; ".join(ends))
        return error.on_every_process(self._first_without(list(told)))

    def _first_without(self, gone: Sequence[int]) -> int:
        """The first process that is still there."""
        return next(rank for rank in range(self.size) if rank not in gone)

    def _missing(self) -> list[int]:
        """The processes that do not say within some seconds that they too wait for another one."""
        try:
            store = distributed_c10d._get_default_store()
            store.set_timeout(timedelta(seconds=ANSWER_SECONDS))
            store.set(f"vae_dist/waits/{self.rank}", "yes")
            missing = [rank for rank in range(self.size) if rank != self.rank]
            give_up = time.monotonic() + ANSWER_SECONDS
            while missing and time.monotonic() < give_up:
                time.sleep(0.1)
                missing = [rank for rank in missing if not store.check([f"vae_dist/waits/{rank}"])]
            return missing
        except RuntimeError:
            return [0]  # without a launcher the main process keeps the store


def _end_key(rank: int) -> str:
    return f"vae_dist/ended/{rank}"


def _come(store: Any, keys: list[str], seconds: float) -> bool:
    """Whether other processes set all of these keys within some seconds. The store's own wait warns when they don't."""
    give_up = time.monotonic() + seconds
    while not (found := bool(store.check(keys))) and time.monotonic() < give_up:
        time.sleep(0.05)
    return found


def _ends_alike(store: Any, rank: int, size: int, error: Exception, seconds: float = SAY_SECONDS) -> bool:
    """Tell the other processes how this one ends, and whether all of them end so within some seconds."""
    kind = "input" if isinstance(error, UserError) else "run"
    reason = str(error) if isinstance(error, UserError | RunError) else f"{type(error).__name__}: {error}"
    keys = [_end_key(other) for other in range(size)]
    try:
        store.set(keys[rank], json.dumps([kind, platform.node(), reason]))
        return _come(store, keys, seconds) and len({json.loads(store.get(key))[2] for key in keys}) == 1
    except (RuntimeError, ValueError):  # the store is gone
        return False


def all_end_so(error: Exception) -> bool:
    """Whether all processes that torchrun has started end with this error, before they have joined."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return False  # process 0 would keep the store, and is not there yet
    names = ("TORCHELASTIC_RESTART_COUNT", "MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE")
    restart, address, port, rank, size = (os.environ.get(name, "") for name in names)
    try:
        wait = timedelta(seconds=ANSWER_SECONDS)
        store = TCPStore(address, int(port), is_master=False, timeout=wait, wait_for_workers=False)
        return _ends_alike(PrefixStore(restart, store), int(rank), int(size), error, ANSWER_SECONDS)
    except (RuntimeError, ValueError):
        return False


@contextmanager
def join(config: Config) -> Iterator[World]:
    """Join the processes of this run for as long as the context lasts, and leave the caller's process as it was.

    Denormal numbers stay flushed to zero, and glibc keeps freed memory: neither can be taken back. Raises UserError
    where the device can't be had, where the environment does not say how to find the other processes, or where they
    can't be found within `runtime.start_timeout`.
    """
    # Before the first tensor operation: threads that have started keep their mode. Adam's moments of pixels that are
    # always black decay into denormal numbers, which a CPU computes with many times slower.
    torch.set_flush_denormal(True)
    _keep_freed_memory()
    with caller.restored_afterwards():
        device = _device(config.device)
        launcher.require_supported()
        if not torch.distributed.is_initialized():
            os.environ.update(launcher.launched())
        if device == "cuda":
            _make_cuda_repeat_itself()
        # A launcher sets one thread per process on a CPU where the user said nothing, so the environment tells nothing.
        set_threads(config)
        state = launcher.joined(device, config.runtime.start_timeout)
        expected = launcher.expected_size()
        if state.num_processes != expected or state.device.type != device:
            raise UserError(
                f"{expected} processes on {device} were asked for, but Accelerate made {state.num_processes} on "
                f"{state.device.type}; check the launch file, give device= yourself, or make your own Accelerator for "
                "the same device"
            )
        world = World(state)
        with world.reasons_told():
            yield world


def _make_cuda_repeat_itself() -> None:
    """Let the same operations on the same GPU give bitwise the same results. To be called before CUDA's first use."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # It would write to every new tensor, to make bugs repeat themselves too.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False


def _keep_freed_memory() -> None:
    """Let glibc hand a step's gradients to the next step, not back to the kernel.

    Otherwise every step of a small model takes some hundred pages anew, each filled with zeros first.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return  # another C library
    mallopt(_M_MMAP_THRESHOLD, 2**25)  # the most that glibc takes
    mallopt(_M_TRIM_THRESHOLD, 2**30)


def accelerator(precision: Precision) -> Accelerator:
    """Accelerate's view of the joined processes, computing in a precision that `resolve_precision` returned."""
    device = PartialState().device
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
        torch.backends.cudnn.allow_tf32 = precision == "tf32"
    before = dict(GradientState._shared_state)
    result = Accelerator(
        cpu=device.type == "cpu",
        mixed_precision=_ACCELERATE_PRECISIONS[precision],
        # The launcher can set this too, and backward() would divide by it; train.accumulate is the one option.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
    )
    if before:  # a caller's Accelerator goes on counting by it
        caller.refill(GradientState._shared_state, before)
    return result


def resolve_precision(precision: Precision, device: torch.device) -> Precision:
    """`auto` becomes what the launcher says.

    Raises UserError where the device has no such precision, or where the caller's own Accelerator has another one.
    """
    if precision == "auto":
        launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        if launched not in _LAUNCHER_PRECISIONS:
            raise UserError(f"the launcher's mixed_precision={launched} is not supported; use no, bf16 or fp16")
        precision = _LAUNCHER_PRECISIONS[launched]
    if precision in ("fp16", "tf32") and device.type != "cuda":
        raise UserError(
            f"{precision} needs a CUDA GPU and this run is on {device.type}; use train.precision=bf16 or fp32"
        )
    if precision == "fp64" and device.type == "mps":
        raise UserError("mps has no fp64; use device=cpu")
    ours, theirs = _ACCELERATE_PRECISIONS[precision], AcceleratorState().mixed_precision if is_initialized() else None
    if theirs not in (None, ours):
        fitting = _LAUNCHER_PRECISIONS.get(theirs)
        remedy = f"use train.precision={fitting}, or make it" if fitting else "make it"
        raise UserError(
            f"this process has an Accelerator of mixed_precision={theirs!r}, and Accelerate takes one precision for a "
            f"whole process, but this run is in {precision}: {remedy} with mixed_precision={ours!r}"
        )
    return precision


def autocast(precision: Precision, device: torch.device) -> Callable[[], AbstractContextManager[object]]:
    """A context for a network to compute in a lower precision, where the precision is one."""
    low = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    return nullcontext if low is None else partial(torch.autocast, device.type, dtype=low)


def param_dtype(precision: Precision) -> torch.dtype:
    """What weights, images and noise are kept in; the lower precisions are autocast's."""
    return torch.float64 if precision == "fp64" else torch.float32


def sum_dtype(device: torch.device) -> torch.dtype:
    """What sums over many images are kept in."""
    return torch.float32 if device.type == "mps" else torch.float64


def place(pixels: Tensor, device: torch.device) -> tuple[Tensor, bool]:
    """Images on the device, and True; on the host, and False, when they take more than half of its free memory."""
    if device.type == "cuda" and pixels.nbytes > torch.cuda.mem_get_info(device)[0] // 2:
        return pixels, False
    return pixels.to(device), True


def average_gradients(gradients: Sequence[Tensor], loss: Tensor, world: World) -> tuple[Sequence[Tensor], Tensor]:
    """The means over the processes of their gradients, and of their losses `()`.

    One all-reduce of all gradients in a fixed layout. DistributedDataParallel lays its buckets out anew after its first
    backward, so that on three processes and more a restarted run would add in another order than one never stopped.
    """
    if world.size == 1:
        return gradients, loss
    flat = torch.cat([*(gradient.flatten() for gradient in gradients), loss.view(1)])
    world.all_reduce(flat)
    flat /= world.size
    *parts, mean_loss = flat.split([*(gradient.numel() for gradient in gradients), 1])
    return [part.view_as(gradient) for part, gradient in zip(parts, gradients, strict=True)], mean_loss.view(())


def seconds_since_start() -> float:
    """How long ago this process was started."""
    return time.time() - psutil.Process().create_time()


def processor(device: torch.device) -> str:
    """What decides how a process rounds: the instructions that torch uses on its CPU, and the name of its GPU."""
    cpu = torch.backends.cpu.get_cpu_capability()
    return f"{torch.cuda.get_device_name(device)} with {cpu}" if device.type == "cuda" else cpu


def versions() -> dict[str, str]:
    """What all processes have to run."""
    return {"torch's version": torch.__version__, "the code": code_fingerprint()}


def code_fingerprint() -> str:
    """A hash of this package's source."""
    digest = hashlib.sha256()
    for path in sorted(Path(vae_dist.__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """A hash of the tensors' bits."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def checksum(tensors: Iterable[Tensor]) -> Tensor:
    """A sum of the tensors' bits, each number with a weight for its position: int64 `()`, on their device.

    Weights are odd, so that one bit that differs always changes the sum. No copy is made for the host.
    """
    total: Tensor | None = None
    for tensor in tensors:
        flat = tensor.detach().flatten()
        if flat.storage_offset() % 2:
            flat = flat.clone()  # words of 8 bytes do not begin there
        words = flat.view(torch.int32 if flat.nbytes % 8 else torch.int64)
        for part in words.split(_WORDS_AT_ONCE):
            found = (part * torch.arange(1, 2 * len(part) + 1, 2, device=part.device)).sum()
            total = found if total is None else total * _NEXT_PART + found
    assert total is not None
    return total


def set_threads(config: Config) -> None:
    """Compute with the config's number of CPU threads, or with this process's even share of the machine's cores."""
    threads = config.train.threads or _fair_threads()
    torch.set_num_threads(threads)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # where it is missing Accelerate sets what it thinks best


def _fair_threads() -> int:
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = min(allowed, psutil.cpu_count(logical=False) or allowed)
    return max(cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), 1)


def _device(device: str) -> str:
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        return next(name for name, is_there in available.items() if is_there)
    if device not in available:
        raise UserError(f"unknown device {device!r}; choose from auto, {', '.join(sorted(available))}")
    if not available[device]:
        raise UserError(f"device={device} can't be used on this machine; use device=cpu or leave it out")
    return device
