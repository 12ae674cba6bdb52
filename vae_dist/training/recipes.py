"""Recipes by name (`train.recipe`): what an optimizer step does to which networks.

b is the size of the shard, C, H, W image.
"""

import logging
from collections import Counter
from collections.abc import Callable
from typing import Protocol

from torch import Tensor, nn

from vae_dist.config import Config, FirstStageConfig, ModelConfig, ObjectiveConfig
from vae_dist.data.batches import Batch
from vae_dist.distributed.world import World
from vae_dist.errors import UserError
from vae_dist.models.likelihoods import BernoulliPixels, LocationScaleKind, likelihood_kind
from vae_dist.models.vae import VAE
from vae_dist.training.autoencoder_recipe import AutoencoderRecipe
from vae_dist.training.first_stage import check_options, warn_of_idle_terms
from vae_dist.training.guard import COUNTS
from vae_dist.training.loss_scaler import LossScaler
from vae_dist.training.optimizers import Optimizer
from vae_dist.training.vae_recipe import VAERecipe

logger = logging.getLogger(__name__)


class Recipe(Protocol):
    """Networks, their optimizers, and what a step does to them. A new recipe is a class and a line in RECIPES.

    A checkpoint holds networks and optimizers under their names; of frozen networks it holds a hash, and the recipe
    loads them itself. `totals` names what `step` adds to: sums of values of images, norms, and the guard's COUNTS.
    """

    networks: dict[str, nn.Module]
    optimizers: dict[str, Optimizer]
    frozen: dict[str, nn.Module]
    noise_shape: tuple[int, ...]  # standard normal numbers per image
    image_values: tuple[str, ...]  # names of values that are summed over images
    norms: tuple[str, ...]  # names of values that are equal on every process
    captures: bool  # whether a step can be captured as a CUDA graph; autograd's own backward can't
    criterion: str  # the metric of a validation by which a checkpoint is the best

    @property
    def tensors(self) -> list[Tensor]:
        """Everything that `step` changes but the totals: weights, moments, counts of updates, moving averages."""

    @property
    def model(self) -> VAE:
        """The VAE that is validated and drawn: the moving average if there is one."""

    def values(self, step: int) -> dict[str, float]:
        """The values that move with the step, such as the learning rate, of step `step`, from 0."""

    def step(self, batch: Batch, values: Tensor, totals: Tensor) -> None:
        """Change networks, optimizers and totals in place, from tensors alone and without a host sync.

        The values are those of the step, in their order.
        """


# Name in a config -> the recipe of a VAE, its config, the processes, the loss scaler, and the run's last step.
RECIPES: dict[str, Callable[[VAE, Config, World, LossScaler, int], Recipe]] = {
    "autoencoder": AutoencoderRecipe,
    "vae": VAERecipe,
}


def check_recipe(config: Config) -> None:
    """Raise UserError if the config names an unknown recipe, or has options of another one."""
    if config.train.recipe not in RECIPES:
        raise UserError(f"unknown train.recipe {config.train.recipe!r}; choose from {', '.join(sorted(RECIPES))}")
    if config.train.recipe == "vae" and config.first_stage != FirstStageConfig():
        raise UserError("the options of first_stage are for train.recipe=autoencoder: add it, or leave them out")
    if config.train.recipe == "autoencoder":
        check_options(config)


def warn_of_idle_options(config: Config, last_step: int) -> None:
    """Log options of the model and the loss that never act in a run of so many steps."""
    _warn_of_idle_likelihood(config.objective)
    if config.model.prior == "standard_normal" and config.model.prior_components != ModelConfig().prior_components:
        logger.warning("model.prior_components has no effect with model.prior=standard_normal")
    warn_of_idle_terms(config.first_stage, last_step)


def _warn_of_idle_likelihood(objective: ObjectiveConfig) -> None:
    kind, default = likelihood_kind(objective), ObjectiveConfig()
    has_no_mixture = isinstance(kind, BernoulliPixels | LocationScaleKind)
    idle = {
        "sigma": not kind.has_scale and objective.sigma not in (None, 1.0),  # 1 is resolved from null
        "sigma_rate": objective.sigma_kind != "learned" and objective.sigma_rate != default.sigma_rate,
        "mixtures": has_no_mixture and objective.mixtures != default.mixtures,
    }
    for key in (key for key, is_idle in idle.items() if is_idle):
        logger.warning(
            "objective.%s has no effect with objective.reconstruction=%s and objective.sigma_kind=%s",
            key, objective.reconstruction, objective.sigma_kind,
        )  # fmt: skip


def totals_of(recipe: Recipe) -> tuple[str, ...]:
    """The names of what a recipe's step adds to its totals.

    Raises ValueError if two values of a record have one name, of which one would be lost.
    """
    names = (*recipe.image_values, *recipe.norms, *COUNTS)
    logged = Counter([*names, *recipe.values(0), "images_per_second"])
    if twice := [name for name, count in logged.items() if count > 1]:
        raise ValueError(f"a training logs a {twice[0]} of its own: give the objective's or the recipe's another name")
    return names
