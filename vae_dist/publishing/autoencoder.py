"""The files that make an export a model of diffusers, with the scaling of its latents from their statistics."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vae_dist.config import AutoencoderKLConfig, Config
from vae_dist.encoding import index
from vae_dist.errors import UserError
from vae_dist.models.autoencoder_kl import network_class
from vae_dist.models.diffusers_files import CONFIG, WEIGHTS, Scaling, diffusers_files
from vae_dist.models.vae import VAE
from vae_dist.runs.checkpoint import Checkpoint
from vae_dist.runs.metrics import is_number

logger = logging.getLogger(__name__)

FORMAT = "diffusers"
FILES = (CONFIG, WEIGHTS)

_MOMENTS = "mean", "standard_deviation"


def check_model(config: Config) -> None:
    """Raise UserError if the config asks for this format of another model, or for a scaling without it."""
    if FORMAT not in config.export.formats:
        if config.export.latents is not None:
            raise UserError("export.latents is for export.formats=[diffusers]")
        return
    if not isinstance(config.model, AutoencoderKLConfig):
        raise UserError(
            f"export.formats=[{FORMAT}] is for model.architecture=autoencoder_kl, and this run's is "
            f"{config.model.architecture}"
        )
    network_class()


def autoencoder_files(vae: VAE, checkpoint: Checkpoint, config: Config, weights: str) -> Mapping[str, bytes]:
    """Return the files by name; none if the config does not ask for them."""
    if FORMAT not in config.export.formats:
        return {}
    return diffusers_files(vae, _scaling(config, checkpoint, weights))


def _scaling(config: Config, checkpoint: Checkpoint, weights: str) -> Scaling:
    """Return the scaling to mean 0 and deviation 1 that the statistics in `export.latents` give."""
    frozen = config.train.freeze == "encoder"
    if config.export.latents is None:
        remedy = (
            "the frozen encoder's latents keep that of model.init_from"
            if frozen
            else "`vae-dist encode` computes it, and export.latents names the folder that it writes"
        )
        logger.info("%s has no scaling_factor: %s", CONFIG, remedy)
        return Scaling()
    if frozen:
        logger.warning(
            "the scaling in %s is that of these images; a diffusion model that was trained on latents of "
            "model.init_from needs the scaling there: leave out export.latents",
            CONFIG,
        )
    path = Path(config.export.latents) / index.INDEX
    values = index.read(path.parent)
    if values is None:
        raise UserError(
            f"export.latents={path.parent} has no {index.INDEX} that can be read: give the folder that `vae-dist "
            "encode` names when it is done"
        )
    request, latents = (_at(values, *keys) for keys in (["request"], ["statistics", "latents"]))
    made_by = _at(request, "checkpoint"), _at(request, "weights")
    if made_by != (checkpoint.manifest.fingerprint, weights):
        raise UserError(
            f"{path} is not of this checkpoint's latents: encode images by it first, and give that folder as "
            "export.latents"
        )
    if config.export.scaling == "factor":
        (mean,), (deviation,) = _moments([[_at(latents, f"overall_{name}")] for name in _MOMENTS], path)
        return Scaling(factor=1 / deviation, shift=mean)
    means, deviations = _moments([_at(latents, name) for name in _MOMENTS], path)
    return Scaling(mean=means, std=deviations)


def _at(values: Any, *keys: str) -> Any:
    for key in keys:
        values = values.get(key) if isinstance(values, dict) else None
    return values


def _moments(values: Sequence[Any], path: Path) -> Sequence[Sequence[float]]:
    """Check the means and the deviations of some latents, and return both."""
    for numbers in values:
        if not isinstance(numbers, list) or not all(is_number(number) for number in numbers):
            raise UserError(f"{path} does not hold the statistics of latents")
    if not all(deviation > 0 for deviation in values[1]):
        raise UserError(f"{path} has latents without deviation, which no scaling brings to 1; leave out export.latents")
    return values
