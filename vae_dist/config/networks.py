"""Options of the networks: what all architectures have, and a dataclass for each of this package's own."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal

from vae_dist.config.fields import option
from vae_dist.errors import UserError


@dataclass
class ModelConfig:
    """The options that every architecture has."""

    RECOMPUTES: ClassVar[bool] = False  # whether train.checkpointing applies
    HIERARCHICAL: ClassVar[bool] = False  # whether there are levels of latents that depend on those before
    architecture: str = option("mlp", "networks of encoder and decoder; each architecture has options of its own")
    prior: str = option(
        "standard_normal",
        "distribution of the latents: standard_normal, or mixture, of normal distributions that are learned",
    )
    prior_components: int = option(100, "normal distributions of model.prior=mixture", at_least=1)
    conditional: bool = option(False, "give the labels to encoder and decoder, so that samples can be drawn by class")

    def check(self) -> None:
        """Raise UserError for options that no VAE can have."""

    def weights_at_least(self, image_shape: Sequence[int]) -> int:
        """Return a lower bound of the number of weights of a VAE of images `(C, H, W)`."""
        return 0

    def latents(self, image_shape: Sequence[int]) -> int:
        """Return the number of latents L of an image `(C, H, W)`."""
        raise NotImplementedError

    def resumed(self, stored: "ModelConfig") -> "ModelConfig":
        """Return these options for resuming a run with the options `stored`: with what the run's start has resolved."""
        return self

    def summary(self) -> str:
        """Return the architecture and its sizes in a few words: `mlp 400`."""
        return self.architecture


@dataclass
class MLPConfig(ModelConfig):
    architecture: str = "mlp"
    latent_dim: int = option(40, "number of latents", at_least=1)
    hidden_dims: list[int] = option([400], "sizes of the encoder's hidden layers; the decoder mirrors them", at_least=1)
    activation: Literal["relu", "tanh"] = option("relu", "function between layers; tanh as in Burda et al. (2016)")

    def weights_at_least(self, image_shape: Sequence[int]) -> int:
        # The encoder and the decoder each have a matrix between two successive sizes.
        sizes = [math.prod(image_shape), *self.hidden_dims, self.latent_dim]
        return 2 * sum(inputs * outputs for inputs, outputs in pairwise(sizes))

    def latents(self, image_shape: Sequence[int]) -> int:
        return self.latent_dim

    def summary(self) -> str:
        return " ".join(["mlp", "-".join(map(str, self.hidden_dims))]).rstrip()


