"""The loss of one part of a batch, and its gradients: computed operation by operation, or by a compiled program.

The two differ in nothing but rounding. B images of the part, L latents, C, H, W image.
"""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Generic, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.func import functional_call, grad_and_value

from vae_dist import objective
from vae_dist.model.vae import VAE, VAEOutput

logger = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")


class Part(NamedTuple):
    """What one part of a batch gives."""

    loss: Tensor  # (), this part's share of the batch's mean, nats
    terms: Tensor  # (2,), reconstruction and KL, summed over the part's images, nats
    gradients: tuple[Tensor, ...]  # in the order of the model's parameters

    def plus(self, other: "Part") -> "Part":
        """Two parts as one. The gradients are added in place, for there may not be memory for more of them."""
        for gradient, more in zip(self.gradients, other.gradients, strict=True):
            gradient.add_(more)
        return Part(self.loss + other.loss, self.terms + other.terms, self.gradients)


class Gradients:
    """Differentiates the training loss by a model's parameters.

    `batch_size` is what the sum over the images is divided by; `autocast` surrounds the network alone, and `precise` is
    the type that sums over many images are kept in.
    """

    def __init__(
        self,
        vae: VAE,
        batch_size: float,
        autocast: Callable[[], AbstractContextManager[object]],
        precise: torch.dtype,
    ) -> None:
        self._vae = vae
        self._weights: dict[str, Tensor] = dict(vae.named_parameters())
        self._batch_size = batch_size
        self._autocast = autocast
        self._precise = precise

    def __call__(self, images: Tensor, noise: Tensor, beta: Tensor, scale: Tensor | None) -> Part:
        """Of images `(B, C, H, W)` in [0, 1] and standard normal noise `(B, L)`, `beta` being `()`.

        The gradients are those of the loss times `scale`, `()`, where there is one.
        """
        with self._autocast():
            output = self._vae(images, noise)
        loss, terms = self._loss(output, images, beta)
        gradients = torch.autograd.grad(loss if scale is None else loss * scale, list(self._weights.values()))
        return Part(loss.detach(), terms, gradients)

    def functional(self, images: Tensor, noise: Tensor, beta: Tensor, scale: Tensor | None) -> Part:
        """The same, in the form that can be compiled."""

        def scaled_loss(weights: dict[str, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            with self._autocast():
                output = functional_call(self._vae, weights, (images, noise))
            loss, terms = self._loss(output, images, beta)
            return loss if scale is None else loss * scale, (loss, terms)

        gradients, (_, (loss, terms)) = grad_and_value(scaled_loss, has_aux=True)(self._weights)
        return Part(loss, terms, tuple(gradients[name] for name in self._weights))

    def _loss(self, output: VAEOutput, images: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
        terms = objective.elbo_terms(output, images)
        sums = torch.stack([term.detach().sum(dtype=self._precise) for term in terms])
        return objective.training_loss(terms, beta, self._batch_size), sums


class Compiled(Generic[P, R]):
    """A function as a compiled program; where that can't be made, what `otherwise` does.

    The program is made for the sizes of the tensors that it is called with. All else that the function reads must stay
    as it is, and tensors that it finds elsewhere may change in nothing but their values.
    """

    def __init__(self, function: Callable[P, R], otherwise: Callable[P, R]) -> None:
        # It warns where torch was built for CUDA and there is no GPU.
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
        # Else it would look at everything that the function has ever touched, at every call: a tenth of a small step.
        self._program: Callable[P, R] | None = torch.compile(
            function,
            fullgraph=True,
            dynamic=False,
            options={"guard_filter_fn": torch.compiler.keep_tensor_guards_unsafe},
        )
        self._otherwise = otherwise

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        if self._program is not None:
            try:
                with torch.no_grad():
                    return self._program(*args, **kwargs)
            except Exception as error:  # whatever the compiler, or the one that it calls, has to say
                reason = str(error).strip().partition("\n")[0]
                logger.warning("the step can't be compiled (%s: %s) and runs as it is", type(error).__name__, reason)
                self._program = None
        return self._otherwise(*args, **kwargs)
