"""Functions of tensors, compiled by torch.compile."""

import logging
import warnings
from collections.abc import Callable, Sequence
from types import FunctionType
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

    The function must depend on its tensor arguments alone, and may modify them in place. What else it reads, such as a
    number in a closure, is a constant of the program. It is compiled once per combination of shapes, without guards:
    they would take a tenth of a small network's step.

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
        if not self.failure and shapes in self._programs:
            with torch.no_grad():
                return self._programs[shapes](*inputs)
        return self._fallback(*inputs) if self.failure else self._first_call(shapes, inputs)

    def _first_call(self, shapes: tuple[torch.Size, ...], inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """Compile for these shapes, and call the program or the fallback. A failure changes no input."""
        # It warns if torch was built for CUDA and there is no GPU.
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the compiler's advice to leave float32 for TF32, among others
                program = self._compile(inputs)
                results = program(*inputs)
        except Exception as error:  # of torch's compiler, or of the C++ compiler that it calls
            reason = str(error).strip().partition("\n")[0]
            self.failure = f"{type(error).__name__}: {reason}"
            if self._warns:
                logger.warning("the step can't be compiled (%s) and runs uncompiled", self.failure)
            return self._fallback(*inputs)
        self._programs[shapes] = program
        return results

    def _compile(self, inputs: Sequence[Tensor]) -> Function:
        """Return the program, which torch.compile compiles at its first call."""
        options: dict[str, Any] = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
        if inputs[0].is_cuda:
            options |= {**_SAME_EVERY_TIME, **_small_products(inputs[0].device)}
        return torch.compile(_of_its_own(self._function), fullgraph=True, dynamic=False, options=options)


def _of_its_own(function: Function) -> Function:
    """Wrap a function in one that has a code object of its own.

    torch.compile keeps its programs by code object. Without guards a second function of the same code, such as that of
    another network, would run the first one's program.
    """

    def program(*inputs: Tensor) -> Sequence[Tensor]:
        return function(*inputs)

    return FunctionType(program.__code__.replace(), globals(), "program", closure=program.__closure__)


def _small_products(device: torch.device) -> dict[str, Any]:
    """The option that replaces small matrix products, if the GPU has TF32 and Triton compiles for it."""
    if torch.version.hip is not None or torch.cuda.get_device_capability(device) < (8, 0):
        return {}
    try:
        from vae_dist.compute import products

        products.warm_up(device)
    except Exception as error:  # of Triton, or of the C compiler that it calls
        reason = str(error).strip().rpartition("\n")[2]
        logger.warning("small matrix products are left to cuBLAS: %s: %s", type(error).__name__, reason)
        return {}
    return {"post_grad_custom_pre_pass": products.SmallProducts()}
