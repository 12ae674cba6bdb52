"""Encode images and decode latents with a trained VAE, bitwise the same on any number of processes.

Images and latents are cut into fixed chunks, dealt to the processes, and gathered in order. Every process calls these.
Shapes: N images, L latents, D draws, K components, C, H, W image.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from vae_dist.config import Config
from vae_dist.data import datasets
from vae_dist.data.chosen import of_split
from vae_dist.data.source import Source
from vae_dist.distributed.world import World
from vae_dist.errors import UserError
from vae_dist.models.inputs import one_draw, read_inputs
from vae_dist.models.labels import in_turn
from vae_dist.models.likelihoods import Likelihood
from vae_dist.models.posteriors import DiagonalGaussian, Posterior
from vae_dist.models.vae import VAE
from vae_dist.plan import FIXED_SEED, Stream, standard_normal
from vae_dist.terminal.progress import progress
from vae_dist.views import mixture, subspace
from vae_dist.views.components import EXACT_LATENTS
from vae_dist.views.mixture import GaussianMixture
from vae_dist.views.subspace import SubspaceMixture

MIXTURE_NUMBERS = 2**28  # of the points that a mixture of more than EXACT_LATENTS latents is fitted to: 1 GiB


def origin(vae: VAE) -> Tensor:
    """The code from which views start: `(L,)`, float32, on the CPU."""
    with torch.inference_mode():
        return vae.prior(torch.zeros(1, vae.prior_numbers, device=vae.device, dtype=vae.dtype))[0].float().cpu()


def prior_draws(vae: VAE, seed: int, rows: range) -> Tensor:
    """Draw codes from the prior, the same in every run: `(len(rows), L)`, float32, on the CPU."""
    noise = standard_normal(seed, Stream.PRIOR, 0, rows, vae.prior_numbers)
    with torch.inference_mode():
        return vae.prior(noise.to(vae.device, vae.dtype)).float().cpu()


def kl_name(vae: VAE) -> str:
    """Name what `TrainedVAE.mean_kl` measures: of a prior that does not factorise, latents have no KL of their own."""
    return "KL" if vae.p_z.factorises else "KL from N(0, I)"


def scale_name(vae: VAE) -> str:
    """Name the distribution whose quantiles and standard deviations views use: N(0, I), whatever the prior is."""
    return "the prior" if vae.p_z.factorises else "N(0, I)"


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
        return self.mean_kl(self.test.info.count, lambda: self.posterior)

    def mean_kl(self, count: int, posterior: Callable[[], DiagonalGaussian]) -> Tensor:
        """Each latent's KL from the prior, averaged over the first `count` test images: `(L,)` float64, nats.

        `posterior` returns what `encode` does for them. In a hierarchy a latent's KL depends on draws of the levels
        before: then it is averaged over one draw from each image's posterior, the draw of an evaluation.
        """
        if not self._kl_depends_on_draws:
            return closed_form_kl(posterior())

        def of_draws(chunk: range) -> Tensor:
            return one_draw(self.vae, read_inputs(self.vae, self.test, chunk), chunk).kl[0]

        kl = self.in_chunks("drawing", count, of_draws)
        return torch.cat([part.double().mean(0) for part in kl.split(EXACT_LATENTS, dim=1)])

    @property
    def _kl_depends_on_draws(self) -> bool:
        """Whether each latent has a KL, but given a draw alone. Every process infers one black image for it."""
        vae, labels = self.vae, in_turn(self.vae.classes, range(1), self.vae.device)
        with torch.inference_mode():
            posterior = vae.infer(vae.to_input(torch.zeros(1, *vae.image_shape, dtype=torch.uint8)), labels)
            if type(posterior) is DiagonalGaussian:
                return False
            noise = torch.zeros(1, 1, vae.latent_dim, dtype=vae.dtype, device=vae.device)
            return vae.sample(posterior, noise, labels=labels).kl.shape[2] == vae.latent_dim

    @property
    def origin(self) -> Tensor:
        """The code from which views start, if no other is given: `(L,)`."""
        return origin(self.vae)

    @property
    def by_kl(self) -> Tensor:
        """The latents by falling KL: `(L,)` int64."""
        return self.kl.argsort(descending=True, stable=True)

    def encode(self, indices: Sequence[int]) -> DiagonalGaussian:
        """Return the posteriors of these test images: mean and log-variance `(N, L)`."""

        def parameters(chunk: range) -> Tensor:
            posterior = self._posterior(indices[chunk.start : chunk.stop])
            return torch.cat([posterior.mean, posterior.log_variance], dim=1)

        return DiagonalGaussian(*self.in_chunks("encoding", len(indices), parameters).chunk(2, dim=1))

    def mean_and_draws(self, indices: Sequence[int], noise: Tensor) -> Tensor:
        """Return the posterior's mean of these test images, then draws with noise `(D, N, L)`: `(N, 1 + D, L)`."""

        def codes(chunk: range) -> Tensor:
            posterior = self._posterior(indices[chunk.start : chunk.stop])
            mean = posterior.mean.unsqueeze(0)
            draws = posterior.sample(noise[:, chunk.start : chunk.stop].to(mean.device, mean.dtype))
            return torch.cat([mean, draws]).transpose(0, 1)

        return self.in_chunks("encoding", len(indices), codes)

    def _posterior(self, indices: Sequence[int]) -> Posterior:
        return self.vae.infer(*read_inputs(self.vae, self.test, indices))

    def decode(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the means of p(x|z) of latents `(N, L)`: `(N, C, H, W)` float32 in [0, 1].

        `labels` are what `VAE.decode` takes, on the CPU: None if the model is not conditional.
        """

        def means(chunk: range) -> Tensor:
            return self._likelihood(latents, labels, chunk).mean.float()

        return self.in_chunks("decoding", len(latents), means)

    def draw_pixels(self, latents: Tensor, labels: Tensor | None, noise_of: Callable[[range, int], Tensor]) -> Tensor:
        """Draw pixels from p(x|z) of latents `(N, L)`, cut to [0, 1]: `(N, C, H, W)` float32.

        `noise_of` returns the standard normal noise of some rows, a number per pixel value: `(len(rows), C H W)`.
        """

        def draws(chunk: range) -> Tensor:
            likelihood = self._likelihood(latents, labels, chunk)
            shape = likelihood.mean.shape
            noise = noise_of(chunk, shape[1:].numel()).view(shape).to(self.vae.device)
            return likelihood.sample(noise).float().clamp(0, 1)

        return self.in_chunks("decoding", len(latents), draws)

    def _likelihood(self, latents: Tensor, labels: Tensor | None, chunk: range) -> Likelihood:
        part = slice(chunk.start, chunk.stop)
        codes = latents[part].to(self.vae.device, self.vae.dtype)
        return self.vae.decode(codes, labels=None if labels is None else labels[part].to(self.vae.device))

    def training_draws(self) -> Tensor:
        """Draw once from the posterior of each training image, the same in every run: `(N, L)`.

        Above EXACT_LATENTS latents, every n-th image is taken, so that there are at most MIXTURE_NUMBERS numbers.
        Together they are a sample of the aggregate posterior, which the decoder has learned to decode. The posterior
        means are not: those of a latent that carries little information all lie near 0.
        """
        training = self.world.main_first(lambda: of_split(self.config.data, "train", advice=""))
        every = 1
        if self.vae.latent_dim > EXACT_LATENTS:
            every = -(-training.info.count // max(MIXTURE_NUMBERS // self.vae.latent_dim, 1))
        chosen = range(0, training.info.count, max(every, 1))

        def draws(chunk: range) -> Tensor:
            indices = chosen[chunk.start : chunk.stop]
            noise = standard_normal(FIXED_SEED, Stream.MIXTURE_POINTS, 0, chunk, self.vae.latent_dim)
            posterior = self.vae.infer(*read_inputs(self.vae, training, indices))
            return posterior.sample(noise.to(posterior.mean.device, posterior.mean.dtype))

        return self.in_chunks("encoding the training images", len(chosen), draws)

    def fit_mixture(self, components: int) -> GaussianMixture | SubspaceMixture:
        """Fit a mixture of `components` Gaussians to the training images' posteriors.

        Above EXACT_LATENTS latents, only their leading principal components have full covariances.
        """
        points = self.training_draws()
        require_finite(points)
        if components > len(points):
            raise UserError(f"sample.mixture_components={components} is more than the {len(points)} training images")

        def fit() -> GaussianMixture | SubspaceMixture:
            with progress("fitting the mixture", mixture.MAX_STEPS, is_main=self.world.is_main) as advance:
                if self.vae.latent_dim > EXACT_LATENTS:
                    return subspace.fit(points, components, advance)
                return mixture.fit(points, components, advance).mixture

        return self.world.on_main(fit, patient=True)

    def in_chunks(self, title: str, count: int, compute: Callable[[range], Tensor]) -> Tensor:
        """Call `compute` with each chunk of `range(count)`, and return its rows in order: `(count, ...)` on the CPU."""
        chunks = self.world.chunks(count, self.config.evaluate.images_at_once(self.vae.image_shape))
        values = []
        with (
            progress(title, sum(map(len, chunks)), is_main=self.world.is_main) as advance,
            torch.inference_mode(),
        ):
            for chunk in chunks:
                values.append(compute(chunk).cpu())
                advance(len(chunk))
        return self.world.gather_rows(chunks, values, count)


def require_finite(tensor: Tensor) -> None:
    """Raise UserError unless all numbers of a view are finite."""
    if not tensor.isfinite().all():
        raise UserError(
            "the codes or the images decoded from them are not finite: give codes nearer to 0 (sample.codes, "
            "sample.radius), or take an earlier checkpoint if the model has diverged"
        )


def closed_form_kl(posterior: Posterior) -> Tensor:
    """Each latent's KL from N(0, I), averaged over the N images: `(L,)` float64, nats."""
    # Some latents at a time: a float64 copy of all of them may not fit into memory.
    both = posterior.mean, posterior.log_variance
    parts = zip(*(part.split(EXACT_LATENTS, dim=1) for part in both), strict=True)
    return torch.cat([DiagonalGaussian(*part).kl_from_standard_normal().double().mean(0) for part in parts])
