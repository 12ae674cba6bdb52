"""A convolutional VAE: residual blocks at each resolution, and latents that are an image of their own.

In a conditional VAE each residual block adds a learned function of the embedded label to its channels. So every
resolution is told the class, at the cost of one number per channel. Planes joined to the image would tell its first
layer alone, and would cost 32 channels at the largest resolution.

B batch, C, H, W image, c channels, h, w height and width at a resolution.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn

from vae_dist.config import ConvConfig
from vae_dist.models.labels import embedding_size
from vae_dist.models.likelihoods import LikelihoodKind
from vae_dist.models.priors import PRIORS
from vae_dist.models.tensors import Shape
from vae_dist.models.vae import VAE

MOST_GROUPS = 8  # of GroupNorm
LEAST_CHANNELS = 4  # of a group: alone, a channel would lose its mean
FIRST_CONVOLUTION = 2  # of a residual block, among its layers
OUTPUT_SCALE = 0.1  # of the last layers' initial weights


class ConvVAE(VAE):
    """A convolutional VAE for images of any size that `patch` times 2^(number of channels - 1) divides."""

    def __init__(self, options: ConvConfig, image_shape: Shape, likelihood: LikelihoodKind, classes: int = 0) -> None:
        super().__init__(image_shape, likelihood, classes)
        self._factor = options.patch * 2 ** (len(options.channels) - 1)
        self._latent_channels = options.latent_channels
        latents, outputs = options.latent_channels, likelihood.output_shape(image_shape)[0]
        patch, pixels = options.patch, options.patch**2
        label = embedding_size(classes)
        self.encoder = encoder(image_shape[0] * pixels, options.channels, options.blocks, 2 * latents, label)
        self.decoder = decoder(latents, options.channels[::-1], options.blocks, outputs * pixels, label)
        if patch > 1:  # a square of pixels becomes channels, and back (Shi et al. 2016, "sub-pixel convolution")
            self.encoder.insert(0, nn.PixelUnshuffle(patch))
            self.decoder.append(nn.PixelShuffle(patch))
        self.p_z = PRIORS[options.prior](self.latent_dim)

    def latent_shapes(self, image_shape: Shape) -> tuple[Shape, ...]:
        channels, height, width = image_shape
        if channels != self.image_shape[0]:
            raise ValueError(f"images for this model have channels={self.image_shape[0]}, not {channels}")
        factor = self._factor
        if height % factor or width % factor:
            raise ValueError(
                f"images of {height} x {width} can't be encoded: use sizes that {factor} divides, fewer model.channels "
                "or a smaller model.patch"
            )
        return ((self._latent_channels, height // factor, width // factor),)


build = ConvVAE


def encoder(inputs: int, channels: list[int], blocks: int, outputs: int, label: int = 0) -> "Network":
    """Return the network from images `(B, inputs, H, W)` to `(B, outputs, h, w)` at the last resolution.

    `label` is the size of an embedded label, 0 without labels.
    """
    depth = len(channels)
    layers: list[nn.Module] = [convolution(inputs, channels[0]), *residual_blocks(channels[0], blocks, depth, label)]
    for before, after in pairwise(channels):
        layers += [convolution(before, after, stride=2), *residual_blocks(after, blocks, depth, label)]
    return Network(*layers, *output_layers(channels[-1], outputs))


def decoder(inputs: int, channels: list[int], blocks: int, outputs: int, label: int = 0) -> "Network":
    """Return the network from latents `(B, inputs, h, w)` to `(B, outputs, H, W)`.

    It repeats pixels and convolves them: a transposed convolution draws checkerboards (Odena et al. 2016).
    """
    depth = len(channels)
    layers: list[nn.Module] = [convolution(inputs, channels[0]), *residual_blocks(channels[0], blocks, depth, label)]
    for before, after in pairwise(channels):
        layers += [nn.Upsample(scale_factor=2), convolution(before, after)]
        layers += residual_blocks(after, blocks, depth, label)
    return Network(*layers, *output_layers(channels[-1], outputs))


class Network(nn.Sequential):
    """Layers in a row, whose residual blocks also take the embedded labels, if any."""

    def forward(self, input: Tensor, embedded: Tensor | None = None) -> Tensor:
        for layer in self:
            input = layer(input, embedded) if isinstance(layer, ResidualBlock) else layer(input)
        return input


class ResidualBlock(nn.Module):
    """Adds to its input `(B, c, h, w)` what two convolutions make of it, activated before each (He et al. 2016).

    Embedded labels `(B, label)` are added to the channels between the convolutions, as time steps are in Ho et al.
    (2020).
    """

    def __init__(self, channels: int, scale: float, label: int = 0) -> None:
        """`scale` is that of the last convolution's initial weights."""
        super().__init__()
        self.branch = nn.Sequential(
            *activation(channels), convolution(channels, channels),
            *activation(channels), scaled(convolution(channels, channels), scale),
        )  # fmt: skip

        self.label = nn.Linear(label, channels) if label else None

    def forward(self, x: Tensor, embedded: Tensor | None = None) -> Tensor:
        branch = x
        for index, layer in enumerate(self.branch):
            branch = layer(branch)
            if index == FIRST_CONVOLUTION and self.label is not None:
                branch = branch + self.label(embedded)[:, :, None, None]
        return x + branch


def residual_blocks(channels: int, count: int, resolutions: int, label: int) -> list[nn.Module]:
    """Return the blocks of one resolution.

    Their initial weights are scaled by one over the root of the number of all blocks, so that the variance of their sum
    does not grow with the depth (Child 2021).
    """
    return [ResidualBlock(channels, (count * resolutions) ** -0.5, label) for _ in range(count)]


def output_layers(channels: int, outputs: int) -> list[nn.Module]:
    """Return the last layers, whose output starts near 0: a posterior near the prior, pixels near grey."""
    return [*activation(channels), scaled(convolution(channels, outputs), OUTPUT_SCALE)]


def activation(channels: int) -> list[nn.Module]:
    """Return GroupNorm (Wu and He 2018), which normalises each image for itself, and SiLU."""
    return [nn.GroupNorm(norm_groups(channels), channels), nn.SiLU()]


def norm_groups(channels: int) -> int:
    """Return the number of GroupNorm's groups: the largest divisor of the channels within the limits above."""
    most = min(MOST_GROUPS, max(channels // LEAST_CHANNELS, 1))
    return max(groups for groups in range(1, most + 1) if channels % groups == 0)


def convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel_size=3, stride=stride, padding=1)


@torch.no_grad()
def scaled(layer: nn.Conv2d, scale: float) -> nn.Conv2d:
    """Multiply a layer's weights and biases in place."""
    for parameter in layer.parameters():
        parameter.mul_(scale)
    return layer
