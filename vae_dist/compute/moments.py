"""Means and variances of a set from those of its parts, in float64. P parts."""

from collections.abc import Sequence

import torch
from torch import Tensor


def joined(sizes: Sequence[int], moments: Tensor) -> Tensor:
    """Return the variances and means `(2, ...)` of a set whose parts have these sizes and moments `(P, 2, ...)`.

    The parts are joined in order, as by Chan, Golub and LeVeque (1983): no squares of large means cancel. Variances are
    those of the whole population, divided by its size.
    """
    total, squares, mean = 0, torch.zeros_like(moments[0, 0]), torch.zeros_like(moments[0, 1])
    for size, (variance, mean_of_part) in zip(sizes, moments, strict=True):
        distance = mean_of_part - mean
        squares = squares + size * variance + distance.square() * (total * size / (total + size))
        total += size
        mean = mean + distance * (size / total)
    return torch.stack([squares / total, mean])
