"""The examples of docs/extending.md: each does what the page says, and all of them train together."""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, kl_divergence

import vae_dist
from tests.conftest import REPOSITORY, MakeConfig
from tests.sources import whole
from vae_dist.config import DataConfig, MLPConfig, ObjectiveConfig
from vae_dist.data.datasets import DATASETS
from vae_dist.data.source import Source, in_memory
from vae_dist.distributed import fingerprints
from vae_dist.encoding.encode import encode
from vae_dist.errors import UserError
from vae_dist.evaluation.evaluate import evaluate
from vae_dist.models import mlp
from vae_dist.models.likelihoods import LIKELIHOODS, BernoulliPixels, LocationScaleKind
from vae_dist.models.mlp import MLP
from vae_dist.models.pixel_distributions import Number
from vae_dist.models.posteriors import DiagonalGaussian
from vae_dist.models.priors import PRIORS, Prior, StandardNormal
from vae_dist.models.tensors import at_least_float32, require_shape
from vae_dist.models.vae import VAE
from vae_dist.objectives import OBJECTIVES, elbo_terms
from vae_dist.publishing.programs import make_programs
from vae_dist.reports.report import report
from vae_dist.runs.lookup import find
from vae_dist.training.loop import train
from vae_dist.views.sampling import sample

BLOCKS = re.findall(r"^```python\n(.*?)^```", (REPOSITORY / "docs/extending.md").read_text(), re.MULTILINE | re.DOTALL)
REGISTRIES: list[dict[str, Any]] = [DATASETS, LIKELIHOODS, OBJECTIVES, PRIORS]
SETTINGS = [
    "data.name=stripes", "data.validation_images=100", "objective.reconstruction=logistic", "objective.sigma=0.2",
    "objective.sigma_kind=learned",
    "objective.bound=free_bits", "objective.samples=3", "model.prior=two_gaussians", "train.steps=30",
]  # fmt: skip


@pytest.fixture
def examples() -> Iterator[dict[str, Any]]:
    """The page's names, which its blocks register."""
    before = [dict(registry) for registry in REGISTRIES]
    namespace: dict[str, Any] = {
        "DATASETS": DATASETS, "LIKELIHOODS": LIKELIHOODS, "OBJECTIVES": OBJECTIVES, "PRIORS": PRIORS,
        "F": F, "LocationScaleKind": LocationScaleKind, "NamedTuple": NamedTuple,
        "Number": Number, "Prior": Prior, "Tensor": Tensor, "math": math,
        "at_least_float32": at_least_float32, "elbo_terms": elbo_terms, "in_memory": in_memory, "nn": nn,
        "require_shape": require_shape, "torch": torch,
    }  # fmt: skip
    for block in BLOCKS:
        exec(block, namespace)
    yield namespace
    for registry, entries in zip(REGISTRIES, before, strict=True):
        registry.clear()
        registry.update(entries)


SHEAR = 2.0


class Sheared:
    """A posterior that is not diagonal: of two latents, the second depends on the draw of the first."""

    def __init__(self, base: DiagonalGaussian) -> None:
        self.base = base
        self.log_variance = base.log_variance

    @property
    def mean(self) -> Tensor:
        return self._sheared(self.base.mean, SHEAR)

    def sample(self, noise: Tensor) -> Tensor:
        return self._sheared(self.base.sample(noise), SHEAR)

    def log_prob(self, latents: Tensor) -> Tensor:
        return self.base.log_prob(self._sheared(latents, -SHEAR))

    def detached(self) -> "Sheared":
        return Sheared(self.base.detached())

    @staticmethod
    def _sheared(latents: Tensor, shear: float) -> Tensor:
        first, second = latents.split(1, -1)
        return torch.cat([first, second + shear * first], -1)


def test_the_page_has_an_example_of_each(examples: dict[str, Any]) -> None:
    assert len(BLOCKS) == 4
    assert {"stripes", "logistic", "free_bits", "two_gaussians"} <= {
        name for registry in REGISTRIES for name in registry
    }


