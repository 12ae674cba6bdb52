"""A Gaussian mixture of many latents: full covariances in the leading principal components, one variance in the rest.

N points, L latents, P leading components, K Gaussians.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from vae_dist.plan import Stream, standard_normal
from vae_dist.views import mixture
from vae_dist.views.components import chunks, moments, randomised_directions
from vae_dist.views.mixture import FLOOR, GaussianMixture

LEADING = 64  # components that are modelled by full covariances


class SubspaceMixture(NamedTuple):
    """The density of a mixture in P directions, and of independent normal numbers of one variance in all others.

    With one Gaussian this is probabilistic principal component analysis, in which the mean of the remaining variances
    is the estimate of maximum likelihood (Tipping and Bishop 1999, equation 8). A variance for each remaining direction
    would need all L of them, L^2 numbers. All fields are float64.
    """

    weights: Tensor  # (K,), their sum is 1
    means: Tensor  # (K, P), along the directions from the centre
    covariances: Tensor  # (K, P, P)
    centre: Tensor  # (L,)
    directions: Tensor  # (P, L), orthonormal
    remaining_variance: Tensor  # (), in each direction that is orthogonal to these

    def sample(self, seed: int, rows: range) -> Tensor:
        """Draw `(len(rows), L)`; row r does not depend on the other rows."""
        leading = GaussianMixture(self.weights, self.means, self.covariances).sample(seed, rows)
        noise = standard_normal(seed, Stream.MIXTURE, 2, rows, len(self.centre)).double()
        noise *= self.remaining_variance.sqrt()
        # A product per row: the rounding of a product of matrices would depend on the number of rows.
        draws = [
            self.centre + other + (coordinates - self.directions @ other) @ self.directions
            for coordinates, other in zip(leading, noise, strict=True)
        ]
        return torch.stack(draws)


def fit(points: Tensor, components: int, progress: Callable[[int], None] = lambda steps: None) -> SubspaceMixture:
    """Fit a mixture of `components` Gaussians to points `(N, L)` along their leading principal components."""
    centre, variance = moments(points)
    directions = randomised_directions(points, centre, LEADING)
    leading = torch.cat([(part - centre) @ directions.T for part in chunks(points)])
    fitted = mixture.fit(leading, components, progress).mixture
    others = max(points.shape[1] - len(directions), 1)
    remaining = ((variance - leading.square().mean(0).sum()) / others).clamp_min(FLOOR)
    return SubspaceMixture(*fitted, centre, directions, remaining)
