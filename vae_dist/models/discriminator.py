"""A discriminator of patches, which tells images from reconstructions. B batch, C, H, W image, h, w patches."""

from itertools import pairwise

import torch
from torch import Tensor, nn

from vae_dist.config import FirstStageConfig
from vae_dist.errors import UserError
from vae_dist.models.norms import group_norm
from vae_dist.models.tensors import Shape, at_least_float32

MOST_WIDER = 8  # times the first layer's channels
SLOPE = 0.2  # of the leaky ReLU below 0
DEVIATION = 0.02  # of the initial weights


class PatchDiscriminator(nn.Module):
    """The PatchGAN of Isola et al. (2017) with GroupNorm: images `(B, C, H, W)` in [-1, 1] to logits `(B, h, w)`.

    Their BatchNorm would make a step depend on how a batch is split over processes and micro-batches. Logits are
    float32 at least.
    """

    def __init__(self, image_channels: int, channels: int, layers: int) -> None:
        super().__init__()
        sizes = [channels * min(2**layer, MOST_WIDER) for layer in range(layers + 1)]
        modules: list[nn.Module] = [nn.Conv2d(image_channels, sizes[0], 4, stride=2, padding=1), nn.LeakyReLU(SLOPE)]
        for number, (before, after) in enumerate(pairwise(sizes), 1):
            stride = 2 if number < layers else 1
            modules += [
                nn.Conv2d(before, after, 4, stride=stride, padding=1, bias=False),
                group_norm(after),
                nn.LeakyReLU(SLOPE),
            ]
        self.layers = nn.Sequential(*modules, nn.Conv2d(sizes[-1], 1, 4, padding=1))
        for module in self.layers:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0, DEVIATION)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        return at_least_float32(self.layers(images)).squeeze(1)


def check_size(options: FirstStageConfig, image_shape: Shape) -> None:
    """Raise UserError for images `(C, H, W)` that the config's discriminator, if it has one, can't take."""
    least = least_side(options.discriminator_layers)
    if options.adversarial_weight and min(image_shape[1:]) < least:
        raise UserError(
            f"a discriminator of first_stage.discriminator_layers={options.discriminator_layers} takes images of at "
            f"least {least} x {least}: use fewer layers"
        )


def least_side(layers: int) -> int:
    """Return the smallest side of an image that a discriminator of that many layers takes."""
    return 3 * 2**layers  # two convolutions of stride 1 come after the halvings, each one smaller


def hinge(real: Tensor, fake: Tensor) -> Tensor:
    """Return the discriminator's hinge loss (Lim and Ye 2017) of each image from logits `(B, h, w)`: `(B,)`."""
    return 0.5 * (_mean(torch.relu(1 - real)) + _mean(torch.relu(1 + fake)))


def adversarial_loss(fake: Tensor) -> Tensor:
    """Return the autoencoder's adversarial loss of each image from logits `(B, h, w)`: `(B,)`."""
    return -_mean(fake)


def accuracy(real: Tensor, fake: Tensor) -> Tensor:
    """Return the fraction of an image's patches, real and reconstructed, that are classified correctly: `(B,)`."""
    return 0.5 * (_mean((real > 0).float()) + _mean((fake < 0).float()))


def _mean(values: Tensor) -> Tensor:
    return values.flatten(1).mean(1)
