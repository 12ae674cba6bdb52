"""Functions of tensors as compiled programs."""

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

Function = Callable[..., Sequence[Tensor]]  # of tensors alone


class Compiled:
    """A function as a compiled program, and what `otherwise` does where none can be made.

    It has to be a function of the tensors that it is given and of nothing else that changes; it may change those. It is
    traced and compiled once for every shape of the first one. torch.compile would look at each call for whatever might
    have changed, and a small network's step is over sooner.
    """

    def __init__(self, function: Function, otherwise: Function) -> None:
        self._function = function
        self._otherwise = otherwise
        self._programs: dict[torch.Size, Function] = {}
        self.failed = False

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        shape = inputs[0].shape
        if shape not in self._programs and not self.failed:
            self._compile(inputs)
        if self.failed:
            return self._otherwise(*inputs)
        with torch.no_grad():
            return self._programs[shape](*inputs)

    def _compile(self, inputs: Sequence[Tensor]) -> None:
        from torch._inductor import compile as compile_graph  # takes seconds to import
        from torch.fx.experimental.proxy_tensor import make_fx

        # It warns where torch was built for CUDA and there is no GPU.
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
        try:
            with torch.no_grad():
                graph = make_fx(self._function, tracing_mode="fake")(*inputs)
                self._programs[inputs[0].shape] = compile_graph(graph, list(inputs))
        except Exception as error:  # whatever the compiler, or the one that it calls, has to say
            reason = str(error).strip().partition("\n")[0]
            logger.warning("the step can't be compiled (%s: %s) and runs as it is", type(error).__name__, reason)
            self.failed = True
