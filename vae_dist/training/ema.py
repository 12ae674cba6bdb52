"""An exponential moving average of a network's weights."""

from copy import deepcopy
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from vae_dist.training.flat_adam import FlatAdam
from vae_dist.training.optimizers import Optimizer

Network = TypeVar("Network", bound=nn.Module)


class Ema(Generic[Network]):
    """The average of the weights that an optimizer updates (Polyak and Juditsky 1992): `network` holds it.

    Its frozen weights stay equal to the network's.
    """

    def __init__(self, network: Network, optimizer: Optimizer) -> None:
        self.network = deepcopy(network).requires_grad_(False)
        pairs = zip(self.network.parameters(), network.parameters(), strict=True)
        self._averages: list[Tensor] = [average for average, weight in pairs if weight.requires_grad]
        if isinstance(optimizer, FlatAdam):  # one tensor too, whose parts are the network's parameters
            flat = optimizer.parameters[0].clone()
            for parameter, part in zip(self._averages, optimizer.split(flat), strict=True):
                parameter.data = part
            self._averages = [flat]
        self._weights = optimizer.parameters
        self._buffers = list(zip(self.network.buffers(), network.buffers(), strict=True))
        self.tensors: list[Tensor] = [*self._averages, *self.network.buffers()]

    @torch.no_grad()
    def update(self, decay: Tensor, skip: Tensor) -> None:
        """Move the average by 1 - `decay` `()` towards the weights; not at all if `skip` `()` is 1.

        Buffers are no weights, and are copied.
        """
        distance = ((1 - decay) * (1 - skip)).to(self._averages[0].dtype)
        # A weight for each tensor: one number would be read by the host.
        torch._foreach_lerp_(self._averages, self._weights, [distance] * len(self._averages))
        for own, buffer in self._buffers:
            own.copy_(buffer)
