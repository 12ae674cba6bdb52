"""The tutorial's networks: fully connected layers with ReLU between them. B batch, L latents, C, H, W image."""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

TRANSPOSED_ROWS = 256  # a batch of at most so many rows is small


class Linear(nn.Linear):
    """`nn.Linear`, which on a CPU computes a small batch as its transpose: the same numbers, laid out by columns.

    MKL then shares a product among its threads by images and not by features, which comes out more even: a training
    step of 32 images takes 12% less, of 128 images 5%, of 512 the same, and of 1,024 more.
    """

    def forward(self, input: Tensor) -> Tensor:
        if input.device.type == "cpu" and input.dim() == 2 and len(input) <= TRANSPOSED_ROWS:
            return torch.addmm(self.bias.unsqueeze(1), self.weight, input.t()).t()
        return super().forward(input)


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
        layers += [Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
