"""The scale of a likelihood as the optimum of each batch (Rybkin, Daniilidis and Levine 2021, section 4).

For a Gaussian its square is the batch's mean squared error: the sigma that makes the images most likely, given their
reconstructions. The loss does not change with sigma there to first order, so gradients treat it as a constant.
"""

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from vae_dist.config import SIGMA_FLOOR, Config
from vae_dist.distributed import precision
from vae_dist.distributed.world import World
from vae_dist.models.likelihoods import LocationScaleKind
from vae_dist.models.scales import OptimalScale
from vae_dist.models.vae import VAE, Inference

DECAY = 0.99  # of the moving average of the error, by the update


class Calibration:
    """Finds the optimal sigma of a batch over all processes, and keeps its moving average in the model."""

    def __init__(self, vae: VAE, kind: LocationScaleKind, scale: OptimalScale, config: Config, world: World) -> None:
        assert kind.error_order is not None
        self._vae = vae
        self._order = kind.error_order
        self._average = scale.sigma
        self._world = world
        self._autocast = precision.autocast(config.train.precision, world.device)
        self._sum_dtype = precision.sum_dtype(world.device)
        # The mean of the processes' quotients is then the batch mean, however uneven their shards are.
        self._errors = config.objective.samples * config.train.batch_size / world.size

    @torch.no_grad()
    def optimum(self, micro_batches: Iterable[Sequence[Tensor]]) -> Tensor:
        """Return the batch's optimal sigma `()`, equal on all processes, which all call this.

        A micro-batch holds the inputs of the model's forward, its images first.
        """
        error = torch.zeros((), dtype=self._sum_dtype, device=self._world.device)
        for inputs in micro_batches:
            with self._autocast():
                inference: Inference = self._vae(*inputs)
            errors = cast(Any, inference.likelihood).error(inference.repeated(inputs[0]))
            error += errors.sum(dtype=self._sum_dtype) / self._errors
        if self._world.size > 1:
            self._world.average(error)
        return error.pow(1 / self._order).clamp(min=SIGMA_FLOOR)

    @torch.no_grad()
    def update(self, optimum: Tensor, updates: Tensor, skip: Tensor) -> None:
        """Move the average of the error towards the batch's; not at all if `skip` `()` is 1.

        It starts from the first batch's. `updates` `()` is their number with this one. The decay warms up as that of
        the weights' average does, since the errors fall most in the first updates.
        """
        before = updates.to(self._sum_dtype) - 1
        decay = (before / (before + 9)).clamp(max=DECAY)
        old = self._average.to(self._sum_dtype)
        error = decay * old.pow(self._order) + (1 - decay) * optimum.pow(self._order)
        self._average.copy_(torch.where(skip > 0, old, error.pow(1 / self._order)))


def calibration(vae: VAE, config: Config, world: World) -> Calibration | None:
    """Return the calibration of a VAE whose likelihood has an optimal scale; None of any other."""
    kind = vae.likelihood
    if not isinstance(kind, LocationScaleKind) or not isinstance(kind.scale, OptimalScale):
        return None
    return Calibration(vae, kind, kind.scale, config, world)


def with_sigma(inference: Inference, sigma: Tensor) -> Inference:
    """Return an inference under a likelihood of another sigma `()`."""
    return inference._replace(likelihood=cast(Any, inference.likelihood)._replace(sigma=sigma))
