"""Optimizer steps recorded as CUDA graphs: one launch for many steps, each of which has some dozens of operations.

A small model's step is over sooner on a GPU than its operations are launched one by one. A recording is proven before
it is used: it has to repeat bit for bit what the steps themselves have done.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

Steps = Callable[..., None]  # of tensors whose first dimension is the number of steps
Recorder = Callable[[Steps, Sequence[Tensor]], Callable[[], None]]


class Recorded:
    """Steps that are recorded when so many are first taken at once, and replayed from then on.

    Where that fails they are taken as they are. `state` is all that they change, and they change it in place. A loss
    scaler has a state of its own, which `read` returns and `write` puts back.
    """

    def __init__(
        self,
        steps: Steps,
        state: Sequence[Tensor],
        recorder: Recorder,
        read: Callable[[], Mapping[str, object]] = dict,
        write: Callable[[Mapping[str, object]], None] = lambda values: None,
    ) -> None:
        self._steps = steps
        self._state = state
        self._recorder = recorder
        self._read, self._write = read, write
        self._recordings: dict[int, tuple[list[Tensor], Callable[[], None]]] = {}
        self.failed = False

    def __call__(self, *inputs: Tensor) -> None:
        """Take as many steps as the inputs are long."""
        count = len(inputs[0])
        if self.failed:
            self._steps(*inputs)
        elif count not in self._recordings:
            self._record(count, [tensor.clone() for tensor in inputs])
        else:
            places, replay = self._recordings[count]
            for place, tensor in zip(places, inputs, strict=True):
                place.copy_(tensor)
            replay()

    def _record(self, count: int, places: list[Tensor]) -> None:
        """Take the steps as they are, and record them beside."""
        before = self._snapshot()
        self._steps(*places)
        after = self._snapshot()
        try:
            replay = self._recorder(self._steps, places)
            self._restore(before)
            replay()
            if not _same(self._snapshot(), after):
                raise RuntimeError("it does not repeat the step")
            self._recordings[count] = places, replay
        except RuntimeError as error:
            reason = str(error).strip().partition("\n")[0]
            logger.warning("the step can't be recorded as a CUDA graph (%s) and runs as it is", reason)
            self.failed = True
            self._restore(after)

    def _snapshot(self) -> "Snapshot":
        return [tensor.detach().clone() for tensor in self._state], self._read()

    def _restore(self, snapshot: "Snapshot") -> None:
        values, rest = snapshot
        with torch.no_grad():
            for tensor, value in zip(self._state, values, strict=True):
                tensor.copy_(value)
        self._write(rest)


Snapshot = tuple[list[Tensor], Mapping[str, object]]


class CudaGraphs:
    """Records steps as CUDA graphs. They run one after the other, so that they share their memory."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, steps: Steps, places: Sequence[Tensor]) -> Callable[[], None]:
        """What replays the steps on whatever lies in `places` by then.

        The steps have been taken before: libraries set themselves up at their first calls, and can't while recorded.
        """
        graph = torch.cuda.CUDAGraph()
        # Another thread may fetch images meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            steps(*places)
        self._pool = graph.pool()
        return graph.replay


def _same(one: Snapshot, other: Snapshot) -> bool:
    bits = [[tensor.view(-1).view(torch.uint8) for tensor in values] for values, _ in (one, other)]
    return all(map(torch.equal, *bits)) and one[1] == other[1]
