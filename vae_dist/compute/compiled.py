"""Functions of tensors, compiled."""

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

Function = Callable[..., Sequence[Tensor]]  # its arguments are tensors

# On a GPU the compiler times variants of a kernel and keeps the fastest of the moment; they round differently.
# `deterministic` fixes the variant of reductions, the other option that of all other kernels.
_SAME_EVERY_TIME = {"deterministic": True, "triton.autotune_pointwise": False}


class Compiled:
    """A compiled function, or `fallback` if it can't be compiled.

    The function must depend on its tensor arguments alone, and may modify them in place. It is compiled once per
    combination of shapes, without guards: torch.compile's guards take longer than a small network's step.

    `failure` is the reason why it can't be compiled, or empty. Setting it selects `fallback`. With `warns=False` the
    caller reports it.
    """

    def __init__(self, function: Function, fallback: Function, *, warns: bool = True) -> None:
        self._function = function
        self._fallback = fallback
        self._warns = warns
        self._programs: dict[tuple[torch.Size, ...], Function] = {}
        self.failure = ""

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        shapes = tuple(tensor.shape for tensor in inputs)
        if shapes not in self._programs and not self.failure:
            self._compile(shapes, inputs)
        if self.failure:
            return self._fallback(*inputs)
        with torch.no_grad():
            return self._programs[shapes](*inputs)

    def _compile(self, shapes: tuple[torch.Size, ...], inputs: Sequence[Tensor]) -> None:
        # It warns if torch was built for CUDA and there is no GPU.
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
        try:
            from torch._inductor import compile as compile_graph  # takes seconds, and makes the compiler's cache folder
            from torch.fx.experimental.proxy_tensor import make_fx

            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the compiler's advice to leave float32 for TF32, among others
                on_gpu = inputs[0].is_cuda
                graph = make_fx(
                    self._function, _matrix_products(inputs[0].device) if on_gpu else None, tracing_mode="fake"
                )(*inputs)
                options = dict(_SAME_EVERY_TIME) if on_gpu else None  # it is emptied
                self._programs[shapes] = compile_graph(graph, list(inputs), options)
        except Exception as error:  # of torch's compiler, or of the C++ compiler that it calls
            reason = str(error).strip().partition("\n")[0]
            self.failure = f"{type(error).__name__}: {reason}"
            if self._warns:
                logger.warning("the step can't be compiled (%s) and runs uncompiled", self.failure)


def _matrix_products(device: torch.device) -> Mapping[Any, Callable[..., Tensor]] | None:
    """The replacements of torch's matrix products while tracing, if the GPU has TF32 and Triton compiles for it."""
    if torch.version.hip is not None or torch.cuda.get_device_capability(device) < (8, 0):
        return None
    from vae_dist.compute import products

    try:
        products.warm_up(device)
    except Exception as error:  # of Triton, or of the C compiler that it calls
        reason = str(error).strip().rpartition("\n")[2]
        logger.warning("small matrix products are left to cuBLAS: %s: %s", type(error).__name__, reason)
        return None
    return products.REPLACEMENTS
