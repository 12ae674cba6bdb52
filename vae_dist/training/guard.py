"""The guard of a step: it clips gradients, skips updates that are not finite, and sums what a step reports."""

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

COUNTS = ("updates", "applied", "skipped")  # the last of a step's totals; the same on every process


class Guard:
    """Decides on the device, without a host sync, whether a step is applied, and adds what it reports to totals.

    An update is skipped if a loss or a gradient is not finite on any process: the numbers it is given are means over
    the processes. So are all later ones, unless `skip_nonfinite`. Methods are functions of tensors, which can be
    compiled.
    """

    def __init__(self, *, skip_nonfinite: bool, processes: int, sum_dtype: torch.dtype) -> None:
        self._skip_nonfinite = skip_nonfinite
        self._processes = processes
        self._sum_dtype = sum_dtype

    def healthy(self, numbers: Sequence[Tensor], totals: Tensor) -> Tensor:
        """Return whether the update may be applied: bool `()`. `numbers` `()` must be finite."""
        healthy = functools.reduce(torch.add, numbers).abs() < math.inf
        return healthy if self._skip_nonfinite else healthy & (totals[-1] == 0)

    def count(self, totals: Tensor, healthy: Tensor, sums: Tensor, norms: Sequence[Tensor]) -> None:
        """Add a step to its totals `(n + m + 3,)`: this process's sums `(n,)`, m norms `()`, and COUNTS.

        Nothing but `skipped` is added for a step that is not applied.
        """
        applied = healthy.to(self._sum_dtype)
        # Norms and updates are the same on every process: 1/W of each, as the processes' totals are summed.
        shared = [number.to(self._sum_dtype) / self._processes for number in (*norms, applied)]
        reported = torch.cat([sums, torch.stack([*shared, applied])])
        totals.add_(torch.cat([torch.where(healthy, reported, 0.0), (1 - applied).unsqueeze(0)]))


def clip(gradients: Sequence[Tensor], max_norm: float | None) -> tuple[Tensor, list[Tensor]]:
    """Return the norm `()` over all gradients, and the gradients scaled down to `max_norm`."""
    norm = _global_norm(gradients)
    if max_norm is None:
        return norm, list(gradients)
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_ does
    return norm, [gradient * factor for gradient in gradients]


def _global_norm(gradients: Sequence[Tensor]) -> Tensor:
    if len(gradients) == 1:
        return torch.linalg.vector_norm(gradients[0])
    # Reduce rows first: torch parallelises over rows, but not a full reduction.
    rows = [torch.linalg.vector_norm(_rows(gradient), dim=-1).view(-1) for gradient in gradients]
    return torch.linalg.vector_norm(torch.cat(rows))


def _rows(gradient: Tensor) -> Tensor:
    return gradient.flatten(1) if gradient.ndim > 2 else gradient
