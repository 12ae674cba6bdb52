"""The sigma of a likelihood from which a run starts."""

import logging
from dataclasses import replace

import torch

from vae_dist.config import ObjectiveConfig
from vae_dist.data.source import Source, read
from vae_dist.models.likelihoods import LikelihoodKind, LocationScaleKind

logger = logging.getLogger(__name__)

LEAST = 0.01  # training images may be equal, and a fitted sigma can't start from 0
MOST_IMAGES = 1024  # of the deviation
_MOST_NUMBERS = 2**28  # pixel values that are read
_AT_ONCE = 2**22  # pixel values in float64


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


def deviation(source: Source, order: int) -> float:
    """Return (mean |x - m|^order)^(1/order) over pixel values x in [0, 1], where m is the mean image.

    Order 2 gives the root mean square, 1 the mean absolute deviation. The images are the first 1,024 of the source, or
    fewer if they are large; it has at least one.
    """
    numbers = torch.Size(source.info.image_shape).numel()
    count = min(source.info.count, MOST_IMAGES, max(_MOST_NUMBERS // numbers, 1))
    pixels = read(source, range(count)).flatten(1)
    chunks = pixels.split(max(_AT_ONCE // count, 1), dim=1)  # of pixel values: each chunk has all images
    total = 0.0
    for chunk in chunks:
        values = chunk.double() / 255
        total += (values - values.mean(0)).abs().pow(order).sum().item()
    return float((total / pixels.numel()) ** (1 / order))
