"""The training loss of a micro-batch, and its gradients.

B images, L latents, C, H, W image. Nats.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.func import functional_call, grad_and_value

from vae_dist import objectives
from vae_dist.models.vae import VAE, VAEOutput


class Gradients:
    """Differentiates the training loss by a model's parameters, in two ways that differ in rounding alone.

    Both take (images, noise, beta, scale, *weights) and return [loss, terms, *gradients]. Images are `(B, C, H, W)` in
    [0, 1], noise is standard normal `(B, L)`, beta and the loss scale are `()`. The loss `()` is these images' part of
    the batch mean; terms `(2,)` are reconstruction and KL, summed over the images; gradients are in the weights' order.

    `batch_size` divides the sum over the images. `autocast` surrounds the network alone. `sum_dtype` is the type of
    sums over images. If `scaled`, the gradients are those of the loss times its scale.
    """

    def __init__(
        self,
        vae: VAE,
        batch_size: float,
        autocast: Callable[[], AbstractContextManager[object]],
        sum_dtype: torch.dtype,
        *,
        scaled: bool = False,
    ) -> None:
        self._vae = vae
        self._names = [name for name, _ in vae.named_parameters()]
        self._batch_size = batch_size
        self._autocast = autocast
        self._sum_dtype = sum_dtype
        self._scaled = scaled

    def eager(self, images: Tensor, noise: Tensor, beta: Tensor, scale: Tensor, *weights: Tensor) -> list[Tensor]:
        """Run forward and autograd's backward. The weights are the model's own parameters."""
        with self._autocast():
            output = self._vae(images, noise)
        loss, terms = self._loss(output, images, beta)
        gradients = torch.autograd.grad(self._to_differentiate(loss, scale), weights)
        return [loss.detach(), terms, *gradients]

    def functional(self, images: Tensor, noise: Tensor, beta: Tensor, scale: Tensor, *weights: Tensor) -> list[Tensor]:
        """Do the same as a pure function of tensors, which can be compiled and captured."""

        def loss_of(weights: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            with self._autocast():
                named = dict(zip(self._names, weights, strict=True))
                output = functional_call(self._vae, named, (images, noise))
            loss, terms = self._loss(output, images, beta)
            return self._to_differentiate(loss, scale), (loss, terms)

        gradients, (_, (loss, terms)) = grad_and_value(loss_of, has_aux=True)(weights)
        return [loss, terms, *gradients]

    def _loss(self, output: VAEOutput, images: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
        terms = objectives.elbo_terms(output, images)
        sums = torch.stack([term.detach().sum(dtype=self._sum_dtype) for term in terms])
        return objectives.training_loss(terms, beta, self._batch_size), sums

    def _to_differentiate(self, loss: Tensor, scale: Tensor) -> Tensor:
        return loss * scale if self._scaled else loss
