"""The variational autoencoder (Kingma and Welling 2013): the contract of all architectures.

Codes are flat at the border: `(B, L)`, whatever shape a network gives its latents. The numbers of a shaped latent are
in C, H, W order. K draws, B batch, L latents, G groups of latents, C, H, W image.
"""

from functools import cached_property
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from vae_dist.models.labels import LabelEmbedding
from vae_dist.models.likelihoods import Likelihood, LikelihoodKind
from vae_dist.models.posteriors import DiagonalGaussian, Posterior
from vae_dist.models.priors import Prior
from vae_dist.models.tensors import Shape, ShapeError, at_least_float32, require_shape, sizes, to_unit


class Inference(NamedTuple):
    """K draws from the posterior of each image, decoded: all that objectives and metrics are computed from."""

    likelihood: Likelihood  # p(x|z) of K B images
    kl: Tensor  # (K, B, G), nats: each latent's if p(z) factorises, or a level's, or the whole code's
    log_ratio: Tensor  # (K, B), nats: log p(z) - log q(z|x) of the draws
    latents: Tensor  # (K, B, L), the draws
    posterior: Posterior  # q(z|x)
    log_prior: Tensor  # (K, B), nats: log p(z) of the draws

    def log_likelihood(self, images: Tensor) -> Tensor:
        """log p(x|z) of images `(B, C, H, W)` given each draw: `(K, B)`, nats, in float32 at least."""
        draws, count = self.latents.shape[:2]
        return self.likelihood.log_prob(self.repeated(images)).view(draws, count)

    def repeated(self, images: Tensor) -> Tensor:
        """Repeat images `(B, C, H, W)` for each draw: `(K B, C, H, W)`, in float32 at least."""
        draws, images = len(self.latents), at_least_float32(images)
        return images if draws == 1 else images.repeat(draws, 1, 1, 1)


