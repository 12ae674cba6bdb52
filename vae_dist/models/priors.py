"""Priors p(z) by name. A new prior is a class here and a line in PRIORS. K draws, B batch, L latents, G groups."""

import math
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from vae_dist.config import ModelConfig
from vae_dist.models.posteriors import DiagonalGaussian, Posterior
from vae_dist.models.tensors import running_sums

START = 0.1  # deviation of the components' initial means; from 1, an MLP ended 6 nats above one with N(0, I)


class Prior(nn.Module):
    """The prior of flat codes. Its parameters, if it has any, are learned with the networks.

    A subclass defines `log_prob` and, unless it is drawn by the identity, `forward` and `numbers`. One that has a
    closed-form KL overrides `kl`.
    """

    factorises: ClassVar[bool] = False  # whether `kl` has a group for each latent

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        self.numbers = latent_dim  # normal numbers that a draw needs

    @classmethod
    def build(cls, latent_dim: int, options: ModelConfig) -> Self:
        """Make the prior of a model with these options."""
        return cls(latent_dim)

    def forward(self, noise: Tensor) -> Tensor:
        """Draw codes `(B, L)` from standard normal noise `(B, numbers)`. Noise of zeros gives a typical code."""
        return noise

    def log_prob(self, latents: Tensor) -> Tensor:
        """log p(z) of latents `(K, B, L)`: `(K, B)`, nats."""
        raise NotImplementedError

    def log_ratio(self, posterior: Posterior, latents: Tensor, noise: Tensor, log_prior: Tensor) -> Tensor:
        """log p(z) - log q(z|x) of the latents `(K, B, L)` that the posterior draws with `noise`: `(K, B)`, nats.

        `log_prior` is their `log_prob`.
        """
        return log_prior - posterior.log_prob(latents)

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

    def log_ratio(self, posterior: Posterior, latents: Tensor, noise: Tensor, log_prior: Tensor) -> Tensor:
        """The constants cancel, and the noise is z's distance from the mean in standard deviations."""
        if type(posterior) is not DiagonalGaussian:
            return super().log_ratio(posterior, latents, noise, log_prior)
        return 0.5 * (posterior.log_variance + noise.square() - latents.square()).sum(-1)

    def kl(self, posterior: Posterior, latents: Tensor, log_ratio: Tensor) -> Tensor:
        if type(posterior) is not DiagonalGaussian:
            return super().kl(posterior, latents, log_ratio)
        return posterior.kl_from_standard_normal().expand(len(latents), -1, -1)


class Mixture(Prior):
    """A mixture of normal distributions with diagonal covariances, whose parameters are learned with the networks.

    Tomczak and Welling (2018) compare it with N(0, I) and with their own prior. The last number of a draw chooses the
    component. It starts near N(0, I). C components.
    """

    def __init__(self, latent_dim: int, components: int) -> None:
        super().__init__(latent_dim)
        self.numbers = latent_dim + 1
        self.logits = nn.Parameter(torch.zeros(components))
        self.means = nn.Parameter(START * torch.randn(components, latent_dim))
        self.log_scales = nn.Parameter(torch.zeros(components, latent_dim))

    @classmethod
    def build(cls, latent_dim: int, options: ModelConfig) -> Self:
        return cls(latent_dim, options.prior_components)

    def forward(self, noise: Tensor) -> Tensor:
        ends = running_sums(self.logits.softmax(0), 0)
        uniform = torch.special.ndtr(noise[:, -1:]) * ends[-1]
        chosen = (uniform >= ends).sum(1).clamp(max=len(ends) - 1)
        return self.means[chosen] + self.log_scales[chosen].exp() * noise[:, :-1]

    def log_prob(self, latents: Tensor) -> Tensor:
        distances = (latents.unsqueeze(-2) - self.means) * (-self.log_scales).exp()  # (K, B, C, L)
        densities = -(0.5 * distances.square() + self.log_scales).sum(-1)
        constant = 0.5 * latents.shape[-1] * math.log(2 * math.pi)
        return (self.logits.log_softmax(0) + densities).logsumexp(-1) - constant


# Name in a config -> p(z).
PRIORS: dict[str, type[Prior]] = {"standard_normal": StandardNormal, "mixture": Mixture}


def build_prior(latent_dim: int, options: ModelConfig) -> Prior:
    """Make the prior that the options name, of so many latents."""
    return PRIORS[options.prior].build(latent_dim, options)
