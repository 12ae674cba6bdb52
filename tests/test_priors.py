"""Priors, and one without a closed-form KL in everything that a run goes through: a learned mixture."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from tests.conftest import MakeConfig, newest_checkpoint, opened
from tests.test_trainer import final, rows, timeless
from vae_dist import config
from vae_dist.data import datasets
from vae_dist.data.source import every_label, read
from vae_dist.distributed import processes
from vae_dist.evaluation.evaluate import evaluate
from vae_dist.models import build_vae
from vae_dist.models.posteriors import DiagonalGaussian
from vae_dist.models.priors import Mixture, Prior, StandardNormal
from vae_dist.models.tensors import to_unit
from vae_dist.plan import FIXED_SEED, Stream, standard_normal
from vae_dist.training.loop import train
from vae_dist.views import plots
from vae_dist.views.from_codes import manifold
from vae_dist.views.from_images import scatter
from vae_dist.views.latents import TrainedVAE
from vae_dist.views.making import KINDS
from vae_dist.views.sampling import sample

PRIOR = ["model.prior=mixture", "model.prior_components=3"]


def mixture(latent_dim: int) -> Mixture:
    """Three components of several weights and scales."""
    torch.manual_seed(1)
    prior = Mixture(latent_dim, 3).double()
    prior.logits.data.copy_(torch.tensor([0.5, -1.0, 1.0]))
    prior.means.data.normal_()
    prior.log_scales.data.normal_(std=0.5)
    return prior


def oracle(prior: Mixture) -> MixtureSameFamily:
    means, scales = prior.means.detach().double(), prior.log_scales.detach().double().exp()
    weights = Categorical(logits=prior.logits.detach().double())
    return MixtureSameFamily(weights, Independent(Normal(means, scales), 1))


@pytest.fixture
def posterior() -> DiagonalGaussian:
    torch.manual_seed(0)
    return DiagonalGaussian(*torch.randn(2, 6, 5).double())


def test_its_values_are_those_of_torch_distributions(posterior: DiagonalGaussian) -> None:
    prior = mixture(5)
    noise = torch.randn(3, 6, 5).double()
    latents = posterior.sample(noise)
    q = Independent(Normal(posterior.mean, (0.5 * posterior.log_variance).exp()), 1)
    torch.testing.assert_close(prior.log_prob(latents), oracle(prior).log_prob(latents))
    expected = oracle(prior).log_prob(latents) - q.log_prob(latents)
    ratio = prior.log_ratio(posterior, latents, noise, prior.log_prob(latents))
    torch.testing.assert_close(ratio, expected)
    kl = prior.kl(posterior, latents, ratio)  # one group
    assert kl.shape == (3, 6, 1)
    torch.testing.assert_close(kl.squeeze(2), -expected)


def test_the_standard_normals_ratio_and_kl_are_those_of_any_prior(posterior: DiagonalGaussian) -> None:
    """The shortcuts of N(0, I) equal what the base class computes from its density."""
    prior = StandardNormal(5)
    noise = torch.randn(20_000, 6, 5).double()
    latents = posterior.sample(noise)
    ratio = prior.log_ratio(posterior, latents, noise, prior.log_prob(latents))
    torch.testing.assert_close(ratio, Prior.log_ratio(prior, posterior, latents, noise, prior.log_prob(latents)))
    kl = prior.kl(posterior, latents, ratio)
    assert kl.shape == (20_000, 6, 5)
    estimates = Prior.kl(prior, posterior, latents, ratio).squeeze(2)
    error = estimates.std(0) / 20_000**0.5
    assert ((estimates.mean(0) - kl[0].sum(1)).abs() < 5 * error).all()


def test_it_starts_near_the_standard_normal() -> None:
    """Means of deviation 1 would be 10 nats away."""
    torch.manual_seed(0)
    latents = torch.randn(1, 1000, 50)
    difference = Mixture(50, 100).log_prob(latents) - StandardNormal(50).log_prob(latents)
    assert abs(difference.mean().item()) < 0.5


def test_its_draws_have_the_components_in_their_shares() -> None:
    """The three lie far apart, so that a draw tells its component."""
    prior = mixture(2)
    prior.means.data.mul_(1000)
    codes = prior(torch.randn(40_000, 3).double()).detach()
    nearest = torch.cdist(codes, prior.means.detach()).argmin(1)
    shares = prior.logits.detach().softmax(0)
    torch.testing.assert_close(nearest.bincount() / 40_000.0, shares, rtol=0, atol=0.01, check_dtype=False)
    for component in range(3):
        drawn = codes[nearest == component]
        torch.testing.assert_close(drawn.mean(0), prior.means[component].detach(), rtol=0, atol=0.1)
        torch.testing.assert_close(drawn.std(0), prior.log_scales[component].detach().exp(), rtol=0.05, atol=0)


@pytest.mark.parametrize("number", [-40.0, 0.0, 40.0])
def test_any_number_chooses_a_component(number: float) -> None:
    """The first at one end, the last at the other; noise of zeros gives a component's mean."""
    prior = mixture(2).float()
    code = prior(torch.tensor([[0.0, 0.0, number]]))
    distances = (prior.means - code).norm(dim=1)
    assert distances.min() == 0
    if number:
        assert distances.argmin() == (2 if number > 0 else 0)


