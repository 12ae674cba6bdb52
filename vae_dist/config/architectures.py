"""Options of the networks: a dataclass per architecture, by name.

A new architecture is a dataclass and an entry of ARCHITECTURES here, and a file of its name in `vae_dist/models/`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from vae_dist.config.fields import option
from vae_dist.errors import UserError


@dataclass
class ModelConfig:
    """The options that every architecture has."""

    architecture: str = option("mlp", "networks of encoder and decoder; each architecture has options of its own")
    prior: str = option("standard_normal", "distribution of the latents: standard_normal")
    conditional: bool = option(False, "give the labels to encoder and decoder, so that samples can be drawn by class")

    def check(self) -> None:
        """Raise UserError for options that no VAE can have."""

    def weights_at_least(self, image_shape: Sequence[int]) -> int:
        """Return a lower bound of the number of weights of a VAE of images `(C, H, W)`."""
        return 0

    def latents(self, image_shape: Sequence[int]) -> int:
        """Return the number of latents L of an image `(C, H, W)`."""
        raise NotImplementedError

    def summary(self) -> str:
        """Return the architecture and its sizes in a few words: `mlp 400`."""
        return self.architecture


@dataclass
class MLPConfig(ModelConfig):
    architecture: str = "mlp"
    latent_dim: int = option(40, "number of latents", at_least=1)
    hidden_dims: list[int] = option([400], "sizes of the encoder's hidden layers; the decoder mirrors them", at_least=1)

    def weights_at_least(self, image_shape: Sequence[int]) -> int:
        # The encoder and the decoder each have a matrix between two successive sizes.
        sizes = [math.prod(image_shape), *self.hidden_dims, self.latent_dim]
        return 2 * sum(inputs * outputs for inputs, outputs in pairwise(sizes))

    def latents(self, image_shape: Sequence[int]) -> int:
        return self.latent_dim

    def summary(self) -> str:
        return " ".join(["mlp", "-".join(map(str, self.hidden_dims))]).rstrip()


@dataclass
class ConvConfig(ModelConfig):
    architecture: str = "conv"
    channels: list[int] = option(
        [32, 64, 128],
        "channels at each resolution from the image's to the latents'; each after the first halves height and width",
        at_least=1,
    )
    patch: int = option(
        1,
        "side of the squares of pixels that become channels before the first convolution; 2 or 4 makes a step cheaper, "
        "for images of 64 pixels and more",
        at_least=1,
    )
    blocks: int = option(1, "residual blocks at each resolution", at_least=1)
    latent_channels: int = option(4, "channels of the latents", at_least=1)

    def check(self) -> None:
        if not self.channels:
            raise UserError("model.channels needs at least one number: the channels at the image's resolution")

    def weights_at_least(self, image_shape: Sequence[int]) -> int:
        # A residual block has a 3x3 convolution or more; another layer may mix the channels of one pixel alone.
        sizes = [image_shape[0] * self.patch**2, *self.channels, self.latent_channels]
        blocks = self.blocks * sum(9 * size**2 for size in self.channels)
        return 2 * (blocks + sum(inputs * outputs for inputs, outputs in pairwise(sizes)))

    def latents(self, image_shape: Sequence[int]) -> int:
        _, height, width = image_shape
        factor = self.patch * 2 ** (len(self.channels) - 1)
        return self.latent_channels * (height // factor) * (width // factor)

    def summary(self) -> str:
        channels = "-".join(map(str, self.channels))
        return f"conv {channels}" if self.patch == 1 else f"conv {self.patch}x{self.patch} {channels}"


ARCHITECTURES: dict[str, type[ModelConfig]] = {
    "mlp": MLPConfig,
    "conv": ConvConfig,
}