def test_the_prior_is_a_density_and_draws_from_it(examples: dict[str, Any]) -> None:
    prior = examples["TwoGaussians"](2)
    grid = torch.cartesian_prod(torch.linspace(-8, 8, 321), torch.linspace(-8, 8, 321)).unsqueeze(0)
    assert prior.log_prob(grid).double().exp().sum().item() * 0.05**2 == pytest.approx(1.0, abs=1e-4)
    torch.manual_seed(0)
    drawn = prior(torch.randn(50_000, 3))
    torch.testing.assert_close(drawn.T.cov(), torch.tensor([[2.0, 1.0], [1.0, 2.0]]), rtol=0, atol=0.05)


def test_the_likelihood_is_a_density_and_draws_from_it(examples: dict[str, Any]) -> None:
    likelihood = examples["Logistic"](torch.full((1, 1, 1, 1), 0.5), 0.2)
    grid = torch.linspace(-6, 7, 13001).view(-1, 1, 1, 1)
    density = examples["Logistic"](torch.full_like(grid, 0.5), 0.2).log_prob(grid).double().exp()
    assert density.sum().item() * 0.001 == pytest.approx(1.0, abs=1e-4)
    quantile = likelihood.sample(torch.full((1, 1, 1, 1), 0.7))
    below = density[grid.flatten() < quantile.item()].sum().item() * 0.001
    assert below == pytest.approx(torch.special.ndtr(torch.tensor(0.7)).item(), abs=1e-3)


def test_a_scale_without_closed_form_can_not_be_optimal(examples: dict[str, Any], make_config: MakeConfig) -> None:
    optimal = "objective.sigma_kind=optimal"
    with pytest.raises(UserError, match=r"needs a closed form that logistic lacks: use objective\.sigma_kind=learned"):
        train(make_config("objective.reconstruction=logistic", optimal))


def test_all_of_them_train_evaluate_and_are_sampled(examples: dict[str, Any], make_config: MakeConfig) -> None:
    run_dir = train(make_config("name=own", *SETTINGS))
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert losses[-1] < losses[0] - 10
    result = evaluate(run_dir, ["evaluate.importance_samples=8"])
    assert re.fullmatch(r"logistic, learned sigma 0\.\d+", result["protocol"]["likelihood"])
    assert result["warning"].startswith("a Logistic of pixels is a density")
    assert len(result["kl_per_group"]) == 1 and result["kl_per_group"][0] == pytest.approx(result["kl"], rel=1e-6)
    assert result["bits_per_dimension"] is None and math.isfinite(result["negative_log_likelihood"])
    for kind in ("prior", "reconstruction", "interpolation", "neighbours"):
        assert (sample(run_dir, [f"sample.kind={kind}"]) / "grid.png").stat().st_size > 100
    assert Path(run_dir / "images").is_dir()


def test_a_posterior_that_is_not_diagonal_goes_through_every_command(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MLP, "posterior", lambda vae, parameters: Sheared(DiagonalGaussian.from_network(parameters)))
    run_dir = train(make_config("name=sheared", "model.latent_dim=2", "train.steps=2"))
    assert len(evaluate(run_dir, ["evaluate.importance_samples=4"])["kl_per_group"]) == 1
    for kind in ("interpolation", "traversal"):
        sample(run_dir, [f"sample.kind={kind}"])
    view = sample(run_dir, ["sample.kind=reconstruction", "sample.images=[3]", "sample.steps=200"])
    mean, *draws = load_file(view / "samples.safetensors")["latents"].unbind()
    first, second = (torch.stack(draws) - mean).T
    residual = (second - SHEAR * first).var()
    assert residual < second.var() / 2  # the draws are the posterior's own, not those of its means and variances
    run = vae_dist.load(run_dir)
    images = torch.zeros(2, 1, *run.model.image_shape[1:])
    torch.testing.assert_close(run.encode(images).mean, run.model.infer(images).mean)
    report(run_dir)
    folder = encode(run_dir, ["encode.split=test"])
    assert (folder / "index.json").is_file() and folder.name.endswith("_test_draws_seed_0")
    with pytest.raises(UserError, match=r"not means and variances alone: use encode\.latents=draws"):
        encode(run_dir, ["encode.split=test", "encode.latents=posterior"])


