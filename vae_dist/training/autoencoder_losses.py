"""The losses of the recipe `autoencoder`. b is the size of the shard, C, H, W image, h, w patches.

They are means per pixel value of images in [0, 1], per latent, and per patch.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.func import functional_call, grad

from vae_dist.config import FirstStageConfig
from vae_dist.features.lpips import LPIPS
from vae_dist.models.discriminator import PatchDiscriminator, accuracy, adversarial_loss, hinge
from vae_dist.models.likelihoods import LocationScaleKind
from vae_dist.models.scales import LearnedScale
from vae_dist.models.tensors import at_least_float32
from vae_dist.models.vae import VAE
from vae_dist.training.differentiate import Autocast, Losses


class AutoencoderLosses:
    """The losses of an autoencoder: reconstruction, KL, LPIPS, and the adversarial loss."""

    def __init__(
        self,
        vae: VAE,
        options: FirstStageConfig,
        perceptual: LPIPS | None,
        discriminator: PatchDiscriminator | None,
        autocast: Autocast,
    ) -> None:
        self._options = options
        self._latents = vae.latent_dim
        kind = vae.likelihood
        assert isinstance(kind, LocationScaleKind)
        self._distribution = kind.distribution
        self._fits_sigma = kind.scale.is_fitted
        self._learns_sigma = isinstance(kind.scale, LearnedScale)
        self._perceptual = perceptual
        self._discriminator = discriminator
        self._autocast = autocast
        self.names: tuple[str, ...] = (
            "loss", "reconstruction_error", "kl_per_latent",
            *(["sigma"] if self._fits_sigma else []),
            *(["perceptual"] if perceptual is not None else []),
            *(["adversarial"] if discriminator is not None else []),
        )  # fmt: skip

    def __call__(
        self, vae: Callable[..., Any], images: Tensor, noise: Tensor, labels: Tensor, strength: Tensor, *others: Tensor
    ) -> Losses:
        """Return the losses of images `(b, C, H, W)` in [0, 1], and reconstructions in [-1, 1] as output.

        `strength` `()` weighs the adversarial loss, `others` are the discriminator's weights. With an adaptive weight
        the probe is the adversarial loss.
        """
        inference = vae(images, noise, labels)
        location = at_least_float32(inference.likelihood.location)
        error = self._error(inference.likelihood, location, images)
        kl = inference.kl[0].sum(1) / self._latents
        loss = error + self._options.kl_weight * kl
        values = {"loss": loss, "reconstruction_error": error, "kl_per_latent": kl}
        if self._fits_sigma:
            values["sigma"] = inference.likelihood.sigma.to(error.dtype).expand(len(images))
        fakes = 2 * location - 1
        if self._perceptual is not None:
            values["perceptual"] = self._perceptual(coloured(fakes), coloured(2 * images - 1))
            values["loss"] = loss = loss + self._options.perceptual_weight * values["perceptual"]
        if self._discriminator is None:
            return Losses(values, (fakes,))
        values["adversarial"] = adversarial = self._adversarial_loss(fakes, others)
        values["loss"] = loss + strength * adversarial
        return Losses(values, (fakes,), adversarial if self._options.adaptive else None)

    def _error(self, likelihood: Any, location: Tensor, images: Tensor) -> Tensor:
        """The reconstruction term of each image `(b,)`."""
        if self._options.reconstruction == "likelihood":
            numbers = images[0].numel()
            if self._learns_sigma:
                likelihood = self._distribution(likelihood.location, LearnedScale.of_a_mean(likelihood.sigma, numbers))
            return -likelihood.log_prob(images) / numbers
        distance = location - images
        return (distance.abs() if self._options.reconstruction == "l1" else distance.square()).flatten(1).mean(1)

    def _adversarial_loss(self, fakes: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
        """The adversarial loss `(b,)` of reconstructions, with a gradient by them that is computed right here.

        However often the loss is differentiated, the discriminator's backward pass runs once. Its weights are
        constants: no gradient of theirs is computed, and none can leak into its own step.
        """
        discriminator = self._discriminator
        assert discriminator is not None
        names = [name for name, _ in discriminator.named_parameters()]
        constants = dict(zip(names, (weight.detach() for weight in weights), strict=True))

        def sum_and_losses(images: Tensor) -> tuple[Tensor, Tensor]:
            with self._autocast():
                logits = functional_call(discriminator, constants, images)
            losses = adversarial_loss(logits)
            return losses.sum(), losses

        slope, losses = grad(sum_and_losses, has_aux=True)(fakes.detach())
        return losses.detach() + ((fakes - fakes.detach()) * slope.detach()).flatten(1).sum(1)


def discriminator_losses(discriminator: Callable[..., Tensor], images: Tensor, fakes: Tensor) -> Losses:
    """Return the discriminator's losses on images and detached reconstructions `(b, C, H, W)` in [-1, 1]."""
    real, fake = discriminator(images), discriminator(fakes)
    means = {"logits_real": real.flatten(1).mean(1), "logits_fake": fake.flatten(1).mean(1)}
    return Losses({"loss": hinge(real, fake), **means, "discriminator_accuracy": accuracy(real, fake)})


def coloured(images: Tensor) -> Tensor:
    """Return images with three channels: grey ones three times."""
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
