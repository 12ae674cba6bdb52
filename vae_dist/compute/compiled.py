"""Functions of tensors as compiled programs."""

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

Function = Callable[..., Sequence[Tensor]]  # of tensors alone


class Compiled:
    """A function as a compiled program, and what `otherwise` does where none can be made.

    It has to be a function of the tensors that it is given and of nothing else that changes; it may change those. It is
    traced and compiled once for all shapes that they come in. torch.compile would look at each call for whatever might
    have changed, and a small network's step is over sooner.

    `failure` says why no program can be made, and is empty where one can. Whoever sets it chooses `otherwise`; with
    `warns=False` the caller reports it.
    """

    def __init__(self, function: Function, otherwise: Function, *, warns: bool = True) -> None:
        self._function = function
        self._otherwise = otherwise
        self._warns = warns
        self._programs: dict[tuple[torch.Size, ...], Function] = {}
        self.failure = ""

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        shapes = tuple(tensor.shape for tensor in inputs)
        if shapes not in self._programs and not self.failure:
            self._compile(shapes, inputs)
        if self.failure:
            return self._otherwise(*inputs)
        with torch.no_grad():
            return self._programs[shapes](*inputs)

    def _compile(self, shapes: tuple[torch.Size, ...], inputs: Sequence[Tensor]) -> None:
        # It warns where torch was built for CUDA and there is no GPU.
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
        try:
            from torch._inductor import compile as compile_graph  # takes seconds, and makes the compiler's cache folder
            from torch.fx.experimental.proxy_tensor import make_fx

            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the compiler's advice to leave float32 for TF32, among others
                on_gpu = inputs[0].is_cuda
                graph = make_fx(self._function, _products() if on_gpu else None, tracing_mode="fake")(*inputs)
                # Otherwise the order of a sum would be chosen by what was fastest at the moment.
                options = {"deterministic": True} if on_gpu else None
                self._programs[shapes] = compile_graph(graph, list(inputs), options)
        except Exception as error:  # whatever the compiler, or the one that it calls, has to say
            reason = str(error).strip().partition("\n")[0]
            self.failure = f"{type(error).__name__}: {reason}"
            if self._warns:
                logger.warning("the step can't be compiled (%s) and runs as it is", self.failure)


def _products() -> Mapping[Any, Callable[..., Tensor]] | None:
    """What takes the place of torch's matrix products on a GPU that has TF32."""
    if torch.version.hip is not None or torch.cuda.get_device_capability() < (8, 0):
        return None
    from vae_dist.compute import products

    return products.TABLE
