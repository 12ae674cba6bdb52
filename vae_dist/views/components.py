"""Principal components of latents: exact for few latents, randomised for many. N points, L latents, K components."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from vae_dist.plan import FIXED_SEED, Stream, standard_normal

EXACT_LATENTS = 512  # with more, an exact SVD or a full covariance takes too long

_OVERSAMPLING = 16  # directions more than asked for
_POWER_ITERATIONS = 4
_CHUNK = 2**22  # numbers of the points that are held in float64 at once


class Components(NamedTuple):
    """The first K principal components of N points."""

    coordinates: Tensor  # (N, K), of each point
    directions: Tensor  # (K, L), orthonormal
    variance_ratios: Tensor  # (K,), the part of the points' variance that each explains, falling; 0 of equal points


def principal_components(points: Tensor, count: int) -> Components:
    """Return the first `count` principal components of points `(N, L)`, at most N of them, in float64.

    Up to EXACT_LATENTS latents by an exact SVD, above by a randomised one, which is reproducible. Each direction's
    largest entry is positive, so that a picture is never mirrored.
    """
    if points.shape[1] > EXACT_LATENTS:
        centre, variance = moments(points)
        directions = randomised_directions(points, centre, count)
        coordinates = torch.cat([(part - centre) @ directions.T for part in chunks(points)])
        return Components(coordinates, directions, _parts(coordinates.square().mean(0), variance))
    centred = points.double() - points.double().mean(0)
    _, spreads, directions = torch.linalg.svd(centred, full_matrices=False)
    directions = _with_fixed_signs(directions[:count])
    return Components(centred @ directions.T, directions, _parts(spreads[:count].square(), spreads.square().sum()))


def randomised_directions(points: Tensor, centre: Tensor, count: int) -> Tensor:
    """Return orthonormal directions `(K, L)` of nearly the largest variance of points `(N, L)` about `centre` `(L,)`.

    K is `count`, or N if that is smaller. Subspace iteration from fixed random directions (Halko, Martinsson and Tropp
    2011, "Finding structure with randomness", algorithms 4.4 and 5.1). The points are read a chunk at a time.
    """
    latents = len(centre)
    columns = min(count + _OVERSAMPLING, latents, len(points))
    basis = standard_normal(FIXED_SEED, Stream.SVD, 0, range(latents), columns).double()
    for _ in range(1 + _POWER_ITERATIONS):
        basis = torch.linalg.qr(basis).Q
        product = torch.zeros_like(basis)
        for part in chunks(points):
            centred = part - centre
            product += centred.T @ (centred @ basis)
        basis = product
    basis = torch.linalg.qr(basis).Q
    projected = torch.cat([(part - centre) @ basis for part in chunks(points)])
    _, _, rotation = torch.linalg.svd(projected, full_matrices=False)
    return _with_fixed_signs(rotation[:count] @ basis.T)


def moments(points: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean of points `(N, L)`, and their variance summed over the latents: float64 `(L,)` and `()`."""
    centre = torch.stack([part.sum(0) for part in chunks(points)]).sum(0) / len(points)
    squares = torch.stack([(part - centre).square().sum() for part in chunks(points)])
    return centre, squares.sum() / len(points)


def chunks(points: Tensor) -> Iterator[Tensor]:
    """Yield the rows of points `(N, L)` in float64, some at a time: a copy of all of them may not fit into memory."""
    for part in points.split(max(_CHUNK // points.shape[1], 1)):
        yield part.double()


def _parts(variances: Tensor, total: Tensor) -> Tensor:
    return variances / total if total > 0 else torch.zeros_like(variances)


def _with_fixed_signs(directions: Tensor) -> Tensor:
    """Directions `(K, L)`, the largest entry of each positive."""
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    return directions * largest.sign()
