"""Numerical precision: the meaning of `train.precision` on a device, and Accelerate's part in it."""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState, is_initialized
from accelerate.utils import GradientAccumulationPlugin

from vae_dist.config import Precision
from vae_dist.distributed import caller
from vae_dist.errors import UserError

_LAUNCHER_PRECISIONS: dict[str, Precision] = {"no": "fp32", "fp16": "fp16", "bf16": "bf16"}
_ACCELERATE_PRECISIONS = {"fp32": "no", "tf32": "no", "fp64": "no", "fp16": "fp16", "bf16": "bf16"}


def resolve_precision(precision: Precision, device: torch.device) -> Precision:
    """Return the precision to compute in; `auto` takes the launcher's.

    Raises UserError if the device does not support it, or if the caller's own Accelerator has another one.
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
            f"this process has an Accelerator of mixed_precision={theirs!r}, Accelerate allows one precision per "
            f"process, and this run is in {precision}: {remedy} with mixed_precision={ours!r}"
        )
    return precision


@contextmanager
def tf32_convolutions(allowed: bool) -> Iterator[None]:
    """Let convolutions of fp32 tensors on a GPU round their inputs to TF32 inside the context, if `allowed`."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = before or allowed
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def accelerator(precision: Precision) -> Accelerator:
    """Make Accelerate's object for the joined processes, in a precision that `resolve_precision` returned."""
    device = PartialState().device
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
        torch.backends.cudnn.allow_tf32 = precision == "tf32"
    before = dict(GradientState._shared_state)
    made = Accelerator(
        cpu=device.type == "cpu",
        mixed_precision=_ACCELERATE_PRECISIONS[precision],
        # The launcher can set this too, and backward() would divide by it; train.accumulate is the only option.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
    )
    if before:  # a caller's own Accelerator counts its steps there
        caller.restore_shared_state(GradientState._shared_state, before)
    return made


def autocast(precision: Precision, device: torch.device) -> Callable[[], AbstractContextManager[object]]:
    """Return a maker of contexts in which a network computes: autocast for bf16 and fp16, otherwise no-ops."""
    low = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    return nullcontext if low is None else partial(torch.autocast, device.type, dtype=low)


def param_dtype(precision: Precision) -> torch.dtype:
    """The dtype of weights, images and noise; bf16 and fp16 are autocast's."""
    return torch.float64 if precision == "fp64" else torch.float32


def sum_dtype(device: torch.device) -> torch.dtype:
    """The dtype of sums over many images: float64 if the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64
