import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from vae_dist.views import mixture
from vae_dist.views.mixture import FLOOR, GaussianMixture, fit

KNOWN = GaussianMixture(
    weights=torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64),
    means=torch.tensor([[0.0, 0.0], [4.0, 1.0], [-3.0, 3.0]], dtype=torch.float64),
    covariances=torch.tensor(
        [[[1.0, 0.6], [0.6, 0.5]], [[0.3, -0.2], [-0.2, 0.6]], [[0.2, 0.0], [0.0, 0.2]]], dtype=torch.float64
    ),
)


def density(found: GaussianMixture) -> MixtureSameFamily:
    """The oracle."""
    return MixtureSameFamily(
        Categorical(found.weights), MultivariateNormal(found.means, covariance_matrix=found.covariances)
    )


def aligned(found: GaussianMixture) -> GaussianMixture:
    """The components in the order of KNOWN's, each at the nearest mean."""
    order = torch.cdist(KNOWN.means, found.means).argmin(1)
    assert sorted(order.tolist()) == [0, 1, 2]
    return GaussianMixture(*(values[order] for values in found))


@pytest.fixture(scope="module")
def draws() -> Tensor:
    return KNOWN.sample(1, range(20_000))


def test_the_density_is_torchs() -> None:
    points = torch.randn(50, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3
    ours = torch.logsumexp(KNOWN.log_joint(points), dim=1)
    torch.testing.assert_close(ours, density(KNOWN).log_prob(points))


def test_draws_have_the_mixtures_mean_and_covariance(draws: Tensor) -> None:
    mean = KNOWN.weights @ KNOWN.means
    between = (KNOWN.means - mean).T @ ((KNOWN.means - mean) * KNOWN.weights.unsqueeze(1))
    covariance = between + (KNOWN.weights.view(-1, 1, 1) * KNOWN.covariances).sum(0)
    torch.testing.assert_close(draws.mean(0), mean, rtol=0, atol=5 * covariance.max().item() ** 0.5 / 20_000**0.5)
    torch.testing.assert_close(draws.T.cov(), covariance, rtol=0.05, atol=0.05)


def test_a_draw_does_not_depend_on_the_others(draws: Tensor) -> None:
    assert torch.equal(KNOWN.sample(1, range(777, 1000)), draws[777:1000])
    assert not torch.equal(KNOWN.sample(2, range(10)), draws[:10])


def test_a_known_mixture_is_recovered(draws: Tensor) -> None:
    fitted = aligned(fit(draws, 3).mixture)
    for ours, theirs in zip(fitted, KNOWN, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0.04)


def test_the_likelihood_ends_at_the_true_densitys(draws: Tensor) -> None:
    likelihoods = fit(draws, 3).log_likelihoods
    assert likelihoods[-1] == pytest.approx(density(KNOWN).log_prob(draws).mean().item(), abs=0.005)


@pytest.mark.parametrize("floor", [FLOOR, 0.4])  # the second is above some of the true variances
@pytest.mark.parametrize("components", [2, 3, 12])
def test_the_likelihood_never_falls(
    components: int, floor: float, draws: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mixture, "FLOOR", floor)
    monkeypatch.setattr(mixture, "TOLERANCE", -math.inf)  # a step that lowers the likelihood does not end the fit
    monkeypatch.setattr(mixture, "MAX_STEPS", 60)
    likelihoods = fit(draws[:2000], components).log_likelihoods
    assert len(likelihoods) == 60 and likelihoods[-1] > likelihoods[0]
    assert min(after - before for before, after in itertools.pairwise(likelihoods)) > -1e-12


def test_the_reported_likelihood_is_that_of_the_returned_mixture(draws: Tensor) -> None:
    fitted = fit(draws, 3)
    assert fitted.log_likelihoods[-1] == pytest.approx(density(fitted.mixture).log_prob(draws).mean().item(), abs=1e-9)


def test_a_fit_is_reproducible_bitwise(draws: Tensor) -> None:
    first, second = fit(draws, 3), fit(draws, 3)
    assert first.log_likelihoods == second.log_likelihoods
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(first.mixture, second.mixture, strict=True))


def test_one_component_is_the_sample_mean_and_covariance(draws: Tensor) -> None:
    fitted = fit(draws, 1).mixture
    np.testing.assert_allclose(fitted.means[0], draws.mean(0), atol=1e-12)
    np.testing.assert_allclose(fitted.covariances[0], np.cov(draws.numpy().T, bias=True), atol=1e-10)


@pytest.mark.parametrize("components", [1, 3, 10])
def test_flat_or_equal_points_get_the_floor_as_variance(components: int) -> None:
    flat = torch.cat([KNOWN.sample(3, range(1000)), torch.zeros(1000, 1, dtype=torch.float64)], dim=1)
    values = torch.linalg.eigvalsh(fit(flat, components).mixture.covariances)
    assert values.min().item() == pytest.approx(FLOOR, rel=1e-6)
    alike = fit(torch.ones(20, 4), components).mixture
    assert alike.weights.sum().item() == pytest.approx(1)
    torch.testing.assert_close(alike.sample(0, range(5)), torch.ones(5, 4, dtype=torch.float64), rtol=0, atol=0.01)
