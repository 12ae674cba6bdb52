"""Adam over one tensor of all parameters, for a GPU."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vae_dist.training.optimizers import Adam, AdamW


class FlatAdam(Adam):
    """Adam over one tensor of all parameters, which become views of it, so that one small kernel updates them.

    torch's fused kernel gives each block of a GPU 65,536 weights: half a million occupy ten of a large GPU's hundred
    multiprocessors. `parameters` holds the one tensor, and `step` takes one gradient `(weights,)`.
    """

    def _allocate(self, names: list[str], parameters: list[Tensor]) -> None:
        self._views = parameters
        weights = torch.cat([parameter.detach().flatten() for parameter in parameters])
        for parameter, view in zip(parameters, self.split(weights), strict=True):
            parameter.data = view
        super()._allocate(["weights"], [weights])
        self.names = names
        self._steps = self._steps.repeat(len(parameters))  # one per parameter, all equal
        moments = self._steps, *map(self.split, (self._firsts[0], self._seconds[0]))
        self._state = list(zip(*moments, strict=True))

    @property
    def weights(self) -> list[Tensor]:
        """The network's parameters, detached from autograd."""
        return self.split(self.parameters[0])

    def split(self, flat: Tensor) -> list[Tensor]:
        """Return views of `(weights,)`, one in each parameter's shape."""
        parts = flat.split([parameter.numel() for parameter in self._views])
        return [part.view(parameter.shape) for part, parameter in zip(parts, self._views, strict=True)]

    def step(self, gradients: Sequence[Tensor], learning_rate: Tensor, skip: Tensor | None = None) -> None:
        """Update by the one gradient of `gradients`. `learning_rate` and `skip` are as in `Adam.step`."""
        skip = self.found_inf if skip is None else skip
        skip = torch.zeros_like(learning_rate) if skip is None else skip
        self.update(self.tensors, gradients[0], learning_rate, skip)

    def update(self, tensors: Sequence[Tensor], gradient: Tensor, learning_rate: Tensor, skip: Tensor) -> None:
        """Update `tensors` in place, as a function of tensors that can be compiled with the rest of the step."""
        weights, averages, squares, steps = tensors
        start = weights
        if self.DECOUPLED:
            start = weights * (1 - learning_rate * self._weight_decay)
        elif self._weight_decay:
            gradient = gradient + self._weight_decay * weights
        skipped = skip > 0
        count = (steps[0] + 1).to(weights.dtype)
        # Bias corrections 1 - beta^count, by expm1: the difference would cancel digits.
        first, second = (
            -torch.expm1(count * math.log(beta)) if beta else torch.ones_like(count)
            for beta in (self._beta1, self._beta2)
        )
        average = averages + (1 - self._beta1) * (gradient - averages)
        square = self._beta2 * squares + (1 - self._beta2) * gradient * gradient
        updated = start - learning_rate / first * average / ((square / second).sqrt() + self._eps)
        for old, new in (weights, updated), (averages, average), (squares, square), (steps, steps + 1):
            old.copy_(torch.where(skipped, old, new))


class FlatAdamW(FlatAdam, AdamW):
    """The same with decoupled weight decay."""


# Name in a config -> the optimizer on a GPU. Others are those of optimizers.py.
FLAT_OPTIMIZERS: dict[str, type[FlatAdam]] = {"adam": FlatAdam, "adamw": FlatAdamW}
