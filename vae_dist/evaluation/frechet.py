"""The Frechet distance of two sets of features, each taken as a Gaussian (Heusel et al. 2017). N features of size D."""

import math

import torch
from torch import Tensor


def distance(first: Tensor, second: Tensor) -> float:
    """Return the Frechet distance of sets of features `(N, D)`, N at least 2 each; in float64.

    |m1 - m2|^2 + tr(C1) + tr(C2) - 2 tr((C1 C2)^(1/2)), with means m and covariances C, which divide by N - 1. With
    A^T A = (N - 1) C, the eigenvalues of C1 C2 are the squared singular values of A1 A2^T up to that factor. So no root
    of a matrix is taken, and nothing is lost where covariances have no full rank.
    """
    means, factors, traces = [], [], []
    for features in (first, second):
        values = features.double()
        means.append(values.mean(0))
        centred = (values - means[-1]) / math.sqrt(len(values) - 1)
        factors.append(torch.linalg.qr(centred, mode="r").R)
        traces.append(centred.square().sum())
    root = torch.linalg.svdvals(factors[0] @ factors[1].T).sum()
    return ((means[0] - means[1]).square().sum() + traces[0] + traces[1] - 2 * root).item()