class GridConfig(ModelConfig):
    """What the options of convolutional architectures share: each of `channels` has half of the resolution before."""

    RECOMPUTES: ClassVar[bool] = True
    channels: list[int]
    latent_channels: int

    @property
    def factor(self) -> int:
        """What divides the image's height and width at the latents' resolution."""
        return 2 ** (len(self.channels) - 1)

    def check(self) -> None:
        if not self.channels:
            raise UserError("model.channels needs at least one number: the channels at the image's resolution")

    def latents(self, image_shape: Sequence[int]) -> int:
        _, height, width = image_shape
        return self.latent_channels * (height // self.factor) * (width // self.factor)

    def summary(self) -> str:
        return f"{self.architecture} {'-'.join(map(str, self.channels))}"


CHANNELS = "channels at each resolution from the image's to the latents'; each after the first halves height and width"


@dataclass
class ConvConfig(GridConfig):
    architecture: str = "conv"
    channels: list[int] = option([32, 64, 128], CHANNELS, at_least=1)
    patch: int = option(
        1,
        "side of the squares of pixels that become channels before the first convolution; 2 or 4 makes a step cheaper, "
        "for images of 64 pixels and more",
        at_least=1,
    )
    blocks: int = option(1, "residual blocks at each resolution", at_least=1)
    latent_channels: int = option(4, "channels of the latents", at_least=1)

    @property
    def factor(self) -> int:
        return self.patch * super().factor

    def weights_at_least(self, image_shape: Sequence[int]) -> int:
        # A residual block has a 3x3 convolution or more; another layer may mix the channels of one pixel alone.
        sizes = [image_shape[0] * self.patch**2, *self.channels, self.latent_channels]
        blocks = self.blocks * sum(9 * size**2 for size in self.channels)
        return 2 * (blocks + sum(inputs * outputs for inputs, outputs in pairwise(sizes)))

    def summary(self) -> str:
        patch = "" if self.patch == 1 else f" {self.patch}x{self.patch}"
        return f"{self.architecture}{patch} {'-'.join(map(str, self.channels))}"


@dataclass
class LadderConfig(ConvConfig):
    HIERARCHICAL: ClassVar[bool] = True
    architecture: str = "ladder"
    levels: list[int] = option(
        [0, 1, 2],
        "levels of latents at each resolution of model.channels, from the image's down; the last needs at least one",
        at_least=0,
    )

    def check(self) -> None:
        super().check()
        if len(self.levels) != len(self.channels):
            raise UserError(
                f"model.levels={_listed(self.levels)} needs a number for each of model.channels="
                f"{_listed(self.channels)}: how many levels of latents there are at that resolution"
            )
        if not self.levels[-1]:
            raise UserError(
                f"model.levels={_listed(self.levels)} ends with 0: the lowest resolution, the last, needs at least "
                "one level of latents, from which the decoder starts"
            )

    def weights_at_least(self, image_shape: Sequence[int]) -> int:
        pairs = zip(self.levels, self.channels, strict=True)  # a level has two 3x3 convolutions and more
        return super().weights_at_least(image_shape) + sum(18 * levels * size**2 for levels, size in pairs)

    def latents(self, image_shape: Sequence[int]) -> int:
        lowest, last = super().latents(image_shape), len(self.levels) - 1
        return lowest * sum(count * 4 ** (last - number) for number, count in enumerate(self.levels))

    def summary(self) -> str:
        return f"{super().summary()}, levels {'-'.join(map(str, self.levels))}"


ATTENTION = (
    "resolutions with self-attention after each block, by what divides the image's height and width there: 1, 2, 4 and "
    "so on; [8,16]: where they are divided by 8 and by 16"
)


class AttentionConfig(GridConfig):
    """Options of residual networks with self-attention at the resolutions that `attention` names."""

    blocks: int
    attention: list[int]

    @property
    def attention_levels(self) -> list[bool]:
        """Whether there is attention at each resolution, of as many as there are channels."""
        return [2**level in self.attention for level in range(len(self.channels))]

    def check_attention(self) -> None:
        """Raise UserError for a resolution that the model does not have."""
        factors = [2**level for level in range(len(self.channels))]
        if bad := [factor for factor in self.attention if factor not in factors]:
            raise UserError(
                f"model.attention has {bad[0]}, but this model's resolutions are the image's divided by "
                f"{', '.join(map(str, factors))}: use some of these"
            )

    def weights_at_least(self, image_shape: Sequence[int]) -> int:
        # A residual block has two 3x3 convolutions, of which the first may start from fewer channels.
        ends = 9 * (image_shape[0] * self.channels[0] + self.latent_channels * self.channels[-1])
        return 2 * (ends + self.blocks * sum(9 * size**2 for size in self.channels))


@dataclass
class ResNetConfig(AttentionConfig):
    architecture: str = "resnet"
    channels: list[int] = option([32, 64, 128], CHANNELS, at_least=1)
    blocks: int = option(2, "residual blocks at each resolution, one more in the decoder", at_least=1)
    latent_channels: int = option(4, "channels of the latents", at_least=1)
    attention: list[int] = option([], ATTENTION, at_least=1)
    mid_attention: bool = option(True, "self-attention between the two blocks in the middle, next to the latents")

    def check(self) -> None:
        super().check()
        self.check_attention()


def _listed(numbers: Sequence[int]) -> str:
    return f"[{','.join(map(str, numbers))}]"
