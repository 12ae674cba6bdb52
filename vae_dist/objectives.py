"""Objectives and metrics: values per image, by name.

All values are nats per image, summed over an image's pixels and latents and never averaged over them. A new objective
is a function here and a line in OBJECTIVES. B batch, K draws from each posterior, L latents, C, H, W image.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import Tensor

from vae_dist.config import ObjectiveConfig
from vae_dist.errors import UserError
from vae_dist.models.vae import Inference

ACTIVE_VARIANCE = 0.01  # of Burda et al. (2016), section 5.2


class ElboTerms(NamedTuple):
    """The two terms of the negative ELBO, one value per image, averaged over its draws."""

    reconstruction: Tensor  # (B,), -log p(x|z)
    kl: Tensor  # (B,), KL(q(z|x) || p(z)), at least 0 where it has a closed form

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


def elbo_terms(inference: Inference, images: Tensor) -> ElboTerms:
    """Return the ELBO terms of images `(B, C, H, W)`, in float32 at least (Kingma and Welling 2013, equation 10)."""
    return _terms(inference, inference.log_likelihood(images))


def log_weights(inference: Inference, images: Tensor) -> Tensor:
    """Log importance weights log p(x, z) - log q(z|x) of the K draws: `(K, B)`, in float32 at least.

    The logarithm of an image's mean weight is on average at most log p(x), and rises to it with K (Burda et al. 2016,
    equation 8).
    """
    return inference.log_likelihood(images) + inference.log_ratio


# The values of each image, by name: `(B,)` each, nats. `loss` is the one that is minimised.
Values = dict[str, Tensor]
Objective = Callable[[Inference, Tensor, Tensor], Values]


def elbo(inference: Inference, images: Tensor, beta: Tensor) -> Values:
    """The negative ELBO, whose KL beta `()` weighs as in Higgins et al. (2017), averaged over the K draws."""
    terms = elbo_terms(inference, images)
    return {"loss": terms.reconstruction + beta * terms.kl, "reconstruction": terms.reconstruction, "kl": terms.kl}


def iwae(inference: Inference, images: Tensor, beta: Tensor) -> Values:
    """The negative importance-weighted bound of K draws (Burda et al. 2016, equation 8), and the ELBO's terms."""
    return _importance_weighted(inference, inference.log_likelihood(images), inference.log_ratio)


def iwae_dreg(inference: Inference, images: Tensor, beta: Tensor) -> Values:
    """The values of `iwae`, with the doubly reparameterised gradient (Tucker et al. 2019, equation 8).

    The decoder's gradient is that of `iwae`. The encoder's has the same expectation and less variance: it is taken
    through the draws alone, each weighed by the square of its normalised importance weight. With one draw it is that of
    Roeder et al. (2017). `inference.latents` must be what was decoded: those of a hierarchy are not.
    """
    latents, log_likelihood = inference.latents, inference.log_likelihood(images)
    log_ratio = inference.log_prior - inference.posterior.detached().log_prob(latents)
    if latents.requires_grad:  # their gradient of the bound has each draw's weight as a factor already
        weights = (log_likelihood + log_ratio).detach().softmax(0).unsqueeze(2)
        latents.register_hook(lambda gradient: gradient * weights)
    return _importance_weighted(inference, log_likelihood, log_ratio)


# Name in a config (`objective.bound`) -> the values of each image.
OBJECTIVES: dict[str, Objective] = {"elbo": elbo, "iwae": iwae, "iwae_dreg": iwae_dreg}


def check_bound(config: ObjectiveConfig) -> None:
    """Raise UserError if the config names an unknown bound."""
    if config.bound not in OBJECTIVES:
        raise UserError(f"unknown objective.bound {config.bound!r}; choose from {', '.join(sorted(OBJECTIVES))}")


def with_bound(means: Mapping[str, float]) -> dict[str, float]:
    """Add the negative ELBO to the means of its two terms; nothing if they are not both there."""
    if not {"reconstruction", "kl"} <= means.keys():
        return dict(means)
    bound = {"negative_elbo": means["reconstruction"] + means["kl"]}
    return {name: value for name, value in means.items() if name == "loss"} | bound | dict(means)


def _importance_weighted(inference: Inference, log_likelihood: Tensor, log_ratio: Tensor) -> Values:
    """The bound of K draws with log p(x|z) and log p(z) - log q(z|x) `(K, B)`, and the ELBO's terms."""
    terms, weights = _terms(inference, log_likelihood), log_likelihood + log_ratio
    loss = math.log(len(weights)) - weights.logsumexp(0)
    return {"loss": loss, "reconstruction": terms.reconstruction, "kl": terms.kl}


def _terms(inference: Inference, log_likelihood: Tensor) -> ElboTerms:
    return ElboTerms(reconstruction=_mean(-log_likelihood), kl=_mean(inference.kl.sum(2)))


def _mean(values: Tensor) -> Tensor:
    """The mean over draws `(K, B)`."""
    return values[0] if len(values) == 1 else values.mean(0)


def active_units(variance: Tensor) -> int:
    """Count the latents whose posterior mean has a variance over the images `(L,)` above 0.01.

    Measure and threshold are those of Burda et al. (2016), section 5.2.
    """
    return int((variance > ACTIVE_VARIANCE).sum())


def bits_per_dimension(nats: float, dimensions: int) -> float:
    """Convert nats per image to bits per dimension; an image has `dimensions` pixel values."""
    return nats / (dimensions * math.log(2))
