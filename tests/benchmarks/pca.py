"""Probabilistic PCA (Tipping and Bishop 1999): the best linear VAE of Gaussian pixels with a given sigma.

Its posterior is exact, so its ELBO is log p(x). On the images that it is fitted to, no VAE with a linear decoder, the
same sigma and as many latents has a higher one. N images, D pixel values, q latents.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Costs(NamedTuple):
    """Values of each image `(N,)`, float64."""

    negative_elbo: Tensor  # nats, -log p(x)
    kl: Tensor  # nats, of the posterior from N(0, I)
    squared_error: Tensor  # of the image decoded from the posterior's mean, averaged over its pixel values


class PCA:
    """x = W z + mean + sigma noise, where W = U (Lambda - sigma^2 I)^(1/2) is the most likely one, given sigma."""

    def __init__(self, images: Tensor, latents: int) -> None:
        """Fit images `(N, D)` in [0, 1]."""
        images = images.double()
        count, dimensions = images.shape
        self.mean = images.mean(0)
        centred = images - self.mean
        if count < dimensions:  # N x N numbers have the same eigenvalues
            values, vectors = torch.linalg.eigh(centred @ centred.T / count)
            vectors = centred.T @ vectors[:, -latents:]
            vectors = vectors / vectors.norm(dim=0).clamp(min=1e-12)
        else:
            values, vectors = torch.linalg.eigh(centred.T @ centred / count)
            vectors = vectors[:, -latents:]
        values = values.clamp(min=0)
        self.values, self.vectors = values[-latents:], vectors  # (q,) and (D, q), the largest last
        self.likely_sigma = math.sqrt(values[:-latents].sum().item() / (dimensions - latents))  # equation 8

    def costs(self, images: Tensor, sigma: float) -> Costs:
        """Return the costs of images `(N, D)` in [0, 1]."""
        variance = sigma**2
        used = self.values > variance  # the other latents have no weights at the highest likelihood
        values, vectors = self.values[used], self.vectors[:, used]
        centred = images.double() - self.mean
        scores = centred @ vectors
        outside = centred.square().sum(1) - scores.square().sum(1)
        distance = (scores.square() / values).sum(1) + outside / variance
        dimensions = len(self.mean)
        log_determinant = values.log().sum() + (dimensions - len(values)) * math.log(variance)
        ratio = variance / values  # the posterior's variance
        mean = scores * (1 - ratio).sqrt() / values.sqrt()  # and its mean
        decoded = (self.mean + (scores * (1 - ratio)) @ vectors.T).clamp(0, 1)
        return Costs(
            0.5 * (distance + log_determinant + dimensions * math.log(2 * math.pi)),
            0.5 * (mean.square() + ratio - 1 - ratio.log()).sum(1),
            (decoded - images).square().mean(1),
        )
