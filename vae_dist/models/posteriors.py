"""Posteriors q(z|x). K draws, B batch, L latents."""

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol, Self

import torch
from torch import Tensor

from vae_dist.models.tensors import at_least_float32

LOG_VARIANCE_BOUND = 10.0  # exp of it and of its negative are finite in float16 too


def soft_bound(raw: Tensor) -> Tensor:
    """Bound log-variances by a tanh, which is the identity near 0 and, unlike a clamp, has a gradient everywhere."""
    return LOG_VARIANCE_BOUND * torch.tanh(raw / LOG_VARIANCE_BOUND)


class Posterior(Protocol):
    """What `VAE.infer` returns for B images."""

    @property
    def mean(self) -> Tensor:
        """`(B, L)`."""

    @property
    def log_variance(self) -> Tensor:
        """Of each latent by itself: `(B, L)`."""

    def sample(self, noise: Tensor) -> Tensor:
        """Draw latents `(..., B, L)` with standard normal noise `(..., B, L)`."""

    def log_prob(self, latents: Tensor) -> Tensor:
        """log q(z|x) of latents `(..., B, L)`: `(..., B)`, nats."""

    def detached(self) -> Self:
        """The same posterior, through which no gradient flows."""


class DiagonalGaussian(NamedTuple):
    """Independent normal latents."""

    mean: Tensor  # (B, L)
    log_variance: Tensor  # (B, L)

    @classmethod
    def from_network(cls, parameters: Tensor, bound: Callable[[Tensor], Tensor] = soft_bound) -> "DiagonalGaussian":
        """Split a network's output `(B, 2 L)` into means and log-variances, and bound the latter."""
        mean, raw = at_least_float32(parameters).chunk(2, dim=1)
        return cls(mean, bound(raw))

    def sample(self, noise: Tensor) -> Tensor:
        """Reparameterise (Kingma and Welling 2013): latents `(..., B, L)` from standard normal noise `(..., B, L)`."""
        return self.mean + torch.exp(0.5 * self.log_variance) * noise

    def log_prob(self, latents: Tensor) -> Tensor:
        """log q(z|x) of latents `(..., B, L)`: `(..., B)`, nats."""
        squared = (latents - self.mean).square() * torch.exp(-self.log_variance)
        return -0.5 * (squared + self.log_variance + math.log(2 * math.pi)).sum(-1)

    def kl_from_standard_normal(self) -> Tensor:
        """KL(q(z|x) || N(0, I)) per latent `(B, L)`, nats, at least 0 (Kingma and Welling 2013, appendix B)."""
        mean, log_variance = at_least_float32(self.mean), at_least_float32(self.log_variance)
        return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)

    def detached(self) -> "DiagonalGaussian":
        """The same posterior, through which no gradient flows."""
        return DiagonalGaussian(self.mean.detach(), self.log_variance.detach())
