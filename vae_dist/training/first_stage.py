"""Parts of the recipe `autoencoder`: its options, its other networks, and what it takes from one step to the next."""

import logging
from pathlib import Path

import torch
from torch import Tensor, nn

from vae_dist.config import Config, FirstStageConfig
from vae_dist.distributed.world import World
from vae_dist.errors import UserError
from vae_dist.features.files import load
from vae_dist.features.lpips import LPIPS
from vae_dist.models.discriminator import PatchDiscriminator
from vae_dist.models.likelihoods import LocationScaleKind, likelihood_kind
from vae_dist.models.tensors import seeded
from vae_dist.models.vae import VAE

logger = logging.getLogger(__name__)

NO_FP16 = "train.recipe=autoencoder is for fp32, tf32, bf16 and fp64: use train.precision=bf16"
SMALLEST_NORM = 1e-6  # of the adversarial gradient, in the ratio of the adaptive weight


class Memory(nn.Module):
    """What a step takes from the one before, and counts: in a checkpoint, so that a resumed run continues with it."""

    norms: Tensor  # (2,), at the last layer: of the gradient without the adversarial term, and of that term's
    spikes: Tensor  # (), updates that were skipped for their norm

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("norms", torch.ones(2))
        self.register_buffer("spikes", torch.zeros(()))


def load_perceptual(config: Config, device: torch.device) -> LPIPS | None:
    """Load the network of LPIPS if it has a weight. Raises UserError."""
    options = config.first_stage
    if not options.perceptual_weight:
        return None
    if options.perceptual is None:
        raise UserError(
            "first_stage.perceptual_weight needs first_stage.perceptual, the file that `vae-dist fetch-weights "
            "lpips_vgg` writes"
        )
    return load(LPIPS, Path(options.perceptual), "first_stage.perceptual", device).network


def make_discriminator(vae: VAE, config: Config, world: World) -> PatchDiscriminator:
    """Make the discriminator; its weights depend on the seed alone."""
    options = config.first_stage
    with seeded(config.seed + 1):
        discriminator = PatchDiscriminator(
            vae.image_shape[0], options.discriminator_channels, options.discriminator_layers
        )
    return discriminator.to(world.device, vae.dtype)


def check_options(config: Config) -> None:
    """Raise UserError for options that this recipe can't use."""
    options, objective = config.first_stage, config.objective
    recipe = "train.recipe=autoencoder"
    if not isinstance(likelihood_kind(objective), LocationScaleKind):
        raise UserError(f"{recipe} needs objective.reconstruction=laplace or gaussian, whose decoder gives locations")
    if config.train.precision == "fp16":
        raise UserError(NO_FP16)
    if objective.bound != "elbo" or objective.samples != 1 or objective.beta != 1 or objective.beta_warmup_steps:
        raise UserError(
            f"{recipe} takes one sample of the ELBO and weighs its KL by first_stage.kl_weight: leave out "
            "objective.bound, samples, beta and beta_warmup_steps"
        )
    fittable = ("fixed", "learned") if options.reconstruction == "likelihood" else ("fixed",)
    if objective.sigma_kind not in fittable:
        raise UserError(
            f"{recipe} fits no sigma with first_stage.reconstruction={options.reconstruction} and "
            f"objective.sigma_kind={objective.sigma_kind}: use first_stage.reconstruction=likelihood with "
            "objective.sigma_kind=learned, or objective.sigma_kind=fixed"
        )
    load_perceptual(config, torch.device("cpu"))
    if options.adaptive and not options.adversarial_weight:
        raise UserError("first_stage.adaptive needs first_stage.adversarial_weight above 0")


def warn_of_idle_terms(options: FirstStageConfig, last_step: int) -> None:
    """Log options of terms that never act in a run of so many steps."""
    if options.perceptual is not None and not options.perceptual_weight:
        logger.warning("LPIPS is not trained on: first_stage.perceptual is given, and perceptual_weight is 0")
    scheduled = options.adversarial_start or options.adversarial_ramp or options.head_start
    if scheduled and not options.adversarial_weight:
        logger.warning("there is no discriminator: its schedule is given, and first_stage.adversarial_weight is 0")
    if options.adversarial_weight and options.adversarial_start >= last_step:
        logger.warning(
            "the loss never has its adversarial term: first_stage.adversarial_start=%d, and the run has %d steps",
            options.adversarial_start,
            last_step,
        )
