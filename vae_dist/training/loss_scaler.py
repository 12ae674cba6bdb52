"""The loss scale of fp16, so that small gradients do not underflow (Micikevicius et al. 2018)."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from vae_dist.config import Precision
from vae_dist.distributed import precision as precisions
from vae_dist.training.optimizers import Optimizer

LEAST_SCALE = 2.0**-24  # of smaller ones no gradient of a sound step overflows: they were above 2**39


class LossScaler:
    """Accelerate's gradient scaler for an optimizer that is given its gradients.

    It is active in fp16 alone. Otherwise the scale is 1, and `unscale` and `step` must not be called.
    """

    def __init__(self, precision: Precision, device: torch.device) -> None:
        self.accelerator = precisions.accelerator(precision)
        self._scaler: Any = self.accelerator.scaler
        self._one = torch.ones((), device=device)

    @property
    def active(self) -> bool:
        return self._scaler is not None

    def scale(self) -> Tensor:
        """The factor `()` of the loss before it is differentiated."""
        scale: Tensor = self._scaler.scale(self._one) if self.active else self._one
        return scale

    def unscale(self, optimizer: Optimizer, gradients: Sequence[Tensor]) -> None:
        """Divide the gradients by the scale, in place, and note for `step` whether they are finite."""
        for parameter, gradient in zip(optimizer.parameters, gradients, strict=True):
            parameter.grad = gradient
        self._scaler.unscale_(optimizer)
        for parameter in optimizer.parameters:
            parameter.grad = None

    def step(self, optimizer: Optimizer, gradients: Sequence[Tensor], learning_rate: Tensor, skip: Tensor) -> None:
        """Apply the gradients unless `skip` `()` is 1, as it is if one is not finite, and adapt the scale."""
        self._scaler.step(optimizer, gradients, learning_rate, skip)
        self._scaler.update()

    @contextmanager
    def rehearsal(self) -> Iterator[None]:
        """Undo what `scale` and `unscale` inside the context do to the scaler."""
        before = self.state_dict()
        yield
        if self.active:
            self._scaler.update()  # otherwise `unscale` raises when it is called again in this step
            self._scaler.load_state_dict(before)

    def state_dict(self) -> dict[str, object]:
        """The scale and its growth count; empty if not active."""
        return self._scaler.state_dict() if self.active else {}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Restore what `state_dict` returned."""
        if self.active and state:
            self._scaler.load_state_dict(state)
