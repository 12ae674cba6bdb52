"""The objective: ELBO terms per image, and the training loss.

All values are nats per image, summed over an image's pixels and latents and never averaged over them. B batch, N images
of a set, K importance samples, L latents, C, H, W image.
"""

import math
from typing import NamedTuple

from torch import Tensor

from vae_dist.models.distributions import DiagonalGaussian, at_least_float32
from vae_dist.models.vae import VAE, VAEOutput

ACTIVE_VARIANCE = 0.01  # of Burda et al. (2016), section 5.2


class ElboTerms(NamedTuple):
    """The two terms of the negative ELBO, one value per image."""

    reconstruction: Tensor  # (B,), -log p(x|z) of one sample of z
    kl: Tensor  # (B,), KL(q(z|x) || p(z)), at least 0

    @property
    def negative_elbo(self) -> Tensor:
        """The reported bound `(B,)`: beta is 1 here, whatever weight the training loss gives the KL."""
        return self.reconstruction + self.kl

    def metrics(self, prefix: str) -> dict[str, float]:
        """The means over the images, by name; empty without images."""
        if len(self.kl) == 0:
            return {}
        return {
            f"{prefix}/negative_elbo": self.negative_elbo.mean().item(),
            f"{prefix}/reconstruction": self.reconstruction.mean().item(),
            f"{prefix}/kl": self.kl.mean().item(),
        }


def elbo_terms(output: VAEOutput, images: Tensor) -> ElboTerms:
    """Return the ELBO terms of images `(B, C, H, W)`, in float32 at least (Kingma and Welling 2013, equation 10)."""
    return ElboTerms(
        reconstruction=-output.likelihood.log_prob(at_least_float32(images)),
        kl=output.posterior.kl().sum(1),
    )


def log_weights(vae: VAE, posterior: DiagonalGaussian, images: Tensor, noise: Tensor) -> Tensor:
    """Log importance weights log p(x, z) - log q(z|x) of K latents per image: `(K, B)`, in float32 at least.

    Latents are drawn from the posterior `(B, L)` of images `(B, C, H, W)` with noise `(K, B, L)`. The logarithm of an
    image's mean weight is on average at most log p(x), and rises to it with K (Burda et al. 2016, equation 8).
    """
    likelihood = vae.decode(posterior.sample(noise).flatten(0, 1))
    log_likelihood = likelihood.log_prob(at_least_float32(images).repeat(len(noise), 1, 1, 1))
    return log_likelihood.unflatten(0, noise.shape[:2]) + posterior.log_prior_ratio(noise)


def active_units(posterior_means: Tensor) -> int:
    """Count the latents whose posterior mean `(N, L)` has a variance over the images above 0.01.

    Measure and threshold are those of Burda et al. (2016), section 5.2.
    """
    return int((posterior_means.double().var(0, correction=0) > ACTIVE_VARIANCE).sum())


def bits_per_dimension(nats: float, dimensions: int) -> float:
    """Convert nats per image to bits per dimension; an image has `dimensions` pixel values."""
    return nats / (dimensions * math.log(2))


def training_loss(terms: ElboTerms, beta: float | Tensor, batch_size: float) -> Tensor:
    """Sum reconstruction + beta KL over these images and divide by `batch_size`: `()`, nats.

    Beta weighs the KL as in Higgins et al. (2017). The losses of a batch's shards and micro-batches add up to the
    batch mean.
    """
    return (terms.reconstruction + beta * terms.kl).sum() / batch_size