class VAE(nn.Module):
    """A VAE whose noise is an argument: it draws no random numbers itself.

    A subclass sets `encoder`, `decoder` and `p_z`, and defines `latent_shapes`. `encoder` maps images to the means and
    log-variances of latents in their shape, joined along dimension 1; `decoder` maps latents in their shape to the
    likelihood's parameters. No layer may mix images of a batch (BatchNorm does), or a run would depend on the number
    of its processes.

    A conditional VAE, of `classes` above 0, models p(x|y) (Sohn, Lee and Yan 2015): its encoder and decoder take the
    embedded labels `(B, EMBEDDING_SIZE)` as a second argument. The prior is the same for every class. Methods take
    labels `(B,)`, int64 on its device, or weights of the classes `(B, classes)`, whose embeddings are averaged. They
    raise ShapeError for other labels. A VAE that is not conditional takes none, or a tensor without elements.
    """

    encoder: nn.Module
    decoder: nn.Module
    p_z: Prior
    worth_compiling: ClassVar[bool] = False  # on a CPU, where a long run compiles its step if train.compile is null
    infers_with_decoder: ClassVar[bool] = False  # whether a posterior depends on the decoder's weights

    def __init__(self, image_shape: Shape, likelihood: LikelihoodKind, classes: int = 0) -> None:
        super().__init__()
        self.image_shape = image_shape  # (C, H, W), of the images that it is trained on
        self.likelihood = likelihood
        self.classes = classes  # 0 if it is not conditional
        self.embedding = LabelEmbedding(classes) if classes else None

    def latent_shapes(self, image_shape: Shape) -> tuple[Shape, ...]:
        """The shapes of an image's latents, one per level. Raises ValueError for images that can't be encoded."""
        raise NotImplementedError

    @cached_property
    def latent_dim(self) -> int:
        """L, the number of latents of an image of `image_shape`."""
        return sum(sizes(self.latent_shapes(self.image_shape)))

    @property
    def prior_numbers(self) -> int:
        """The number of standard normal numbers that `prior` needs for a code."""
        return self.p_z.numbers

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def recompute_activations(self) -> None:
        """Compute activations a second time in the backward pass instead of keeping them (Chen et al. 2016).

        Neither outputs nor gradients change. Gradients by `torch.func` are then not possible.
        """
        raise NotImplementedError

    def to_input(self, pixels: Tensor) -> Tensor:
        """Convert uint8 pixels on any device to images in [0, 1], on this model's device and in its dtype."""
        weight = next(self.parameters())
        return to_unit(pixels.to(weight.device), weight.dtype)

    def infer(self, images: Tensor, labels: Tensor | None = None) -> Posterior:
        """Return the posterior of images `(B, C, H, W)` in [0, 1], of any size that `latent_shapes` accepts."""
        count, latents = images.shape[0], self._latents(images.shape[1:])  # traced, len() would be a constant
        parameters = self.encoder(images, *self._embedded(labels, count)).flatten(1)
        require_shape(parameters, (count, 2 * latents), "the encoder's output, flat,")
        return self.posterior(parameters)

    def posterior(self, parameters: Tensor) -> Posterior:
        """Return the posterior of the encoder's output `(B, 2 L)`, flat. A subclass may bound it otherwise."""
        return DiagonalGaussian.from_network(parameters)

    def sample(
        self,
        posterior: Posterior,
        noise: Tensor,
        image_shape: Shape | None = None,
        labels: Tensor | None = None,
    ) -> Inference:
        """Draw with standard normal noise `(K, B, L)` from the posterior of images of a shape, and decode."""
        require_noise(noise, posterior.mean.shape)
        latents = posterior.sample(noise)
        kl, log_ratio, log_prior = self._divergence(posterior, latents, noise)
        repeated = None if labels is None else torch.cat([labels] * len(noise))
        likelihood = self.decode(latents.flatten(0, 1), image_shape, repeated)
        return Inference(likelihood, kl, log_ratio, latents, posterior, log_prior)

    def prior(self, noise: Tensor) -> Tensor:
        """Draw codes `(B, L)` from the prior with standard normal noise `(B, prior_numbers)`.

        Noise of zeros gives the code from which views start.
        """
        require_shape(noise, (len(noise), self.prior_numbers), "noise")
        codes: Tensor = self.p_z(noise)
        return codes

    def decode(self, latents: Tensor, image_shape: Shape | None = None, labels: Tensor | None = None) -> Likelihood:
        """Return the likelihood of images given codes `(B, L)`; of images of `self.image_shape` by default."""
        image_shape, count = image_shape or self.image_shape, latents.shape[0]
        require_shape(latents, (count, self._latents(image_shape)), "latents")
        embedded = self._embedded(labels, count)
        return self._likelihood(self._decoded(latents, image_shape, *embedded), count, image_shape)

    def forward(self, images: Tensor, noise: Tensor, labels: Tensor | None = None) -> Inference:
        """Infer the posterior of images `(B, C, H, W)`, and sample it with standard normal noise `(K, B, L)`."""
        return self.sample(self.infer(images, labels), noise, tuple(images.shape[1:]), labels)

    def _decoded(self, latents: Tensor, image_shape: Shape, *embedded: Tensor) -> Tensor:
        """The decoder's output for codes `(B, L)`."""
        output: Tensor = self.decoder(latents.unflatten(1, self.latent_shapes(image_shape)[0]), *embedded)
        return output

    def _likelihood(self, output: Tensor, count: int, image_shape: Shape) -> Likelihood:
        """The likelihood of `count` images of a shape from the decoder's output."""
        require_shape(output, (count, *self.likelihood.output_shape(image_shape)), "the decoder's output")
        likelihood: Likelihood = self.likelihood(output)
        return likelihood

    def _divergence(self, posterior: Posterior, latents: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """KL `(K, B, G)`, log ratio and log p(z) `(K, B)` of latents that were drawn with `noise` `(K, B, L)`."""
        log_prior = self.p_z.log_prob(latents)
        require_shape(log_prior, noise.shape[:2], "the prior's log-probability")
        log_ratio = self.p_z.log_ratio(posterior, latents, noise, log_prior)
        require_shape(log_ratio, noise.shape[:2], "the prior's log ratio")
        kl = self.p_z.kl(posterior, latents, log_ratio)
        require_shape(kl, (*noise.shape[:2], kl.shape[-1]), "the prior's KL by group of latents")
        return kl, log_ratio, log_prior

    def _embedded(self, labels: Tensor | None, count: int) -> tuple[Tensor, ...]:
        """The argument that tells encoder and decoder the classes of `count` images; none if not conditional."""
        if self.embedding is None:
            if labels is not None and labels.numel():
                raise ShapeError(f"this model is not conditional, but was given labels {tuple(labels.shape)}")
            return ()
        if labels is None:
            raise ShapeError(f"this model is conditional: it needs the labels of its {count} images")
        require_shape(labels, (count, *labels.shape[1:]), "labels")
        return (self.embedding(labels),)

    def _latents(self, image_shape: Shape) -> int:
        if image_shape == self.image_shape:
            return self.latent_dim
        return sum(sizes(self.latent_shapes(tuple(image_shape))))


def require_noise(noise: Tensor, expected: Shape) -> None:
    """Raise ShapeError unless noise has the shape of K draws from posteriors `(B, L)`."""
    if noise.ndim != 3 or noise.shape[1:] != expected:
        raise ShapeError(f"noise must have the shape (K, {', '.join(map(str, expected))}), not {tuple(noise.shape)}")
