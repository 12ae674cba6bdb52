"""The variational autoencoder: an encoder and a decoder, and what joins them (Kingma and Welling 2013).

Shapes: B batch, L latents, C, H, W image.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vae_dist.data.datasets import to_unit
from vae_dist.models.distributions import DiagonalGaussian, Likelihood


class VAEOutput(NamedTuple):
    """All that the objective needs."""

    posterior: DiagonalGaussian  # q(z|x), (B, L)
    likelihood: Likelihood  # p(x|z), (B, C, H, W)


class VAE(nn.Module):
    """Takes its noise as an argument, so that nothing about a step is hidden.

    `encoder` maps images `(B, C, H, W)` to posterior parameters `(B, 2 L)`; `decoder` maps latents `(B, L)` to the
    parameters of the likelihood `(B, C, H, W)`. No layer may look across the batch (BatchNorm does), or a run would
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
        """Images in [0, 1] of uint8 pixels on any device, on this model's device and in its type."""
        return to_unit(pixels.to(self.device), self.dtype)

    def encode(self, images: Tensor) -> DiagonalGaussian:
        """The posterior of images `(B, C, H, W)` in [0, 1]."""
        return DiagonalGaussian.from_network(self.encoder(images))

    def decode(self, latents: Tensor) -> Likelihood:
        """The likelihood of images given latents `(B, L)`."""
        return self.likelihood(self.decoder(latents))

    def forward(self, images: Tensor, noise: Tensor) -> VAEOutput:
        """Encode images `(B, C, H, W)`, sample latents with standard normal noise `(B, L)`, decode."""
        posterior = self.encode(images)
        return VAEOutput(posterior, self.decode(posterior.sample(noise)))
