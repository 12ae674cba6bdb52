"""The processes of a run: rank, size and device, collectives, and agreement.

One process is the main process. It decides for all what only one may decide, such as a name or a download.
"""

import hashlib
import logging
import math
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import NamedTuple, Protocol, TypeVar

import torch
from accelerate.utils import broadcast_object_list, gather, gather_object, reduce
from torch import Tensor
from torch.distributed import distributed_c10d

from vae_dist.distributed import environment, failures
from vae_dist.errors import RunError, UserError
from vae_dist.plan import every_chunk

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Processes(Protocol):
    """Accelerate's state of the joined processes, or one like it."""

    @property
    def process_index(self) -> int: ...
    @property
    def num_processes(self) -> int: ...
    @property
    def is_main_process(self) -> bool: ...
    @property
    def device(self) -> torch.device: ...


class World:
    """This process among those of its run, as the launcher started them."""

    def __init__(self, state: Processes) -> None:
        self.rank: int = state.process_index
        self.size: int = state.num_processes
        # Taken from a tensor, so that it has an index: Accelerate's "cuda" is not equal to a tensor's "cuda:0".
        self.device = torch.empty(0, device=state.device).device
        self.is_main: bool = state.is_main_process
        self.alike = True  # whether all processes run on one kind of processor, see `compare_processors`

    @classmethod
    def alone(cls, device: torch.device) -> "World":
        """Return this process by itself, however it was launched. Nothing global is read or changed."""
        return cls(_Alone(device))

    def on_main(self, choose: Callable[[], T], *, patient: bool = False) -> T:
        """Call `choose` on the main process; return its result, or raise its error, on every process.

        If they are `patient`, the other processes wait however long it takes; otherwise a collective's timeout.
        """
        if self.size == 1:
            return choose()
        outcome: list[T | Exception | None] = [None]
        done = self.on_main(lambda: f"vae_dist/done/{secrets.token_hex(8)}") if patient else None
        if self.is_main:
            try:
                outcome[0] = choose()
            except (UserError, RunError) as error:
                outcome[0] = error
            except Exception as error:
                with self._explained():
                    self._wait_until(done)
                    broadcast_object_list([RunError(f"process 0 failed: {type(error).__name__}: {error}")])
                raise
        with self._explained():
            self._wait_until(done)
            result = broadcast_object_list(outcome)[0]
        if isinstance(result, UserError | RunError):
            raise result.on_every_process()
        return result

    def _wait_until(self, done: str | None) -> None:
        """Wait without a timeout until the main process calls this too."""
        if done is not None:
            if self.is_main:
                failures.store().set(done, "yes")
            else:
                failures.wait_for_keys(failures.store(), [done], math.inf)

    def main_first(self, load: Callable[[], T]) -> T:
        """Call `load` on the main process, then on the others, which find what it downloaded; return each result."""
        loaded: list[T] = []
        self.on_main(lambda: loaded.append(load()), patient=True)
        return loaded[0] if loaded else load()

    def assert_equal_everywhere(self, find: Callable[[], Mapping[str, object]]) -> None:
        """Raise UserError on every process if `find` returns different values on them. All processes call this."""
        if self.size == 1:
            return
        facts = self.gather_objects(find())
        for name in dict.fromkeys(name for theirs in facts for name in theirs):
            values = [theirs.get(name) for theirs in facts]
            others = [rank for rank, value in enumerate(values) if value != values[0]]
            if others:
                raise UserError(
                    f"the processes do not agree on {name}: {values[0]} on process 0, {values[others[0]]} on process "
                    f"{others[0]}; start all of them with the same command, code and data"
                ).on_every_process()

    def compare_processors(self) -> None:
        """Set `alike`; if it is False, log one warning that names the processors. All processes call this.

        Different processors round the same operations differently.
        """
        kinds = self.gather_objects(environment.processor(self.device))
        self.alike = len(set(kinds)) == 1
        if self.is_main and not self.alike:
            logger.warning(
                "the processes run on different processors (%s), which round differently: weights and moments are "
                "copied from process 0 to the others at every metrics record and every save",
                "; ".join(
                    f"{kind} on process {', '.join(str(rank) for rank, other in enumerate(kinds) if other == kind)}"
                    for kind in dict.fromkeys(kinds)
                ),
            )

    def should_log(self, text: str) -> bool:
        """Return whether this process logs a message: the main process always, one other if the main one does not."""
        if self.size == 1:
            return True
        key = f"vae_dist/logged/{hashlib.sha256(text.encode(errors='replace')).hexdigest()}"
        try:
            store = failures.store()
            if self.is_main:
                store.set(key, "yes")
                return True
            main_logs = failures.wait_for_keys(store, [key], failures.REPORT_SECONDS)
            return not main_logs and store.add(f"{key}/others", 1) == 1
        except (RuntimeError, ValueError):  # the store is gone, or the processes have left the group
            return True

    def set_timeout(self, seconds: float) -> None:
        """Set the timeout of collectives from now on."""
        if self.size > 1:
            # Public since torch 2.14; before that it had another name.
            set_timeout = getattr(torch.distributed, "set_timeout", None) or distributed_c10d._set_pg_timeout
            set_timeout(timedelta(seconds=seconds), torch.distributed.group.WORLD)

    def copy_from_main(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite contiguous tensors in place by the main process's."""
        with self._explained():
            copies = [torch.distributed.broadcast(tensor.detach(), 0, async_op=True) for tensor in tensors]
            for copy in copies:
                assert copy is not None  # this process is in the group
                copy.wait()

    def average(self, values: Tensor) -> None:
        """Replace `values` by the mean of the processes' tensors. Raises RunError if a process does not answer.

        Accelerate's reduce copies what it is given: of gradients, a copy takes a fortieth of a small model's step, and
        may not fit.
        """
        with self._explained():
            torch.distributed.all_reduce(values)
        values /= self.size

    def sum(self, values: Tensor) -> Tensor:
        """The sum of the processes' tensors, on the CPU."""
        return self._reduced(values, "sum").cpu()

    def max(self, values: Tensor) -> Tensor:
        """The elementwise maximum of the processes' tensors, on the CPU."""
        return self._reduced(values, "max").cpu()

    def _reduced(self, values: Tensor, reduction: str) -> Tensor:
        if self.size == 1:
            return values
        with self._explained():
            reduced: Tensor = reduce(values.to(self.device), reduction)
        return reduced

    def gather(self, values: Tensor) -> Tensor:
        """Return the tensors of all processes, stacked by rank, on the CPU."""
        if self.size == 1:
            return values.unsqueeze(0).cpu()
        with self._explained():
            gathered: Tensor = gather(values.to(self.device).unsqueeze(0))
        return gathered.cpu()

    def gather_objects(self, value: T) -> list[T]:
        """Return the values of all processes, by rank. They are pickled."""
        if self.size == 1:
            return [value]
        with self._explained():
            gathered: list[T] = gather_object([value])
        return gathered

    def chunks(self, count: int, size: int) -> list[range]:
        """Return this process's chunks of `range(count)`, cut alike for any number of processes and dealt in turn."""
        return every_chunk(count, size)[self.rank :: self.size]

    def gather_rows(self, chunks: Sequence[range], values: Sequence[Tensor], count: int) -> Tensor:
        """Return all values in row order, `(count, ...)` on the CPU; `values[i]` holds the rows of `chunks[i]`.

        Rows are moved, not added up, so the result is bitwise the same on any number of processes.
        """
        mine = [(chunk, value.cpu()) for chunk, value in zip(chunks, values, strict=True)]
        every = (pair for theirs in self.gather_objects(mine) for pair in theirs)
        rows = torch.cat([value for _, value in sorted(every, key=lambda pair: pair[0].start)])
        assert len(rows) == count, f"{len(rows)} rows were gathered, {count} were dealt"
        return rows

    def _explained(self) -> AbstractContextManager[None]:
        return failures.explained(self.rank, self.size)


class _Alone(NamedTuple):
    device: torch.device
    process_index: int = 0
    num_processes: int = 1
    is_main_process: bool = True