def test_a_model_draws_from_it_with_as_many_numbers_as_it_needs() -> None:
    vae = build_vae(config.load(["model.latent_dim=5", "model.hidden_dims=[8]", *PRIOR]), (1, 4, 4)).double()
    assert vae.latent_dim == 5 and vae.prior_numbers == 6
    assert isinstance(vae.p_z, Mixture) and len(vae.p_z.means) == 3
    codes = vae.prior(torch.randn(40_000, 6).double()).detach()
    torch.testing.assert_close(codes.mean(0), oracle(vae.p_z).mean, rtol=0, atol=0.03)
    torch.testing.assert_close(codes.var(0), oracle(vae.p_z).variance, rtol=0.05, atol=0)
    with pytest.raises(ValueError, match=r"noise must have the shape \(3, 6\), not \(3, 5\)"):
        vae.prior(torch.zeros(3, 5).double())
    inference = vae(torch.rand(3, 1, 4, 4).double(), torch.randn(2, 3, 5).double())
    assert inference.kl.shape == (2, 3, 1)
    inference.log_ratio.sum().backward()
    assert all(weight.grad is not None and weight.grad.any() for weight in vae.p_z.parameters())


@pytest.fixture
def run_dir(make_config: MakeConfig) -> Path:
    return train(make_config("name=a", *PRIOR, "train.steps=20"))


def test_a_run_learns_it_and_resumes_bitwise(make_config: MakeConfig) -> None:
    settings = [*PRIOR, "checkpoint.every=13", "train.log_every=13", "objective.beta=0.5"]
    whole = train(make_config("name=whole", *settings))
    for steps in (13, 26, 40):
        parts = train(make_config("name=parts", f"train.steps={steps}", *settings))
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert final(parts)[name] == final(whole)[name]
    losses = [row for row in timeless(whole) if "train/loss" in row]
    for row in losses:
        assert row["train/loss"] == pytest.approx(row["train/reconstruction"] + 0.5 * row["train/kl"])
    assert losses[-1]["train/loss"] < losses[0]["train/loss"]
    assert rows(whole)[-1]["validation/negative_elbo"] < rows(whole)[0]["train/negative_elbo"]
    weights = load_file((newest_checkpoint(whole) or Path()) / "model.safetensors")
    start = build_vae(config.load([*PRIOR, "model.latent_dim=8", "model.hidden_dims=[16]"]), (1, 28, 28)).state_dict()
    for name in ("p_z.logits", "p_z.means", "p_z.log_scales"):
        assert weights[name].shape == start[name].shape and not torch.equal(weights[name], start[name])


