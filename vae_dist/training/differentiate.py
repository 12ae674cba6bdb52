"""Gradients of a loss by the weights of one network. B images."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.func import functional_call, vjp

from vae_dist.models.tensors import in_gpu_order
from vae_dist.training.optimizers import trained_parameters


class Losses(NamedTuple):
    """What a network's loss is computed from."""

    values: dict[str, Tensor]  # (B,) each: `loss`, whose mean is minimised, and others that are logged
    outputs: tuple[Tensor, ...] = ()  # of the network, for losses of other networks
    probe: Tensor | None = None  # (B,), a part of the loss whose gradient at one weight is wanted too


Autocast = Callable[[], AbstractContextManager[object]]

# Computes the losses from the network's forward, which it calls, and from tensors.
LossFunction = Callable[..., Losses]


class Differentiate:
    """Differentiates the mean loss over a batch, in two ways that differ in rounding alone.

    Both take (scale, *inputs, *weights) and return [loss, sums, *outputs, *gradients]: the loss `()` is these images'
    part of the batch mean, sums `(n,)` are those of the values over the images, outputs are detached, gradients are in
    the order of the weights, which are `trained_parameters`, and of the loss times its scale `()`. If the losses have a
    probe, its gradient at the weight of the index `probed`, without the scale, comes before the others.

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
        probed: int = 0,
    ) -> None:
        self._network = network
        self._losses = losses
        self._names = list(trained_parameters(network))
        self._batch_size = batch_size
        self._autocast = autocast
        self._accelerator = accelerator
        self._sum_dtype = sum_dtype
        self._probed = probed

    def eager(self, scale: Tensor, *tensors: Tensor) -> list[Tensor]:
        """Run forward and autograd's backward. The weights are the network's own; Accelerate scales the loss."""
        inputs, weights = self._inputs_and_weights(tensors)
        loss, probe, (sums, outputs) = self._reduced(self._network, inputs, self._accelerator.autocast)
        probes = [] if probe is None else torch.autograd.grad(probe, weights[self._probed], retain_graph=True)
        self._accelerator.backward(loss, inputs=weights)
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        assert len(gradients) == len(weights), "a weight does not take part in the loss"
        for weight in weights:
            weight.grad = None
        return [loss.detach(), sums, *outputs, *probes, *gradients]

    def functional(self, scale: Tensor, *tensors: Tensor) -> list[Tensor]:
        """Do the same as a pure function of tensors, which can be compiled and captured.

        The gradient of a probe is a backward pass of its own, of which a compiler keeps what that gradient needs.
        """
        # Of the parameters themselves autograd would record the results too, and a step's totals with them.
        inputs, weights = self._inputs_and_weights([in_gpu_order(tensor.detach()) for tensor in tensors])

        def losses_of(*weights: Tensor) -> tuple[tuple[Tensor, ...], Any]:
            named = dict(zip(self._names, weights, strict=True))
            network = partial(functional_call, self._network, named)
            loss, probe, rest = self._reduced(lambda *given: network(given), inputs, self._autocast)
            scaled = loss * scale.to(loss.dtype)
            return (scaled,) if probe is None else (scaled, probe), (loss, rest)

        losses, backward, rest = vjp(losses_of, *weights, has_aux=True)  # type: ignore[misc]  # has_aux adds the third
        loss, (sums, outputs) = rest
        ones, zeros = torch.ones_like(losses[0]), torch.zeros_like(losses[0])
        probes = [backward((zeros, ones))[self._probed]] if len(losses) > 1 else []
        gradients = backward((ones, zeros)[: len(losses)])
        return [loss, sums, *outputs, *probes, *gradients]

    def _reduced(
        self, network: Callable[..., Any], inputs: Sequence[Tensor], autocast: Autocast
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, list[Tensor]]]:
        """Return loss and probe, and then sums and outputs of these images."""

        def forward(*given: Tensor) -> Any:
            with autocast():
                return network(*given)

        values, outputs, probe = self._losses(forward, *inputs)
        sums = torch.stack([value.detach() for value in values.values()]).sum(1, dtype=self._sum_dtype)
        loss = values["loss"].sum() / self._batch_size
        probe = None if probe is None else probe.sum() / self._batch_size
        return loss, probe, (sums, [output.detach() for output in outputs])

    def _inputs_and_weights(self, tensors: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        count = len(self._names)
        return tensors[:-count], tensors[-count:]