class Masked(MLP):
    """A model with a mask, and with a layer that has two names."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.again = self.decoder
        self.register_buffer("mask", torch.tensor([True, False, True]))
        self.register_buffer("nothing", torch.empty(0))


def test_a_model_with_masks_and_shared_layers_is_saved_and_resumed(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlp, "build", Masked)
    options = ["train.steps=2", "ema.decay=0.9"]
    straight = vae_dist.load(train(make_config("name=straight", *options))).model
    train(make_config("name=halted", "train.steps=1", "ema.decay=0.9"))
    resumed = vae_dist.load(train(make_config("name=halted", *options))).model
    for name, tensor in straight.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    assert resumed.again is resumed.decoder
    tensors = [torch.tensor([True, False, True])], [torch.tensor([True, True, True])]
    assert fingerprints.checksum(tensors[0]) != fingerprints.checksum(tensors[1])


class Pseudo(Prior):
    """A mixture of the posteriors of learned images (Tomczak and Welling 2018), which needs the model's encoder."""

    def __init__(self, vae: VAE) -> None:
        super().__init__(vae.latent_dim)
        self.vae = (vae,)  # not a submodule of it
        self.images = nn.Parameter(torch.rand(1, *vae.image_shape))

    def forward(self, noise: Tensor) -> Tensor:
        return self.vae[0].infer(self.images).sample(noise)

    def log_prob(self, latents: Tensor) -> Tensor:
        return self.vae[0].infer(self.images).log_prob(latents)


def test_a_model_whose_prior_needs_the_encoder_is_exported() -> None:
    vae = MLP(MLPConfig(latent_dim=2, hidden_dims=[4]), (1, 3, 3), BernoulliPixels(ObjectiveConfig()))
    vae.p_z = Pseudo(vae)
    assert make_programs(vae.requires_grad_(False), ["program"]).files.keys() == {"encoder.pt2", "decoder.pt2"}


def test_the_standard_normal_prior_estimates_the_kl_of_a_posterior_that_is_not_diagonal() -> None:
    torch.manual_seed(0)
    posterior = Sheared(DiagonalGaussian(torch.tensor([[0.3, -0.2]]), torch.tensor([[-1.0, -2.0]])))
    noise = torch.randn(100_000, 1, 2)
    latents = posterior.sample(noise)
    prior: Any = StandardNormal(2)
    kl = prior.kl(posterior, latents, prior.log_ratio(posterior, latents, noise, prior.log_prob(latents)))
    shear = torch.tensor([[1.0, 0.0], [SHEAR, 1.0]])
    covariance = shear @ posterior.base.log_variance[0].exp().diag() @ shear.T
    q = MultivariateNormal(posterior.mean[0], covariance)
    expected = kl_divergence(q, MultivariateNormal(torch.zeros(2), torch.eye(2)))
    assert kl.shape == (100_000, 1, 1)
    assert kl.mean().item() == pytest.approx(expected.item(), abs=0.03)


def test_a_run_resumes_on_no_other_images_of_a_registered_set(
    examples: dict[str, Any], make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images have the identity that their author gives them."""
    first, settings = "stripes, train", ["data.name=stripes", "data.validation_images=100", "name=a"]

    def inverted(config: DataConfig, part: str) -> Source:
        source = examples["load_stripes"](config, part)
        return in_memory(config.name, 255 - whole(source).pixels, None, f"inverted {source.info.identity}")

    run = train(make_config(*settings, "train.steps=5"))
    assert find(run, run.parent).config.data.identity == first
    assert train(make_config(*settings, "train.steps=6")) == run
    monkeypatch.setitem(DATASETS, "stripes", inverted)
    with pytest.raises(UserError, match=r"the images of data\.name=stripes are not those that run a was started with"):
        train(make_config(*settings, "train.steps=7"))
    assert find(run, run.parent).step == 6
    assert train(make_config(*settings, "train.steps=7", "name=b")) != run
