"""From images to latents and back with a trained VAE, bitwise the same on any number of processes.

Images and latents are cut into fixed blocks, dealt to the processes, and gathered in order. Every process calls these.
Shapes: N images, L latents, K components, C, H, W image.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from vae_dist.config import Config
from vae_dist.data import datasets
from vae_dist.data.datasets import Images
from vae_dist.distributed.runtime import World
from vae_dist.errors import UserError
from vae_dist.models.distributions import DiagonalGaussian
from vae_dist.models.vae import VAE
from vae_dist.plan import FIXED_SEED, Stream, bernoulli_pixels, standard_normal
from vae_dist.runs import console
from vae_dist.views import mixture
from vae_dist.views.mixture import Mixture

DYNAMIC_STEP = 2  # of the fixed binarisation: 0 is the validation images', 1 the test images'


@dataclass(frozen=True)
class Trained:
    """A trained VAE, the data that it can be shown, and the processes that compute."""

    vae: VAE
    config: Config
    world: World

    @cached_property
    def test(self) -> Images:
        """The test images. Raises UserError where they can't be had."""
        return self.world.main_first(lambda: datasets.load_test(self.config.data))

    @cached_property
    def posterior(self) -> DiagonalGaussian:
        """The posteriors of all test images, `(N, L)` each."""
        return self.encode(self.test.pixels)

    @cached_property
    def kl(self) -> Tensor:
        """Each latent's KL from the prior, averaged over the test images: `(L,)` float64, nats."""
        return self.posterior.kl().double().mean(0)

    def encode(self, pixels: Tensor) -> DiagonalGaussian:
        """The posteriors of images `(N, C, H, W)` uint8."""

        def parameters(block: range) -> Tensor:
            return torch.cat(self._posterior(pixels[block.start : block.stop]), dim=1)

        return DiagonalGaussian(*self.in_blocks("encoding", len(pixels), parameters).chunk(2, dim=1))

    def decode(self, latents: Tensor) -> Tensor:
        """The means of p(x|z) of latents `(N, L)`: `(N, C, H, W)` float32 in [0, 1]."""
        parameter = next(self.vae.parameters())

        def means(block: range) -> Tensor:
            chosen = latents[block.start : block.stop].to(parameter.device, parameter.dtype)
            return self.vae.decode(chosen).mean.float()

        return self.in_blocks("decoding", len(latents), means)

    def training_draws(self) -> Tensor:
        """One draw from the posterior of each training image, the same in every run: `(N, L)`.

        Together they are draws from the aggregate posterior, which is what the decoder has learned to decode. The
        posteriors' means alone are not: where a latent tells little, they all lie near 0.
        """
        training, _ = self.world.main_first(lambda: datasets.load_training(self.config.data))

        def draws(block: range) -> Tensor:
            pixels = training.pixels[block.start : block.stop]
            if self.config.data.binarize == "dynamic":
                pixels = bernoulli_pixels(pixels, FIXED_SEED, DYNAMIC_STEP, block)
            noise = standard_normal(FIXED_SEED, Stream.MIXTURE_POINTS, 0, block, self.vae.latent_dim)
            posterior = self._posterior(pixels)
            return posterior.sample(noise.to(posterior.mean.device, posterior.mean.dtype))

        return self.in_blocks("encoding the training images", len(training.labels), draws)

    def fit_mixture(self, components: int) -> Mixture:
        """The mixture of `components` Gaussians that fits the training images' posteriors."""
        points = self.training_draws()
        if components > len(points):
            raise UserError(f"sample.mixture_components={components} is more than the {len(points)} training images")

        def fit() -> Mixture:
            with console.progress("fitting the mixture", mixture.MAX_STEPS, is_main=self.world.is_main) as progress:
                return mixture.fit(points, components, progress).mixture

        return self.world.on_main(fit)

    def in_blocks(self, title: str, count: int, compute: Callable[[range], Tensor]) -> Tensor:
        """The rows that `compute` finds for the blocks of `range(count)`, `(count, ...)` on the CPU."""
        blocks = self.world.chunks(count, self.config.evaluate.batch_size)
        mine = sum(len(block) for block in blocks)
        values = []
        with console.progress(title, mine, is_main=self.world.is_main) as progress, torch.inference_mode():
            for block in blocks:
                values.append(compute(block).cpu())
                progress(len(block))
        return self.world.gather_rows(blocks, values, count)

    def _posterior(self, pixels: Tensor) -> DiagonalGaussian:
        parameter = next(self.vae.parameters())
        return self.vae.encode(datasets.to_unit(pixels.to(parameter.device), parameter.dtype))


class Components(NamedTuple):
    """The directions in which points spread most."""

    coordinates: Tensor  # (N, K) of each point
    directions: Tensor  # (K, L), orthonormal
    shares: Tensor  # (K,) of the points' variance, falling


def principal_components(points: Tensor, count: int) -> Components:
    """Points `(N, L)` seen along their first `count` principal components, in float64 by an exact SVD.

    A direction's sign is the one that makes its largest entry positive, so that a picture is never mirrored.
    """
    centred = points.double() - points.double().mean(0)
    _, spreads, directions = torch.linalg.svd(centred, full_matrices=False)
    directions = directions[:count]
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    directions = directions * largest.sign()
    return Components(centred @ directions.T, directions, spreads[:count].square() / spreads.square().sum())
