"""The guard of a step: it clips the gradients, skips updates that are not finite, and sums the metrics."""

import math

import torch
from torch import Tensor

from vae_dist.training.meter import Meter

TOTALS = (*Meter.NAMES, "applied", "skipped")  # the last two count updates, and are the same on every process
SKIPPED = TOTALS.index("skipped")


class Guard:
    """Decides on the device, without a host sync, whether the mean gradients of a batch are applied.

    The update is skipped if the loss or a gradient is not finite on any process. So are all later ones, unless
    `skip_nonfinite`. A call is a function of tensors, which can be compiled.
    """

    def __init__(
        self, *, max_norm: float | None, skip_nonfinite: bool, scaled: bool, processes: int, sum_dtype: torch.dtype
    ) -> None:
        self._max_norm = max_norm
        self._skip_nonfinite = skip_nonfinite
        self._scaled = scaled
        self._processes = processes
        self._sum_dtype = sum_dtype

    def __call__(self, terms: Tensor, loss: Tensor, beta: Tensor, totals: Tensor, *gradients: Tensor) -> list[Tensor]:
        """Return [skip, *gradients], the gradients clipped, and add the step to `totals` `(7,)`, which follow TOTALS.

        `skip` `()` is 1 if the update must not be applied and 0 otherwise, float32. `terms` `(2,)` are this process's
        reconstruction and KL; `loss` and gradients are means over the processes.
        """
        norm = global_norm(gradients)
        clipped = list(gradients)
        if self._max_norm is not None:  # as torch.nn.utils.clip_grad_norm_ does
            factor = (self._max_norm / (norm + 1e-6)).clamp(max=1.0)
            clipped = [gradient * factor for gradient in gradients]
        if self._scaled:  # the scale was too large: the scaler skips this update and tries a smaller one
            norm = torch.where(norm.isfinite(), norm, 0.0)
        healthy = (loss + norm).abs() < math.inf
        if not self._skip_nonfinite:
            healthy = healthy & (totals[SKIPPED] == 0)
        reconstruction, kl = terms.unbind()
        # Norm and count are the same on every process: 1/W of each, as the processes' metrics are summed.
        applied, size = healthy.to(self._sum_dtype), self._processes
        metrics = [
            reconstruction + beta * kl, reconstruction, kl, norm.to(self._sum_dtype) / size, applied / size, applied,
        ]  # fmt: skip
        totals.add_(torch.stack([*(torch.where(healthy, metric, 0.0) for metric in metrics), 1 - applied]))
        return [healthy.logical_not().float(), *clipped]


def global_norm(gradients: tuple[Tensor, ...]) -> Tensor:
    """The norm `()` over all gradients."""
    if len(gradients) == 1:
        return torch.linalg.vector_norm(gradients[0])
    # Reduce rows first: torch parallelises over rows, but not a full reduction.
    rows = [torch.linalg.vector_norm(gradient, dim=-1).view(-1) for gradient in gradients]
    return torch.linalg.vector_norm(torch.cat(rows))
