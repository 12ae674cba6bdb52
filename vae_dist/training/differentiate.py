"""Gradients of a loss by the weights of one network. B images."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value

from vae_dist.training.optimizers import trained_parameters


class Losses(NamedTuple):
    """What a network's loss is computed from."""

    values: dict[str, Tensor]  # (B,) each: `loss`, whose mean is minimised, and others that are logged
    outputs: tuple[Tensor, ...] = ()  # of the network, for losses of other networks


Autocast = Callable[[], AbstractContextManager[object]]

# Computes the losses from the network's forward, which it calls, and from tensors.
LossFunction = Callable[..., Losses]


class Differentiate:
    """Differentiates the mean loss over a batch, in two ways that differ in rounding alone.

    Both take (scale, *inputs, *weights) and return [loss, sums, *outputs, *gradients]: the loss `()` is these images'
    part of the batch mean, sums `(n,)` are those of the values over the images, outputs are detached, gradients are in
    the order of the weights, which are `trained_parameters`, and of the loss times its scale `()`.

    `batch_size` divides the sum over the images. Autocast surrounds the network's forward alone: Accelerate's, or
    `autocast` where a compiler traces it. `sum_dtype` is the type of sums over images.
    """

    def __init__(
        self,
        network: nn.Module,
        losses: LossFunction,
        *,
        batch_size: float,
        autocast: Autocast,
        accelerator: Accelerator,
        sum_dtype: torch.dtype,
    ) -> None:
        self._network = network
        self._losses = losses
        self._names = list(trained_parameters(network))
        self._batch_size = batch_size
        self._autocast = autocast
        self._accelerator = accelerator
        self._sum_dtype = sum_dtype

    def eager(self, scale: Tensor, *tensors: Tensor) -> list[Tensor]:
        """Run forward and autograd's backward. The weights are the network's own; Accelerate scales the loss."""
        inputs, weights = self._inputs_and_weights(tensors)
        loss, sums, outputs = self._reduced(self._network, inputs, self._accelerator.autocast)
        self._accelerator.backward(loss, inputs=weights)
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        assert len(gradients) == len(weights), "a weight does not take part in the loss"
        for weight in weights:
            weight.grad = None
        return [loss.detach(), sums, *outputs, *gradients]

    def functional(self, scale: Tensor, *tensors: Tensor) -> list[Tensor]:
        """Do the same as a pure function of tensors, which can be compiled and captured."""
        inputs, weights = self._inputs_and_weights(tensors)

        def loss_of(weights: Sequence[Tensor]) -> tuple[Tensor, Any]:
            named = dict(zip(self._names, weights, strict=True))
            network = partial(functional_call, self._network, named)
            loss, sums, outputs = self._reduced(lambda *given: network(given), inputs, self._autocast)
            return loss * scale.to(loss.dtype), (loss, sums, outputs)

        gradients, (_, (loss, sums, outputs)) = grad_and_value(loss_of, has_aux=True)(weights)
        return [loss, sums, *outputs, *gradients]

    def _reduced(
        self, network: Callable[..., Any], inputs: Sequence[Tensor], autocast: Autocast
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Return loss, sums and outputs of these images."""

        def forward(*given: Tensor) -> Any:
            with autocast():
                return network(*given)

        values, outputs = self._losses(forward, *inputs)
        sums = torch.stack([value.detach() for value in values.values()]).sum(1, dtype=self._sum_dtype)
        return values["loss"].sum() / self._batch_size, sums, [output.detach() for output in outputs]

    def _inputs_and_weights(self, tensors: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        count = len(self._names)
        return tensors[:-count], tensors[-count:]
