"""Encode images and decode latents with a trained VAE, bitwise the same on any number of processes.

Images and latents are cut into fixed chunks, dealt to the processes, and gathered in order. Every process calls these.
Shapes: N images, L latents, K components, C, H, W image.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from vae_dist.config import Config
from vae_dist.data import datasets
from vae_dist.data.source import Source, read
from vae_dist.distributed.world import World
from vae_dist.errors import UserError
from vae_dist.models.posteriors import DiagonalGaussian
from vae_dist.models.vae import VAE
from vae_dist.plan import FIXED_SEED, Stream, bernoulli_pixels, standard_normal
from vae_dist.runs.progress import progress
from vae_dist.views import mixture
from vae_dist.views.mixture import Mixture

DYNAMIC_STEP = 2  # of the fixed binarisation: 0 is the validation images', 1 the test images'


@dataclass(frozen=True)
class TrainedVAE:
    """A trained VAE with its data sets, and the processes that compute."""

    vae: VAE
    config: Config
    world: World

    @cached_property
    def test(self) -> Source:
        """The test images. Raises UserError if they can't be loaded."""
        return self.world.main_first(lambda: datasets.load_test(self.config.data))

    @cached_property
    def posterior(self) -> DiagonalGaussian:
        """The posteriors of all test images: mean and log-variance `(N, L)`."""
        return self.encode(range(self.test.info.count))

    @cached_property
    def kl(self) -> Tensor:
        """Each latent's KL from the prior, averaged over the test images: `(L,)` float64, nats."""
        return self.posterior.kl_from_standard_normal().double().mean(0)

    @property
    def by_kl(self) -> Tensor:
        """The latents by falling KL: `(L,)` int64."""
        return self.kl.argsort(descending=True, stable=True)

    def encode(self, indices: Sequence[int]) -> DiagonalGaussian:
        """Return the posteriors of these test images: mean and log-variance `(N, L)`."""

        def parameters(chunk: range) -> Tensor:
            pixels = read(self.test, indices[chunk.start : chunk.stop])
            return torch.cat(self.vae.infer(self.vae.to_input(pixels)), dim=1)

        return DiagonalGaussian(*self.in_chunks("encoding", len(indices), parameters).chunk(2, dim=1))

    def decode(self, latents: Tensor) -> Tensor:
        """Return the means of p(x|z) of latents `(N, L)`: `(N, C, H, W)` float32 in [0, 1]."""

        def means(chunk: range) -> Tensor:
            part = latents[chunk.start : chunk.stop].to(self.vae.device, self.vae.dtype)
            return self.vae.decode(part).mean.float()

        return self.in_chunks("decoding", len(latents), means)

    def training_draws(self) -> Tensor:
        """Draw once from the posterior of each training image, the same in every run: `(N, L)`.

        Together they are a sample of the aggregate posterior, which the decoder has learned to decode. The posterior
        means are not: those of a latent that carries little information all lie near 0.
        """
        training, _ = self.world.main_first(lambda: datasets.load_training(self.config.data))

        def draws(chunk: range) -> Tensor:
            pixels = read(training, chunk)
            if self.config.data.binarize == "dynamic":
                pixels = bernoulli_pixels(pixels, FIXED_SEED, DYNAMIC_STEP, chunk)
            noise = standard_normal(FIXED_SEED, Stream.MIXTURE_POINTS, 0, chunk, self.vae.latent_dim)
            posterior = self.vae.infer(self.vae.to_input(pixels))
            return posterior.sample(noise.to(posterior.mean.device, posterior.mean.dtype))

        return self.in_chunks("encoding the training images", training.info.count, draws)

    def fit_mixture(self, components: int) -> Mixture:
        """Fit a mixture of `components` Gaussians to the training images' posteriors."""
        points = self.training_draws()
        if components > len(points):
            raise UserError(f"sample.mixture_components={components} is more than the {len(points)} training images")

        def fit() -> Mixture:
            with progress("fitting the mixture", mixture.MAX_STEPS, is_main=self.world.is_main) as advance:
                return mixture.fit(points, components, advance).mixture

        return self.world.on_main(fit)

    def in_chunks(self, title: str, count: int, compute: Callable[[range], Tensor]) -> Tensor:
        """Call `compute` with each chunk of `range(count)`, and return its rows in order: `(count, ...)` on the CPU."""
        chunks = self.world.chunks(count, self.config.evaluate.batch_size)
        values = []
        with (
            progress(title, sum(map(len, chunks)), is_main=self.world.is_main) as advance,
            torch.inference_mode(),
        ):
            for chunk in chunks:
                values.append(compute(chunk).cpu())
                advance(len(chunk))
        return self.world.gather_rows(chunks, values, count)


class Components(NamedTuple):
    """The first K principal components of N points."""

    coordinates: Tensor  # (N, K), of each point
    directions: Tensor  # (K, L), orthonormal
    variance_ratios: Tensor  # (K,), the part of the points' variance that each explains, falling


def principal_components(points: Tensor, count: int) -> Components:
    """Return the first `count` principal components of points `(N, L)`, in float64 by an exact SVD.

    Each direction's largest entry is positive, so that a picture is never mirrored.
    """
    centred = points.double() - points.double().mean(0)
    _, spreads, directions = torch.linalg.svd(centred, full_matrices=False)
    directions = directions[:count]
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    directions = directions * largest.sign()
    return Components(centred @ directions.T, directions, spreads[:count].square() / spreads.square().sum())
