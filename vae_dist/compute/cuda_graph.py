"""Optimizer steps captured as CUDA graphs: one launch for many steps.

On a GPU a small model's step is launch-bound: it has some dozens of operations, each shorter than its launch. A graph
is verified before it is used: its replay must leave the same bits as the steps themselves.
"""

import gc
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

Steps = Callable[..., None]  # of tensors whose first dimension is the number of steps
Capture = Callable[[Steps, Sequence[Tensor]], Callable[[], None]]  # steps and static inputs -> replay
Snapshot = tuple[list[Tensor], Mapping[str, object]]


class CapturedSteps:
    """Steps that are captured at the first call with a number of steps, and replayed from then on.

    If the capture fails, the steps run one by one. `state` is everything that they change, in place. A loss scaler has
    a state of its own, which `read` returns and `write` restores.
    """

    def __init__(
        self,
        steps: Steps,
        state: Sequence[Tensor],
        capture: Capture,
        read: Callable[[], Mapping[str, object]] = dict,
        write: Callable[[Mapping[str, object]], None] = lambda values: None,
    ) -> None:
        self._steps = steps
        self._state = state
        self._capture = capture
        self._read, self._write = read, write
        self._graphs: dict[int, tuple[list[Tensor], Callable[[], None]]] = {}  # by the number of steps
        self.failed = False

    def __call__(self, *inputs: Tensor) -> None:
        """Take one step for each entry of the inputs' first dimension."""
        count = len(inputs[0])
        if self.failed:
            self._steps(*inputs)
        elif count not in self._graphs:
            self._take_and_capture(count, [tensor.clone() for tensor in inputs])
        else:
            static_inputs, replay = self._graphs[count]
            for static, tensor in zip(static_inputs, inputs, strict=True):
                static.copy_(tensor)
            replay()

    def _take_and_capture(self, count: int, static_inputs: list[Tensor]) -> None:
        """Take the steps one by one, capture them, and verify that a replay from the same state does the same."""
        before = self._snapshot()
        self._steps(*static_inputs)
        after = self._snapshot()
        try:
            replay = self._capture(self._steps, static_inputs)
            self._restore(before)
            replay()
            if not _equal(self._snapshot(), after):
                raise RuntimeError("its replay differs from the step")
            self._graphs[count] = static_inputs, replay
        except RuntimeError as error:
            reason = str(error).strip().partition("\n")[0]
            logger.warning("the step can't be captured as a CUDA graph (%s) and runs without one", reason)
            self.failed = True
            self._restore(after)

    def _snapshot(self) -> Snapshot:
        return [tensor.detach().clone() for tensor in self._state], self._read()

    def _restore(self, snapshot: Snapshot) -> None:
        values, rest = snapshot
        with torch.no_grad():
            for tensor, value in zip(self._state, values, strict=True):
                tensor.copy_(value)
        self._write(rest)


class CudaGraphCapture:
    """Capture steps as CUDA graphs. The graphs never run at the same time, so they share one memory pool."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, steps: Steps, static_inputs: Sequence[Tensor]) -> Callable[[], None]:
        """Return a function that replays the steps on the current content of `static_inputs`.

        The steps must have run before: libraries initialise at their first call, which can't be captured.
        """
        graph = torch.cuda.CUDAGraph()
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        try:
            # A capture that fails leaves its stream the current one. Thread-local, since another thread may load images
            # during the capture.
            with (
                _garbage_kept(),
                torch.cuda.stream(torch.cuda.current_stream()),
                torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"),
            ):
                steps(*static_inputs)
        except RuntimeError:
            _end_in_allocator(self._pool)
            raise
        return graph.replay


@contextmanager
def _garbage_kept() -> Iterator[None]:
    """Suspend Python's garbage collection: a graph of an earlier run, freed during a capture, would make it fail."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _end_in_allocator(pool: Any) -> None:
    """End a capture that has failed for torch's allocator, as torch does not.

    Until its end, the allocator frees no copy of images that another stream has read, and empties no cache.
    """
    device = torch.cuda.current_device()
    with suppress(AttributeError, RuntimeError):  # private names; and refused if the allocator knows of the end
        torch._C._cuda_endAllocateToPool(device, pool)
        torch._C._cuda_releasePool(device, pool)


def _equal(one: Snapshot, other: Snapshot) -> bool:
    bits = [[tensor.view(-1).view(torch.uint8) for tensor in values] for values, _ in (one, other)]
    return all(map(torch.equal, *bits)) and one[1] == other[1]
