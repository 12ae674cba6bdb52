"""Options of the recipe `autoencoder`: the first stage of latent diffusion."""

from dataclasses import dataclass
from typing import Literal

from vae_dist.config.fields import option


@dataclass
class FirstStageConfig:
    """Losses are means per pixel value; pixels lie in [0, 1]."""

    reconstruction: Literal["l1", "l2", "likelihood"] = option(
        "l1",
        "l1: absolute error; l2: squared error; likelihood: -log p(x|z) of objective.reconstruction, whose sigma may "
        "be learned; each is a mean per pixel value",
    )
    kl_weight: float = option(1e-6, "weight of the KL, a mean per latent dimension", at_least=0)
    perceptual_weight: float = option(0.0, "weight of LPIPS; 0: none", at_least=0)
    perceptual: str | None = option(None, "file of the network of LPIPS")
    adversarial_weight: float = option(
        0.0,
        "weight of the adversarial loss, minus the mean logit of reconstructions; 0: no discriminator",
        at_least=0,
    )
    adaptive: bool = option(
        False,
        "multiply adversarial_weight by the ratio of two gradient norms at the decoder's last layer in the step "
        "before, that of the other terms by the adversarial one (Esser et al. 2021)",
    )
    adaptive_most: float = option(1e4, "largest ratio of these norms", above=0)
    adversarial_start: int = option(0, "first step whose loss has the adversarial term", at_least=0)
    adversarial_ramp: int = option(0, "steps over which the adversarial weight rises linearly from 0", at_least=0)
    head_start: int = option(0, "steps that the discriminator is trained before adversarial_start", at_least=0)
    discriminator_channels: int = option(64, "channels of the discriminator's first layer", at_least=1)
    discriminator_layers: int = option(3, "its layers that halve the resolution", at_least=1, at_most=8)
    discriminator_rate: float = option(1.0, "its learning rate, as a multiple of optim.learning_rate", above=0)
    skip_norm: float | None = option(
        None, "skip updates whose gradient of the autoencoder has a larger norm; null: none", above=0
    )
