"""The sigma of a likelihood from which a run starts."""

import logging
from dataclasses import replace

from vae_dist.config import ObjectiveConfig
from vae_dist.data.deviation import deviation
from vae_dist.data.source import Source
from vae_dist.models.likelihoods import LikelihoodKind, LocationScaleKind

logger = logging.getLogger(__name__)

LEAST = 0.01  # training images may be equal, and a fitted sigma can't start from 0


def with_sigma(objective: ObjectiveConfig, likelihood: LikelihoodKind, training: Source) -> ObjectiveConfig:
    """Return the objective with its sigma. If it is null, a fitted one starts from the training images' deviation."""
    if objective.sigma is not None:
        return objective
    if objective.sigma_kind == "fixed":
        return replace(objective, sigma=1.0)
    order = likelihood.error_order if isinstance(likelihood, LocationScaleKind) else None
    sigma = float(f"{max(deviation(training, order or 2), LEAST):.4g}")
    logger.info("sigma starts at %g, the deviation of the training images from their mean", sigma)
    return replace(objective, sigma=sigma)
