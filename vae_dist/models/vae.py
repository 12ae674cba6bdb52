"""The variational autoencoder: an encoder, a decoder, and the distributions of their outputs (Kingma and Welling 2013).

Shapes: B batch, L latents, C, H, W image.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vae_dist.data.datasets import to_unit
from vae_dist.models.distributions import DiagonalGaussian, Likelihood


class VAEOutput(NamedTuple):
    """The distributions that the objective is computed from."""

    posterior: DiagonalGaussian  # q(z|x), (B, L)
    likelihood: Likelihood  # p(x|z), (B, C, H, W)


class VAE(nn.Module):
    """A VAE whose noise is an argument: it draws no random numbers itself.

    `encoder` maps images `(B, C, H, W)` to posterior parameters `(B, 2 L)`; `decoder` maps latents `(B, L)` to the
    parameters of the likelihood `(B, C, H, W)`. No layer may mix images of a batch (BatchNorm does), or a run would
    depend on the number of its processes.
    """

    def __init__(
        self, encoder: nn.Module, decoder: nn.Module, likelihood: Callable[[Tensor], Likelihood], latent_dim: int
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.likelihood = likelihood
        self.latent_dim = latent_dim

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def to_input(self, pixels: Tensor) -> Tensor:
        """Convert uint8 pixels on any device to images in [0, 1], on this model's device and in its dtype."""
        return to_unit(pixels.to(self.device), self.dtype)

    def encode(self, images: Tensor) -> DiagonalGaussian:
        """Return the posterior of images `(B, C, H, W)` in [0, 1]."""
        return DiagonalGaussian.from_network(self.encoder(images))

    def decode(self, latents: Tensor) -> Likelihood:
        """Return the likelihood of images given latents `(B, L)`."""
        return self.likelihood(self.decoder(latents))

    def forward(self, images: Tensor, noise: Tensor) -> VAEOutput:
        """Encode images `(B, C, H, W)`, sample latents with standard normal noise `(B, L)`, decode."""
        posterior = self.encode(images)
        return VAEOutput(posterior, self.decode(posterior.sample(noise)))
