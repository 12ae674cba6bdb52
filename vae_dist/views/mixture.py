"""A Gaussian mixture with full covariances, fitted by expectation-maximisation. N points, L latents, K components.

Everything is float64 on the CPU, and the random numbers come from the plan: a fit is reproducible.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from vae_dist.plan import FIXED_SEED, Stream, standard_normal, uniform_bits

FLOOR = 1e-6  # smallest variance in any direction; the prior's is 1
TOLERANCE = 1e-4  # nats per point; a step that gains less is the last
MAX_STEPS = 200

_CHUNK = 2**20  # numbers in a chunk of the points, which then fits the processor's cache


class GaussianMixture(NamedTuple):
    """The density of a mixture of K Gaussians."""

    weights: Tensor  # (K,), their sum is 1
    means: Tensor  # (K, L)
    covariances: Tensor  # (K, L, L)

    def log_joint(self, points: Tensor) -> Tensor:
        """Return log p(component) + log p(point | component) of points `(N, L)`: `(N, K)`, nats."""
        factors = torch.linalg.cholesky(self.covariances)
        identity = torch.eye(self.means.shape[1], dtype=torch.float64)
        whitening = torch.linalg.solve_triangular(factors, identity, upper=False).mT
        log_scales = factors.diagonal(dim1=1, dim2=2).log().sum(1) + 0.5 * len(identity) * math.log(2 * math.pi)
        whitened = (points - self.means.unsqueeze(1)) @ whitening
        return self.weights.log() - log_scales - 0.5 * whitened.square().sum(2).T

    def sample(self, seed: int, rows: range) -> Tensor:
        """Draw `(len(rows), L)`; row r does not depend on the other rows."""
        uniform = torch.from_numpy(uniform_bits(seed, Stream.MIXTURE, 0, rows, 1)[:, 0] * 2.0**-32)
        chosen = torch.searchsorted(self.weights.cumsum(0), uniform, right=True).clamp(max=len(self.weights) - 1)
        noise = standard_normal(seed, Stream.MIXTURE, 1, rows, self.means.shape[1]).double()
        factors = torch.linalg.cholesky(self.covariances)
        # A sum per row: the rounding of a matrix product would depend on the number of rows.
        return self.means[chosen] + (factors[chosen] * noise.unsqueeze(1)).sum(2)


class Fit(NamedTuple):
    """A fitted mixture, and the course of its likelihood."""

    mixture: GaussianMixture
    log_likelihoods: list[float]  # before each step, nats per point; never falling


def fit(points: Tensor, components: int, progress: Callable[[int], None] = lambda steps: None) -> Fit:
    """Fit a mixture of `components` Gaussians to points `(N, L)` by EM (Dempster, Laird and Rubin 1977)."""
    points = points.double()
    chunks = points.split(max(_CHUNK // (components * points.shape[1]), 1))
    zeros = _Moments.zeros(components, points.shape[1])
    moments = zeros
    for chunk, nearest in zip(chunks, _initial_responsibilities(points, components).split(len(chunks[0])), strict=True):
        moments = moments.plus(_Moments.of(chunk, nearest))
    mixture = _maximize(moments)
    log_likelihoods: list[float] = []
    while len(log_likelihoods) < MAX_STEPS:
        total = torch.zeros((), dtype=torch.float64)
        moments = zeros
        for chunk in chunks:
            log_joint = mixture.log_joint(chunk)
            log_density = torch.logsumexp(log_joint, dim=1, keepdim=True)
            total += log_density.sum()
            moments = moments.plus(_Moments.of(chunk, torch.exp(log_joint - log_density)))
        log_likelihoods.append(total.item() / len(points))
        if len(log_likelihoods) > 1 and log_likelihoods[-1] - log_likelihoods[-2] < TOLERANCE:
            break
        mixture = _maximize(moments)
        progress(1)
    return Fit(mixture, log_likelihoods)


class _Moments(NamedTuple):
    """The sufficient statistics of a step: sums over the points, weighted by the components' responsibilities."""

    sizes: Tensor  # (K,)
    sums: Tensor  # (K, L)
    products: Tensor  # (K, L, L)

    @classmethod
    def zeros(cls, components: int, latents: int) -> "_Moments":
        shapes = (components,), (components, latents), (components, latents, latents)
        return cls(*(torch.zeros(shape, dtype=torch.float64) for shape in shapes))

    @classmethod
    def of(cls, points: Tensor, responsibilities: Tensor) -> "_Moments":
        """Sum over points `(N, L)`, weighted by the components' responsibilities `(N, K)`."""
        weighted = responsibilities.T.unsqueeze(2) * points
        return cls(responsibilities.sum(0), weighted.sum(1), weighted.mT @ points)

    def plus(self, other: "_Moments") -> "_Moments":
        return _Moments(*(ours + theirs for ours, theirs in zip(self, other, strict=True)))


def _maximize(moments: _Moments) -> GaussianMixture:
    """Return the mixture of maximum likelihood, given the responsibilities.

    Raising small eigenvalues to the floor is the exact maximum among covariances with no eigenvalue below it, so no
    step of EM lowers the likelihood. Adding the floor to the diagonal would break that.
    """
    sizes = moments.sizes.clamp_min(torch.finfo(torch.float64).tiny)
    means = moments.sums / sizes.unsqueeze(1)
    covariances = moments.products / sizes.view(-1, 1, 1) - means.unsqueeze(2) * means.unsqueeze(1)
    values, vectors = torch.linalg.eigh(covariances)
    floored = (vectors * values.clamp_min(FLOOR).unsqueeze(1)) @ vectors.mT
    return GaussianMixture(sizes / sizes.sum(), means, floored)


def _initial_responsibilities(points: Tensor, components: int) -> Tensor:
    """Assign each point to the nearest centre of k-means++ (Arthur and Vassilvitskii 2007): one-hot `(N, K)`.

    Each centre is a point, drawn with a probability proportional to its squared distance from the earlier centres.
    """
    uniform = uniform_bits(FIXED_SEED, Stream.MIXTURE_START, 0, range(components), 1)[:, 0] * 2.0**-32
    centres = [points[int(uniform[0] * len(points))]]
    distances = (points - centres[0]).square().sum(1)
    for position in uniform[1:]:
        cumulative = distances.cumsum(0)
        index = torch.searchsorted(cumulative, cumulative[-1:] * position, right=True).clamp(max=len(points) - 1)
        centres.append(points[int(index)])
        distances = torch.minimum(distances, (points - centres[-1]).square().sum(1))
    nearest = torch.cdist(points, torch.stack(centres)).argmin(1)
    return one_hot(nearest, components).double()
