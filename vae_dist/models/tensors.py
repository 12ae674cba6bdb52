"""Shapes and floating-point types at the border of a model."""

import torch
from torch import Tensor

Shape = tuple[int, ...]


class ShapeError(ValueError):
    """A tensor's shape does not fit the model. Unchecked, it could broadcast into a wrong loss."""


def require_shape(tensor: Tensor, expected: Shape, what: str) -> None:
    """Raise ShapeError unless a tensor has the expected shape."""
    if tensor.shape != expected:
        raise ShapeError(f"{what} must have the shape {tuple(expected)}, not {tuple(tensor.shape)}")


def at_least_float32(x: Tensor) -> Tensor:
    """Convert to float32 if the type is smaller: a sum over 784 pixels in bfloat16 is off by half a nat."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
