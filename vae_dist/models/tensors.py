"""Shapes, pixels and floating-point types at the border of a model."""

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate

import torch
from torch import Tensor

Shape = tuple[int, ...]

_seeding = threading.RLock()  # torch has one generator for all threads


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's CPU generator inside the context, and leave it afterwards as it was; one thread at a time."""
    with _seeding, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def sizes(shapes: Sequence[Shape]) -> list[int]:
    """Return how many numbers a tensor of each shape has."""
    return [math.prod(shape) for shape in shapes]


def running_sums(x: Tensor, dim: int) -> Tensor:
    """Sum along a dimension as torch.cumsum does, whose sums of floats change from run to run on a GPU."""
    return torch.stack(list(accumulate(x.unbind(dim), torch.add)), dim)


def to_unit(pixels: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Convert uint8 pixels to floats in [0, 1]."""
    return pixels.to(dtype).div_(255)


class ShapeError(ValueError):
    """A tensor's shape does not fit the model. Unchecked, it could broadcast into a wrong loss."""


def require_shape(tensor: Tensor, expected: Shape, what: str) -> None:
    """Raise ShapeError unless a tensor has the expected shape."""
    if tensor.shape != expected:
        raise ShapeError(f"{what} must have the shape {tuple(expected)}, not {tuple(tensor.shape)}")


def at_least_float32(x: Tensor) -> Tensor:
    """Convert to float32 if the type is smaller: a sum over 784 pixels in bfloat16 is off by half a nat."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def traced_on_gpu(x: Tensor) -> bool:
    """Return whether a compiler traces a program for a GPU from this tensor: what is slow there can be written anew."""
    return x.is_cuda and torch.compiler.is_compiling()


def in_gpu_order(x: Tensor) -> Tensor:
    """Return images, or a convolution's weights, with their channels next to each other in memory if traced for a GPU.

    A GPU's convolutions compute in that order. A compiler keeps the order in which their backward passes were traced,
    and in another one each of their tensors is copied twice.
    """
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 and traced_on_gpu(x) else x
