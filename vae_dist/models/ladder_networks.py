"""The networks of a hierarchical VAE.

N images, or draws of their codes, L_n latents of a level, C, H, W image, c channels, h, w height and width at a
resolution.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from vae_dist.config import LadderConfig
from vae_dist.models.blocks import (
    Network,
    ResidualBlock,
    Upsample,
    branch_scale,
    convolution,
    output_layers,
    residual_blocks,
    scaled,
)
from vae_dist.models.posteriors import DiagonalGaussian, soft_bound
from vae_dist.models.tensors import Shape, at_least_float32


class Encoder(nn.Module):
    """Images `(B, C, H, W)` to features `(B, c, h, w)` at each resolution, and these to the posterior of each level."""

    def __init__(self, options: LadderConfig, inputs: int, label: int) -> None:
        """`label` is the size of an embedded label, 0 without labels."""
        super().__init__()
        scale = branch_scale(options.blocks * len(options.channels))
        before = inputs * options.patch**2
        self.patches = nn.PixelUnshuffle(options.patch)  # a square of pixels becomes channels (Shi et al. 2016)
        self.resolutions = nn.ModuleList()
        for number, channels in enumerate(options.channels):
            blocks = residual_blocks(channels, options.blocks, scale, label)
            self.resolutions.append(Network(convolution(before, channels, stride=2 if number else 1), *blocks))
            before = channels
        self._resolution_of = [
            number for number in reversed(range(len(options.levels))) for _ in range(options.levels[number])
        ]
        self.posteriors = nn.ModuleList()
        for number in self._resolution_of:
            channels = options.channels[number]
            last = output_layers(channels, 2 * options.latent_channels)
            posterior = Network(convolution(2 * channels, channels), *last)
            posterior.is_inner = True
            self.posteriors.append(posterior)

    def forward(self, images: Tensor, *embedded: Tensor) -> list[Tensor]:
        features = [self.patches(images)]
        for resolution in self.resolutions:
            features.append(resolution(features[-1], *embedded))
        return features[1:]

    def posterior(self, level: int, features: Sequence[Tensor], decoded: Tensor) -> DiagonalGaussian:
        """Return the posterior `(N, L_n)` of a level, given the decoder's features `(N, c, h, w)` before it."""
        joined = torch.cat([features[self._resolution_of[level]], decoded], 1)
        return DiagonalGaussian.from_network(self.posteriors[level](joined).flatten(1))


class Decoder(nn.Module):
    """The codes of each level to the likelihood's parameters `(N, outputs, H, W)`."""

    def __init__(self, options: LadderConfig, outputs: int, label: int) -> None:
        """`label` is the size of an embedded label, 0 without labels."""
        super().__init__()
        scale = branch_scale(options.blocks * (len(options.channels) - 1) + sum(options.levels))
        self.start = nn.Parameter(torch.randn(options.channels[-1], 1, 1))
        self.layers = nn.ModuleList()
        before = None
        for channels, levels in zip(reversed(options.channels), reversed(options.levels), strict=True):
            if before is not None:
                blocks = residual_blocks(channels, options.blocks, scale, label)
                self.layers.append(Network(Upsample(), convolution(before, channels), *blocks))
            self.layers.extend(Level(channels, options.latent_channels, scale, label) for _ in range(levels))
            before = channels
        last = output_layers(options.channels[0], outputs * options.patch**2)
        self.layers.append(Network(*last, nn.PixelShuffle(options.patch)))

    def forward(self, codes_of: Callable[[int, Tensor], Tensor], count: int, sides: Shape, *embedded: Tensor) -> Tensor:
        """Decode `count` codes, of which `codes_of` returns those of a level, `(count, L_n)`.

        It is given the level's number and the features `(count, c, h, w)` before it. `sides` are h and w at the lowest
        resolution.
        """
        features, level = self.start.expand(count, -1, *sides), 0
        for layer in self.layers:
            if isinstance(layer, Level):
                features = layer(features, codes_of(level, features), *embedded)
                level += 1
            else:
                features = layer(features, *embedded)
        return features


class Level(nn.Module):
    """Adds the latents of a level to features `(N, c, h, w)`, and follows them with a residual block.

    Latents are codes `(N, L_n)` times the scale of p(z_n | z_1 ... z_(n-1)), which the features before decide. Their
    location needs no layer of its own: the block before can add it.
    """

    def __init__(self, channels: int, latent_channels: int, scale: float, label: int) -> None:
        """`scale` is that of the initial weights of the last convolution, and of the latents'."""
        super().__init__()
        self.log_variance = Network(*output_layers(channels, latent_channels))
        self.log_variance.is_inner = True
        self.latents = scaled(nn.Conv2d(latent_channels, channels, kernel_size=1), scale)
        self.block = Network(ResidualBlock(channels, channels, scale, label))

    def forward(self, features: Tensor, codes: Tensor, *embedded: Tensor) -> Tensor:
        deviation = torch.exp(0.5 * soft_bound(at_least_float32(self.log_variance(features))))
        output: Tensor = self.block(features + self.latents(deviation * codes.view(deviation.shape)), *embedded)
        return output
