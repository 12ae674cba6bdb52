"""Priors p(z) by name. A new prior is a class here and a line in PRIORS. K draws, B batch, L latents, G groups."""

import math
from collections.abc import Callable
from typing import ClassVar

from torch import Tensor, nn

from vae_dist.models.posteriors import DiagonalGaussian, Posterior


class Prior(nn.Module):
    """The prior of flat codes. Its parameters, if it has any, are learned with the networks.

    A subclass defines `log_prob` and, unless it is drawn by the identity, `forward` and `numbers`. One that has a
    closed-form KL overrides `kl`.
    """

    factorises: ClassVar[bool] = False  # whether `kl` has a group for each latent

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        self.numbers = latent_dim  # normal numbers that a draw needs

    def forward(self, noise: Tensor) -> Tensor:
        """Draw codes `(B, L)` from standard normal noise `(B, numbers)`. Noise of zeros gives a typical code."""
        return noise

    def log_prob(self, latents: Tensor) -> Tensor:
        """log p(z) of latents `(K, B, L)`: `(K, B)`, nats."""
        raise NotImplementedError

    def log_ratio(self, posterior: Posterior, latents: Tensor, noise: Tensor) -> Tensor:
        """log p(z) - log q(z|x) of the latents `(K, B, L)` that the posterior draws with `noise`: `(K, B)`, nats."""
        return self.log_prob(latents) - posterior.log_prob(latents)

    def kl(self, posterior: Posterior, latents: Tensor, log_ratio: Tensor) -> Tensor:
        """KL(q(z|x) || p(z)) by group of latents: `(K, B, G)`, nats.

        By default the one-sample estimate log q(z|x) - log p(z) of each draw, as one group. It can be negative.
        """
        return -log_ratio.unsqueeze(2)


class StandardNormal(Prior):
    """N(0, I). The KL of a DiagonalGaussian has a closed form, a group for each latent."""

    factorises = True

    def log_prob(self, latents: Tensor) -> Tensor:
        return -0.5 * (latents.square() + math.log(2 * math.pi)).sum(-1)

    def log_ratio(self, posterior: Posterior, latents: Tensor, noise: Tensor) -> Tensor:
        """The constants cancel, and the noise is z's distance from the mean in standard deviations."""
        if type(posterior) is not DiagonalGaussian:
            return super().log_ratio(posterior, latents, noise)
        return 0.5 * (posterior.log_variance + noise.square() - latents.square()).sum(-1)

    def kl(self, posterior: Posterior, latents: Tensor, log_ratio: Tensor) -> Tensor:
        if type(posterior) is not DiagonalGaussian:
            return super().kl(posterior, latents, log_ratio)
        return posterior.kl_from_standard_normal().expand(len(latents), -1, -1)


# Name in a config -> p(z) of so many latents.
PRIORS: dict[str, Callable[[int], Prior]] = {"standard_normal": StandardNormal}
