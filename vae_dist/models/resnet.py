"""A first stage: the residual networks of latent diffusion's KL autoencoder (Esser et al. 2021, Rombach et al. 2022).

They differ from `conv` by channels that change in the blocks, by self-attention, by blocks in the middle, and by a
decoder with one block more at each resolution. B batch, C, H, W image, c channels, h, w height and width at a
resolution.
"""

from itertools import pairwise

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from vae_dist.config import ResNetConfig
from vae_dist.models.blocks import Network, ResidualBlock, Upsample, branch_scale, convolution, output_layers, scaled
from vae_dist.models.grid import GridVAE
from vae_dist.models.labels import embedding_size
from vae_dist.models.likelihoods import LikelihoodKind
from vae_dist.models.norms import group_norm
from vae_dist.models.priors import build_prior
from vae_dist.models.tensors import Shape

HEAD_CHANNELS = 64  # of an attention's head, at most


class ResNetVAE(GridVAE):
    """A VAE of images of any size that 2^(number of channels - 1) divides."""

    def __init__(self, options: ResNetConfig, image_shape: Shape, likelihood: LikelihoodKind, classes: int = 0) -> None:
        super().__init__(options, image_shape, likelihood, classes)
        latents, outputs = options.latent_channels, likelihood.output_shape(image_shape)[0]
        label = embedding_size(classes)
        self.encoder = encoder(options, image_shape[0], 2 * latents, label)
        self.decoder = decoder(options, latents, outputs, label)
        self.p_z = build_prior(self.latent_dim, options)


build = ResNetVAE


def encoder(options: ResNetConfig, inputs: int, outputs: int, label: int = 0) -> Network:
    """Return the network from images `(B, inputs, H, W)` to `(B, outputs, h, w)` at the last resolution.

    `label` is the size of an embedded label, 0 without labels.
    """
    channels, attention = options.channels, options.attention_levels
    parts = Parts(options, options.blocks, label)
    layers: list[nn.Module] = [convolution(inputs, channels[0])]
    for level, (before, after) in enumerate(pairwise([channels[0], *channels])):
        if level:
            layers += [convolution(before, before, stride=2)]
        layers += parts.resolution(before, after, attention[level])
    layers += parts.middle(channels[-1], options.mid_attention)
    return Network(*layers, *output_layers(channels[-1], outputs))


def decoder(options: ResNetConfig, inputs: int, outputs: int, label: int = 0) -> Network:
    """Return the network from latents `(B, inputs, h, w)` to `(B, outputs, H, W)`.

    It has one block more at each resolution than the encoder, and repeats pixels and convolves them.
    """
    channels, attention = options.channels[::-1], options.attention_levels[::-1]
    parts = Parts(options, options.blocks + 1, label)
    layers: list[nn.Module] = [convolution(inputs, channels[0]), *parts.middle(channels[0], options.mid_attention)]
    for level, (before, after) in enumerate(pairwise([channels[0], *channels])):
        if level:
            layers += [Upsample(), convolution(before, before)]
        layers += parts.resolution(before, after, attention[level])
    return Network(*layers, *output_layers(channels[-1], outputs))


class Parts:
    """Makes the blocks of a network, whose branches are residual blocks and attention."""

    def __init__(self, options: ResNetConfig, blocks: int, label: int) -> None:
        """`blocks` is the number of residual blocks at each resolution."""
        self._blocks = blocks
        self._label = label
        branches = blocks * sum(1 + attends for attends in options.attention_levels) + 2 + options.mid_attention
        self._scale = branch_scale(branches)

    def resolution(self, inputs: int, outputs: int, attends: bool) -> list[nn.Module]:
        """Return the blocks of one resolution, each followed by attention if it `attends`."""
        layers: list[nn.Module] = []
        for before in [inputs, *[outputs] * (self._blocks - 1)]:
            layers += [self._block(before, outputs), *self._attention(outputs, attends)]
        return layers

    def middle(self, channels: int, attends: bool) -> list[nn.Module]:
        """Return the two blocks at the latents' resolution, with attention between them if it `attends`."""
        return [self._block(channels, channels), *self._attention(channels, attends), self._block(channels, channels)]

    def _block(self, inputs: int, outputs: int) -> nn.Module:
        return ResidualBlock(inputs, outputs, self._scale, self._label)

    def _attention(self, channels: int, attends: bool) -> list[nn.Module]:
        return [Attention(channels, self._scale)] if attends else []


class Attention(nn.Module):
    """Adds to its input `(B, c, h, w)` the self-attention over its h w pixels (Vaswani et al. 2017)."""

    def __init__(self, channels: int, scale: float) -> None:
        """`scale` is that of the last layer's initial weights."""
        super().__init__()
        self.heads = next(heads for heads in range(1, channels + 1) if _divides(heads, channels))
        self.norm = group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, kernel_size=1, bias=False)  # the keys' would have no effect
        self.output = scaled(nn.Conv2d(channels, channels, kernel_size=1), scale)

    def forward(self, x: Tensor) -> Tensor:
        joined = self.qkv(self.norm(x)).flatten(2)  # (B, 3 c, h w)
        heads = joined.unflatten(1, (3, self.heads, -1)).transpose(3, 4)  # (B, 3, heads, h w, c / heads)
        # Kernels that do not keep the (h w, h w) weights need channels next to each other in memory.
        attended = scaled_dot_product_attention(*heads.contiguous().unbind(1))
        attended = attended.transpose(2, 3).flatten(1, 2).unflatten(2, x.shape[2:])
        return x + self.output(attended)


def _divides(heads: int, channels: int) -> bool:
    return channels % heads == 0 and channels // heads <= HEAD_CHANNELS
