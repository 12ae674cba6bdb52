"""A convolutional VAE: residual blocks at each resolution, and latents that are an image of their own.

In a conditional VAE each residual block adds a learned function of the embedded label to its channels. So every
resolution is told the class, at the cost of one number per channel. Planes joined to the image would tell its first
layer alone, and would cost 32 channels at the largest resolution.

B batch, C, H, W image, c channels, h, w height and width at a resolution.
"""

from itertools import pairwise

from torch import nn

from vae_dist.config import ConvConfig
from vae_dist.models.blocks import Network, Upsample, branch_scale, convolution, output_layers, residual_blocks
from vae_dist.models.grid import GridVAE
from vae_dist.models.labels import embedding_size
from vae_dist.models.likelihoods import LikelihoodKind
from vae_dist.models.priors import build_prior
from vae_dist.models.tensors import Shape


class ConvVAE(GridVAE):
    """A convolutional VAE for images of any size that `patch` times 2^(number of channels - 1) divides."""

    remedy = "fewer model.channels or a smaller model.patch"

    def __init__(self, options: ConvConfig, image_shape: Shape, likelihood: LikelihoodKind, classes: int = 0) -> None:
        super().__init__(options, image_shape, likelihood, classes)
        latents, outputs = options.latent_channels, likelihood.output_shape(image_shape)[0]
        patch, pixels = options.patch, options.patch**2
        label = embedding_size(classes)
        self.encoder = encoder(image_shape[0] * pixels, options.channels, options.blocks, 2 * latents, label)
        self.decoder = decoder(latents, options.channels[::-1], options.blocks, outputs * pixels, label)
        if patch > 1:  # a square of pixels becomes channels, and back (Shi et al. 2016, "sub-pixel convolution")
            self.encoder.insert(0, nn.PixelUnshuffle(patch))
            self.decoder.append(nn.PixelShuffle(patch))
        self.p_z = build_prior(self.latent_dim, options)


build = ConvVAE


def encoder(inputs: int, channels: list[int], blocks: int, outputs: int, label: int = 0) -> Network:
    """Return the network from images `(B, inputs, H, W)` to `(B, outputs, h, w)` at the last resolution.

    `label` is the size of an embedded label, 0 without labels.
    """
    scale = branch_scale(blocks * len(channels))
    layers: list[nn.Module] = [convolution(inputs, channels[0]), *residual_blocks(channels[0], blocks, scale, label)]
    for before, after in pairwise(channels):
        layers += [convolution(before, after, stride=2), *residual_blocks(after, blocks, scale, label)]
    return Network(*layers, *output_layers(channels[-1], outputs))


def decoder(inputs: int, channels: list[int], blocks: int, outputs: int, label: int = 0) -> Network:
    """Return the network from latents `(B, inputs, h, w)` to `(B, outputs, H, W)`.

    It repeats pixels and convolves them: a transposed convolution draws checkerboards (Odena et al. 2016).
    """
    scale = branch_scale(blocks * len(channels))
    layers: list[nn.Module] = [convolution(inputs, channels[0]), *residual_blocks(channels[0], blocks, scale, label)]
    for before, after in pairwise(channels):
        layers += [Upsample(), convolution(before, after)]
        layers += residual_blocks(after, blocks, scale, label)
    return Network(*layers, *output_layers(channels[-1], outputs))