def test_its_evaluation_has_the_kl_of_the_group_and_the_oracles_values(run_dir: Path) -> None:
    """The oracle: torch.distributions, in float64, image by image."""
    result = evaluate(run_dir, ["evaluate.importance_samples=3"])
    assert "kl_per_latent" not in result and result["latents"] == 8
    assert result["kl_per_group"] == pytest.approx([result["kl"]], rel=1e-6)
    assert json.loads((run_dir / "evaluation.json").read_text()) == result

    source = opened(run_dir)
    vae = source.checkpoint.load_vae(source.config, torch.device("cpu")).double()
    assert isinstance(vae.p_z, Mixture)
    prior = oracle(vae.p_z)
    elbos, likelihoods, kls = [], [], []
    test = read(datasets.load_test(source.config.data), range(200))
    for index, image in enumerate(to_unit(test, torch.float64).unsqueeze(1)):
        posterior = vae.infer(image)
        q = Independent(Normal(posterior.mean, (0.5 * posterior.log_variance).exp()), 1)

        def terms(noise: Tensor) -> tuple[Tensor, Tensor]:
            """log p(x|z) and log p(z) - log q(z|x)."""
            latents = q.mean + q.stddev * noise.double()  # noqa: B023
            log_prob = vae.decode(latents).log_prob(image)  # noqa: B023
            return log_prob, prior.log_prob(latents) - q.log_prob(latents)  # noqa: B023

        row = range(index, index + 1)
        log_prob, ratio = terms(standard_normal(FIXED_SEED, Stream.EVALUATION, 0, row, 8))
        elbos.append(-(log_prob + ratio).item())
        kls.append(-ratio.item())
        weights = [sum(terms(standard_normal(FIXED_SEED, Stream.IMPORTANCE, k, row, 8))) for k in range(3)]
        likelihoods.append(-(torch.logsumexp(torch.cat(weights), 0) - np.log(3)).item())  # type: ignore[arg-type]
    assert result["negative_elbo"] == pytest.approx(np.mean(elbos), abs=1e-4)
    assert result["kl"] == pytest.approx(np.mean(kls), abs=1e-4)
    assert result["negative_log_likelihood"] == pytest.approx(np.mean(likelihoods), abs=1e-4)
    assert result["standard_errors"]["kl"] == pytest.approx(np.std(kls, ddof=1) / len(kls) ** 0.5, rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_sample_is_drawn(kind: str, run_dir: Path) -> None:
    given: dict[str, list[str]] = {"codes": ["sample.codes=[[0,0,0,0,0,0,0,0]]"], "prior": ["sample.count=4"]}
    folder = sample(run_dir, [f"sample.kind={kind}", *given.get(kind, [])])
    tensors: dict[str, Any] = load_file(folder / "samples.safetensors")
    assert all(tensor.isfinite().all() for tensor in tensors.values())


@pytest.mark.parametrize(("given", "named"), [([], "the prior"), (PRIOR, "N(0, I)")])
def test_captions_call_n_0_i_the_prior_only_if_it_is(given: list[str], named: str, data_root: Path) -> None:
    digits = ["data.name=synthetic_digits", "data.synthetic_images=600", f"data.root={data_root}"]
    settings = config.load([*given, "model.latent_dim=2", "model.hidden_dims=[4]", *digits, "train.threads=1"])
    with processes.join(settings) as world:
        trained = TrainedVAE(build_vae(settings, (1, 28, 28)), settings, world)
        caption, drawn, labels = manifold(trained).description, scatter(trained), every_label(trained.test)
    assert f"evenly spaced quantiles of {named}: z0 to the right, z1 upwards" in caption
    x, y = (f"z{axis}, in standard deviations of {named}" for axis in range(2))
    assert drawn.draw() == plots.scatter(drawn.tensors["latents"], labels, x, y)


def test_samples_come_from_it(run_dir: Path) -> None:
    folder = sample(run_dir, ["sample.count=2000"])
    latents = load_file(folder / "samples.safetensors")["latents"].double()
    source = opened(run_dir)
    prior = source.checkpoint.load_vae(source.config, torch.device("cpu")).p_z
    assert isinstance(prior, Mixture)
    torch.testing.assert_close(latents.mean(0), oracle(prior).mean, rtol=0, atol=0.2)
    torch.testing.assert_close(latents.var(0), oracle(prior).variance, rtol=0.2, atol=0)
