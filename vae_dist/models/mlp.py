"""The tutorial's networks: fully connected layers with ReLU between them. B batch, L latents, C, H, W image."""

import itertools
import math
from collections.abc import Sequence

from torch import Tensor, nn

from vae_dist.config import MLPConfig
from vae_dist.models.likelihoods import LikelihoodKind
from vae_dist.models.priors import PRIORS
from vae_dist.models.tensors import Shape
from vae_dist.models.transposed import Layers
from vae_dist.models.vae import VAE


class MLP(VAE):
    """An MLP on the pixels of images of one size."""

    worth_compiling = True

    def __init__(self, options: MLPConfig, image_shape: Shape, likelihood: LikelihoodKind) -> None:
        super().__init__(image_shape, likelihood)
        self._latent_dim = options.latent_dim
        self.encoder = MLPEncoder(image_shape, options.hidden_dims, options.latent_dim)
        self.decoder = MLPDecoder(likelihood.output_shape(image_shape), options.hidden_dims, options.latent_dim)
        self.p_z = PRIORS[options.prior](options.latent_dim)

    def latent_shapes(self, image_shape: Shape) -> tuple[Shape, ...]:
        if image_shape != self.image_shape:
            raise ValueError(f"this model takes images of {list(self.image_shape)} alone, not {list(image_shape)}")
        return ((self._latent_dim,),)


build = MLP


class MLPEncoder(nn.Module):
    """Images `(B, C, H, W)` to posterior parameters `(B, 2 L)`."""

    def __init__(self, image_shape: Shape, hidden_dims: Sequence[int], latent_dim: int) -> None:
        super().__init__()
        self.layers = _mlp([math.prod(image_shape), *hidden_dims, 2 * latent_dim])

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images.flatten(1))


class MLPDecoder(nn.Module):
    """Latents `(B, L)` to the likelihood's parameters, through the encoder's sizes in reverse."""

    def __init__(self, output_shape: Shape, hidden_dims: Sequence[int], latent_dim: int) -> None:
        super().__init__()
        self.layers = _mlp([latent_dim, *reversed(hidden_dims), math.prod(output_shape)])
        self.output_shape = output_shape

    def forward(self, latents: Tensor) -> Tensor:
        return self.layers(latents).unflatten(1, self.output_shape)


def _mlp(sizes: Sequence[int]) -> Layers:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return Layers(*layers[:-1])
