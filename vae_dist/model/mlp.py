"""The tutorial's networks: fully connected layers with ReLU between them. B batch, L latents, C, H, W image."""

import itertools
import math
from collections.abc import Sequence

from torch import Tensor, nn


class MLPEncoder(nn.Module):
    """Images `(B, C, H, W)` to posterior parameters `(B, 2 L)`."""

    def __init__(self, image_shape: Sequence[int], hidden_dims: Sequence[int], latent_dim: int) -> None:
        super().__init__()
        self.layers = _mlp([math.prod(image_shape), *hidden_dims, 2 * latent_dim])

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images.flatten(1))


class MLPDecoder(nn.Module):
    """Latents `(B, L)` to the likelihood's parameters `(B, C, H, W)`, through the encoder's sizes in reverse."""

    def __init__(self, image_shape: Sequence[int], hidden_dims: Sequence[int], latent_dim: int) -> None:
        super().__init__()
        self.layers = _mlp([latent_dim, *reversed(hidden_dims), math.prod(image_shape)])
        self.image_shape = tuple(image_shape)

    def forward(self, latents: Tensor) -> Tensor:
        return self.layers(latents).unflatten(1, self.image_shape)


def _mlp(sizes: Sequence[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
