"""One optimizer step recorded as a CUDA graph: a single launch in place of some hundred.

A small model's step is over sooner on a GPU than its operations are launched one by one. A recording is proven before
it is used: it has to repeat bit for bit what the step itself has done.
"""

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

Step = Callable[[Tensor, Tensor], Tensor]  # of images and noise
Recorder = Callable[[Step, Tensor, Tensor], tuple[Callable[[], None], Tensor]]

WARM_UPS = 3  # before CUDA may record: libraries set themselves up in the first ones


class Graphed:
    """A step that is recorded at its first call and replayed from then on; it runs as it is where that fails.

    `state` is all that a step changes, and changes in place. What a call returns holds until the next one.
    """

    def __init__(self, step: Step, state: Sequence[Tensor], recorder: Recorder | None = None) -> None:
        self._step = step
        self._state = state
        self._recorder = recorder or recorded
        self._replay: Callable[[], None] | None = None
        self._failed = False

    def __call__(self, images: Tensor, noise: Tensor) -> Tensor:
        if self._failed:
            return self._step(images, noise)
        if self._replay is None:
            return self._record(images, noise)
        self._images.copy_(images)
        self._noise.copy_(noise)
        self._replay()
        return self._result

    def _record(self, images: Tensor, noise: Tensor) -> Tensor:
        """Take the step as it is, and record it beside."""
        before = [tensor.clone() for tensor in self._state]
        expected = self._step(images, noise).clone()
        after = [tensor.clone() for tensor in self._state]
        self._images, self._noise = images.clone(), noise.clone()
        try:
            self._replay, self._result = self._recorder(self._step, self._images, self._noise)
            self._restore(before)
            self._replay()
            if not all(map(_same_bits, [*self._state, self._result], [*after, expected])):
                raise RuntimeError("it does not repeat the step")
        except RuntimeError as error:
            reason = str(error).strip().partition("\n")[0]
            logger.warning("the step can't be recorded as a CUDA graph (%s) and runs as it is", reason)
            self._failed = True
        self._restore(after)
        return expected

    def _restore(self, values: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for tensor, value in zip(self._state, values, strict=True):
                tensor.copy_(value)


def recorded(step: Step, images: Tensor, noise: Tensor) -> tuple[Callable[[], None], Tensor]:
    """What replays the step on whatever `images` and `noise` hold by then, and where its result is."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            step(images, noise)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # Another thread may fetch images meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = step(images, noise)
    return graph.replay, result


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.detach().view(-1).view(torch.uint8), other.detach().view(-1).view(torch.uint8))
