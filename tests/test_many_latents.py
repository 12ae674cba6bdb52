"""Codes of hundreds and thousands of latents: components, mixtures and views."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from tests.conftest import opened
from vae_dist import config
from vae_dist.errors import UserError
from vae_dist.models.posteriors import DiagonalGaussian
from vae_dist.training.loop import train
from vae_dist.views import components, latents, subspace
from vae_dist.views.components import principal_components
from vae_dist.views.making import KINDS
from vae_dist.views.sampling import sample
from vae_dist.views.subspace import SubspaceMixture

LATENTS = 520
REMAINING = 0.25  # the variance of the known density in all directions but its leading ones


@pytest.fixture(scope="module")
def axes() -> Tensor:
    """Four orthonormal directions `(4, LATENTS)`."""
    drawn = torch.randn(LATENTS, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return torch.linalg.qr(drawn).Q.T


@pytest.fixture(scope="module")
def points(axes: Tensor) -> Tensor:
    """Draws from two Gaussians in a plane, with variances in two directions more, far from the origin: `(N, L)`."""
    generator = torch.Generator().manual_seed(1)
    coordinates = torch.randn(800, 4, dtype=torch.float64, generator=generator) * torch.tensor([1.0, 1, 3, 2])
    coordinates[:200] += torch.tensor([12.0, 9, 0, 0])
    noise = torch.randn(800, LATENTS, dtype=torch.float64, generator=generator) * REMAINING**0.5
    return (5 + coordinates @ axes + noise - noise @ axes.T @ axes).float()


def test_randomised_components_are_those_of_an_exact_svd(points: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(components, "_CHUNK", LATENTS * 300)  # many chunks, the last one smaller
    ours = principal_components(points, 3)
    monkeypatch.setattr(components, "EXACT_LATENTS", LATENTS)
    exact = principal_components(points, 3)
    torch.testing.assert_close(ours.directions, exact.directions, rtol=0, atol=1e-4)
    torch.testing.assert_close(ours.coordinates, exact.coordinates, rtol=0, atol=1e-3)
    torch.testing.assert_close(ours.variance_ratios, exact.variance_ratios, rtol=1e-7, atol=0)


def test_randomised_components_of_slowly_falling_variances_hold_nearly_all_that_exact_ones_hold() -> None:
    spreads = torch.arange(1, LATENTS + 1, dtype=torch.float64) ** -0.5
    drawn = torch.randn(600, LATENTS, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * spreads
    ours = principal_components(drawn, 64)
    exact = np.linalg.svd(drawn.numpy() - drawn.numpy().mean(0), compute_uv=False) ** 2
    torch.testing.assert_close(ours.directions @ ours.directions.T, torch.eye(64, dtype=torch.float64))
    assert 0.995 < ours.variance_ratios.sum().item() / (exact[:64].sum() / exact.sum()) <= 1 + 1e-12


@pytest.mark.parametrize("latents", [3, 520])
def test_equal_points_have_components_that_explain_nothing(latents: int) -> None:
    ours = principal_components(torch.full((4, latents), 0.5), 2)
    assert all(part.isfinite().all() for part in ours) and not ours.coordinates.any()
    assert ours.variance_ratios.tolist() == [0, 0]


def test_there_are_no_more_components_than_points(points: Tensor) -> None:
    ours = principal_components(points[:3], 10)
    assert ours.directions.shape == (3, LATENTS) and ours.variance_ratios.sum().item() == pytest.approx(1)


@pytest.fixture(scope="module")
def fitted(points: Tensor) -> SubspaceMixture:
    return subspace.fit(points, 2)


def test_a_mixture_of_many_latents_finds_a_known_one_of_low_rank(fitted: SubspaceMixture, axes: Tensor) -> None:
    torch.testing.assert_close(fitted.weights.sort().values, torch.tensor([0.25, 0.75], dtype=torch.float64))
    means = fitted.centre + fitted.means @ fitted.directions
    far, near = means[fitted.weights.argsort()]
    expected = torch.tensor([12.0, 9, 0, 0], dtype=torch.float64)
    torch.testing.assert_close((far - near) @ axes.T, expected, rtol=0, atol=0.6)
    assert sum(values.numel() for values in fitted) < 2 * subspace.LEADING * LATENTS


def test_the_remaining_variance_is_the_mean_of_those_that_the_leading_components_leave(
    fitted: SubspaceMixture, points: Tensor
) -> None:
    variances = np.linalg.eigvalsh(np.cov(points.double().numpy().T, bias=True))
    left = variances[: -subspace.LEADING].mean()
    assert left < REMAINING
    assert fitted.remaining_variance.item() == pytest.approx(left, rel=0.01)


def test_draws_from_it_have_the_mean_and_the_variances_of_the_points(
    fitted: SubspaceMixture, points: Tensor, axes: Tensor
) -> None:
    draws = fitted.sample(7, range(3000))
    torch.testing.assert_close(draws.mean(0), points.double().mean(0), rtol=0, atol=0.4)
    other = torch.randn(LATENTS, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    other = torch.linalg.qr(other - axes.T @ (axes @ other)).Q.T
    for directions, tolerance in (axes, 0.1), (other, 0.2):
        ours, theirs = ((values.double() @ directions.T).T.cov() for values in (draws, points))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * theirs.diagonal().max().item())


def test_a_draw_does_not_depend_on_the_others(fitted: SubspaceMixture) -> None:
    draws = fitted.sample(1, range(50))
    assert torch.equal(fitted.sample(1, range(33, 37)), draws[33:37])
    assert not torch.equal(fitted.sample(2, range(50)), draws)


def test_the_mean_kl_of_many_latents_is_that_of_all_at_once() -> None:
    posterior = DiagonalGaussian(*torch.randn(2, 30, 1100, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(latents.closed_form_kl(posterior), posterior.kl_from_standard_normal().double().mean(0))


# ---- Runs


def code_of(latent_dim: int) -> str:
    return f"sample.codes=[{[0.5] * latent_dim}]".replace(" ", "")


@pytest.fixture(scope="module", params=[196, pytest.param(4096, marks=pytest.mark.slow)])
def wide_run(
    request: pytest.FixtureRequest, smoke_arguments: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    settings = "train.steps=3", f"model.latent_dim={request.param}", "model.hidden_dims=[4]", "name=wide"
    return train(config.load([*smoke_arguments, f"runs_dir={tmp_path_factory.mktemp('runs')}", *settings]))


def test_every_kind_takes_many_latents(wide_run: Path) -> None:
    latent_dim = opened(wide_run).config.model.latents([1, 28, 28])
    for kind in KINDS:
        more = [code_of(latent_dim)] if kind == "codes" else []
        more += [f"sample.{key}=2" for key in ("rows", "steps", "count") if key in KINDS[kind][1]]
        folder = sample(wide_run, [f"sample.kind={kind}", "train.threads=1", *more])
        stored = load_file(folder / "samples.safetensors")
        assert stored["latents"].shape[1] == latent_dim
    mixture = sample(
        wide_run, ["sample.sampler=mixture", "sample.mixture_components=2", "sample.count=5", "train.threads=1"]
    )
    stored = load_file(mixture / "samples.safetensors")
    assert stored["latents"].shape == (5, latent_dim)
    rank = latent_dim if latent_dim <= components.EXACT_LATENTS else subspace.LEADING
    assert stored["mixture.covariances"].shape == (2, rank, rank)


def test_views_start_from_a_long_code_and_refuse_one_of_another_length(wide_run: Path) -> None:
    latent_dim = opened(wide_run).config.model.latents([1, 28, 28])
    folder = sample(wide_run, ["sample.kind=traversal", "sample.rows=1", "sample.steps=2", code_of(latent_dim)])
    stored = load_file(folder / "samples.safetensors")
    assert ((stored["latents"] != 0.5).sum(1) == 1).all()
    with Image.open(folder / "grid.png") as picture:
        assert picture.height < 400  # the caption does not state every number
    with pytest.raises(UserError, match=f"codes of 3 numbers, but this model has {latent_dim} latents"):
        sample(wide_run, ["sample.codes=[[1,2,3]]"])
