"""A hierarchical VAE whose decoder takes the latents of one level after the other, from the lowest resolution up.

Inference is top-down, as in ladder VAEs (Sønderby et al. 2016) and in those of Child (2021): the posterior of a level
sees the image, and the draws of the levels before through the decoder's features.

Codes are standardised latents. The location and the scale of p(z_n | z_1 ... z_(n-1)) are the decoder's business, and a
code is the distance from that location in units of that scale. So p(codes) is N(0, I), and a draw from it is a draw
from the whole hierarchy. The posterior of a code is one relative to the prior (Vahdat and Kautz 2020, section 3.2). The
KL divergence of a level is the same for codes as for the latents that they stand for.

K draws, B batch, N images and their draws, L latents, C, H, W image, c channels, h, w height and width at a resolution.
"""

import copy
import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from vae_dist.config import LadderConfig
from vae_dist.models.grid import GridVAE
from vae_dist.models.labels import embedding_size
from vae_dist.models.ladder_networks import Decoder, Encoder
from vae_dist.models.likelihoods import LikelihoodKind
from vae_dist.models.posteriors import DiagonalGaussian, Posterior
from vae_dist.models.priors import build_prior
from vae_dist.models.tensors import Shape, sizes
from vae_dist.models.vae import Inference, require_noise


class LadderVAE(GridVAE):
    """A VAE with several levels of latents, of images of any size that the model's factor divides."""

    infers_with_decoder = True
    remedy = "fewer model.channels or a smaller model.patch"
    options: LadderConfig
    encoder: Encoder
    decoder: Decoder

    def __init__(self, options: LadderConfig, image_shape: Shape, likelihood: LikelihoodKind, classes: int = 0) -> None:
        super().__init__(options, image_shape, likelihood, classes)
        label = embedding_size(classes)
        self.encoder = Encoder(options, image_shape[0], label)
        self.decoder = Decoder(options, likelihood.output_shape(image_shape)[0], label)
        self.p_z = build_prior(self.latent_dim, options)

    def latent_shapes(self, image_shape: Shape) -> tuple[Shape, ...]:
        """The shapes of an image's latents, one per level, those of the lowest resolution first."""
        ((channels, height, width),) = super().latent_shapes(image_shape)
        return tuple(
            (channels, height << number, width << number)
            for number, levels in enumerate(reversed(self.options.levels))
            for _ in range(levels)
        )

    def infer(self, images: Tensor, labels: Tensor | None = None) -> "LadderPosterior":
        shapes = self.latent_shapes(tuple(images.shape[1:]))
        embedded = self._embedded(labels, images.shape[0])
        return LadderPosterior(self, shapes, self.encoder(images, *embedded), embedded)

    def sample(
        self,
        posterior: Posterior,
        noise: Tensor,
        image_shape: Shape | None = None,
        labels: Tensor | None = None,
    ) -> Inference:
        """Draw and decode in one pass. `labels` are those that the posterior was inferred with."""
        assert isinstance(posterior, LadderPosterior)
        require_noise(noise, posterior.shape)
        given, latents, output = posterior.draw(noise)
        kl, log_ratio, log_prior = self._divergence(given, latents, noise)
        likelihood = self._likelihood(output, noise.shape[0] * noise.shape[1], image_shape or self.image_shape)
        return Inference(likelihood, kl, log_ratio, latents, posterior, log_prior)

    def _decoded(self, latents: Tensor, image_shape: Shape, *embedded: Tensor) -> Tensor:
        shapes = self.latent_shapes(image_shape)
        levels = latents.split(sizes(shapes), 1)
        output: Tensor = self.decoder(lambda level, features: levels[level], latents.shape[0], shapes[0][1:], *embedded)
        return output


build = LadderVAE


class Descent(NamedTuple):
    """A pass through the decoder that infers the posterior of each level on its way."""

    posterior: DiagonalGaussian  # (..., B, L) each: of each level given the codes of the levels before
    codes: Tensor  # (..., B, L)
    output: Tensor  # the decoder's, for N images


class LadderPosterior:
    """q(z|x), the product over the levels of q(z_n | z_1 ... z_(n-1), x), each of independent normal latents.

    `mean` and `log_variance` are those of each level given the means of the levels before.
    """

    def __init__(
        self, vae: LadderVAE, shapes: Sequence[Shape], features: Sequence[Tensor], embedded: Sequence[Tensor]
    ) -> None:
        """`shapes` are those of the levels. `features` are the encoder's, of B images; `embedded` their labels."""
        self._vae = vae
        self._shapes = shapes
        self._features = features
        self._embedded = embedded

    @property
    def shape(self) -> Shape:
        """(B, L)."""
        return self._features[0].shape[0], sum(sizes(self._shapes))

    @property
    def mean(self) -> Tensor:
        return self._at_means.mean

    @property
    def log_variance(self) -> Tensor:
        return self._at_means.log_variance

    def sample(self, noise: Tensor) -> Tensor:
        return self.draw(noise).codes

    def log_prob(self, latents: Tensor) -> Tensor:
        return self._descend(latents, lambda posterior, codes: codes).posterior.log_prob(latents)

    def detached(self) -> "LadderPosterior":
        # The copy of the model shares its weights, without their gradients.
        vae = copy.deepcopy(self._vae, {id(weight): weight.detach() for weight in self._vae.parameters()})
        features, embedded = ([tensor.detach() for tensor in part] for part in (self._features, self._embedded))
        return LadderPosterior(vae, self._shapes, features, embedded)

    def draw(self, noise: Tensor) -> Descent:
        """Draw codes with standard normal noise `(..., B, L)`, and decode them."""
        return self._descend(noise, DiagonalGaussian.sample)

    @cached_property
    def _at_means(self) -> DiagonalGaussian:
        return self.draw(torch.zeros(self.shape, device=self._features[0].device)).posterior

    def _descend(self, numbers: Tensor, choose: Callable[[DiagonalGaussian, Tensor], Tensor]) -> Descent:
        """Descend with the codes that `choose` makes of a level's posterior and its part of `numbers` `(..., B, L)`."""
        shape, draws = numbers.shape, math.prod(numbers.shape[:-2])
        parts = numbers.reshape(-1, shape[-1]).split(sizes(self._shapes), 1)
        features, embedded = ([_repeated(x, draws) for x in part] for part in (self._features, self._embedded))
        posteriors: list[DiagonalGaussian] = []
        codes: list[Tensor] = []

        def codes_of(level: int, decoded: Tensor) -> Tensor:
            posteriors.append(self._vae.encoder.posterior(level, features, decoded))
            codes.append(choose(posteriors[-1], parts[level]))
            return codes[-1]

        output = self._vae.decoder(codes_of, draws * shape[-2], self._shapes[0][1:], *embedded)
        means, log_variances = (torch.cat(of_levels, 1).view(shape) for of_levels in zip(*posteriors, strict=True))
        return Descent(DiagonalGaussian(means, log_variances), torch.cat(codes, 1).view(shape), output)


def _repeated(x: Tensor, draws: int) -> Tensor:
    """Repeat the images of a batch for each of their draws: `(B, ...)` to `(draws B, ...)`."""
    return x if draws == 1 else x.repeat(draws, *(1 for _ in x.shape[1:]))
