"""Options of the training objective, of its optimizer and of the weights' moving average."""

from dataclasses import dataclass
from typing import Literal

from vae_dist.config.fields import option

# Below it a sigma that is fitted would describe the rounding of pixels to 8 bits, whose error has this standard
# deviation, and a density of rounded values could rise without limit.
SIGMA_FLOOR = 1 / (255 * 12**0.5)


@dataclass
class ObjectiveConfig:
    reconstruction: str = option(
        "bernoulli",
        "likelihood of the pixels: bernoulli, gaussian, laplace, or discretized_logistic_mixture, the probability of "
        "8-bit values (Salimans et al. 2017)",
    )
    sigma: float | None = option(
        None,
        "standard deviation of the gaussian likelihood, scale b of the laplace one, exp(-|x-m|/b)/2b; pixels lie in "
        "[0, 1]; if it is fitted, the value to start from; null: 1 if it is fixed, otherwise the deviation of training "
        "images from their mean, found when the run starts",
        above=0,
    )
    sigma_kind: Literal["fixed", "learned", "optimal"] = option(
        "fixed",
        "fixed: objective.sigma; learned: a parameter; optimal: in training the most likely sigma of each batch, which "
        "costs a second forward, elsewhere a moving average of it (Rybkin et al. 2021)",
    )
    sigma_rate: float = option(
        10.0, "learning rate of a learned sigma's logarithm, as a multiple of optim.learning_rate", above=0, at_most=1e4
    )
    mixtures: int = option(10, "logistics in the mixture of discretized_logistic_mixture", at_least=1, at_most=256)
    bound: str = option(
        "elbo",
        "bound on log p(x) that the training maximizes: elbo; iwae, the importance-weighted bound of Burda et al. "
        "(2016), which needs objective.beta=1; or iwae_dreg, the same with the doubly reparameterised gradient of "
        "Tucker et al. (2019)",
    )
    samples: int = option(
        1, "posterior samples per image in a training step: elbo averages over them, iwae takes their bound", at_least=1
    )
    beta: float = option(
        1.0, "weight of the KL in the training loss; the reported ELBO always has a weight of 1", at_least=0
    )
    beta_warmup_steps: int = option(0, "optimizer steps over which beta rises linearly from 0", at_least=0)

    @property
    def is_importance_weighted(self) -> bool:
        """Whether the bound is that of Burda et al. (2016), which depends on the number of samples."""
        return self.bound in ("iwae", "iwae_dreg")


@dataclass
class OptimConfig:
    optimizer: Literal["adam", "adamw", "adamax"] = option(
        "adam", "adam or adamax (Kingma and Ba 2015), or adamw (Loshchilov and Hutter 2019)"
    )
    betas: list[float] = option(
        [0.9, 0.999], "decay of the moving averages of the gradient and of its square", at_least=0, below=1
    )
    eps: float = option(1e-8, "number added to the divisor of an update, so that it is never 0", above=0)
    weight_decay: float = option(0.0, "L2 penalty in adam and adamax; decoupled weight decay in adamw", at_least=0)
    learning_rate: float = option(1e-3, "learning rate after the warm-up", above=0)
    warmup_steps: int = option(0, "optimizer steps over which the learning rate rises linearly from 0", at_least=0)
    schedule: Literal["constant", "cosine", "linear"] = option(
        "constant", "learning rate after the warm-up: constant, or down to 0 by a cosine or linearly"
    )
    decay_steps: int | None = option(
        None, "optimizer step at which cosine or linear reaches 0; null: the run's last", at_least=1
    )
    stages: list[list[float]] | None = option(
        None,
        "learning rate from a step on, as [[step, rate], ...]: steps rise from 0, and the warm-up rises to the rate "
        "that follows it; replaces optim.learning_rate and optim.schedule",
        at_least=0,
    )
    max_grad_norm: float | None = option(None, "clip the gradient to this norm; null: no clipping", above=0)


@dataclass
class EmaConfig:
    decay: float | None = option(
        None,
        "decay of an exponential moving average of the weights, which is validated, evaluated and sampled; null: none",
        at_least=0,
        below=1,
    )
