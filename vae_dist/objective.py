"""The objective: ELBO terms per image, the loss that training minimises, and what moves with the step.

All values are nats per image, summed over an image's pixels and latents and never averaged over them. B is the batch.
"""

import math
from typing import NamedTuple

from torch import Tensor

from vae_dist.config import Config
from vae_dist.model.distributions import at_least_float32
from vae_dist.model.vae import VAEOutput


class ElboTerms(NamedTuple):
    """The two terms of the negative ELBO, one value per image."""

    reconstruction: Tensor  # (B,), -log p(x|z) of one sample of z
    kl: Tensor  # (B,), KL(q(z|x) || p(z)), at least 0

    @property
    def negative_elbo(self) -> Tensor:
        """`(B,)`. The reported bound: beta is 1 whatever the training loss weighs the KL with."""
        return self.reconstruction + self.kl


def elbo_terms(output: VAEOutput, images: Tensor) -> ElboTerms:
    """The ELBO terms of images `(B, C, H, W)`, in float32 at least (Kingma and Welling 2013, equation 10)."""
    return ElboTerms(
        reconstruction=-output.likelihood.log_prob(at_least_float32(images)),
        kl=output.posterior.kl().sum(1),
    )


def training_loss(terms: ElboTerms, beta: float | Tensor, batch_size: float) -> Tensor:
    """The sum over these images of reconstruction + beta KL, as a share of a batch of `batch_size`: `()`, nats.

    Beta weighs the KL as in Higgins et al. (2017). Shares of a batch add up to the batch's mean.
    """
    return (terms.reconstruction + beta * terms.kl).sum() / batch_size


class Schedule(NamedTuple):
    """What moves with the step."""

    learning_rate: float
    beta: float


def schedule(config: Config, step: int, last_step: int) -> Schedule:
    """The values for step `step`, which is 0 for the first; `last_step` is the run's number of steps."""
    return Schedule(_learning_rate(config, step, last_step), _beta(config, step))


def _learning_rate(config: Config, step: int, last_step: int) -> float:
    optim = config.optim
    if step < optim.warmup_steps:
        return optim.learning_rate * (step + 1) / optim.warmup_steps
    if optim.schedule == "constant":
        return optim.learning_rate
    decay_steps = max((optim.decay_steps or last_step) - optim.warmup_steps, 1)
    progress = min((step - optim.warmup_steps) / decay_steps, 1.0)
    return optim.learning_rate * 0.5 * (1.0 + math.cos(math.pi * progress))


def _beta(config: Config, step: int) -> float:
    objective = config.objective
    if step < objective.beta_warmup_steps:
        return objective.beta * step / objective.beta_warmup_steps
    return objective.beta
