"""The hierarchical VAE: its levels, their posteriors given the levels before, and its likelihood."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from tests.conftest import opened
from tests.test_config import refusal
from vae_dist import config
from vae_dist.distributed import processes
from vae_dist.encoding.encode import encode
from vae_dist.errors import UserError
from vae_dist.evaluation import metrics
from vae_dist.evaluation.evaluate import evaluate
from vae_dist.models import build_vae
from vae_dist.models.ladder import LadderVAE
from vae_dist.models.posteriors import LOG_VARIANCE_BOUND
from vae_dist.objectives import log_weights
from vae_dist.reports import plane
from vae_dist.reports.report import report
from vae_dist.training.loop import train
from vae_dist.views.from_images import levels
from vae_dist.views.latents import TrainedVAE, closed_form_kl
from vae_dist.views.sampling import sample

LADDER = "model.architecture=ladder"
SMALL = [LADDER, "model.channels=[4,8]", "model.levels=[1,2]", "model.latent_channels=2"]
RUN = [
    LADDER, "model.channels=[4,8,8]", "model.levels=[0,2,1]", "model.latent_channels=2", "name=ladder",
    "data.name=synthetic_digits", "data.synthetic_images=1200", "data.validation_images=200", "train.batch_size=50",
    "checkpoint.every=3",
]  # fmt: skip
SHAPES = ((2, 2, 3), (2, 2, 3), (2, 4, 6))  # of the latents of images of 4 x 6


def make(*arguments: str, shape: Sequence[int] = (1, 4, 6), scale: float = 1.0) -> LadderVAE:
    """A model in float64; `scale` multiplies its weights: initial ones are near to a posterior that is the prior."""
    vae = build_vae(config.load([*SMALL, *arguments]), shape).double()
    assert isinstance(vae, LadderVAE)
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            if "posteriors" in name or "log_variance" in name:
                parameter.mul_(scale)
    return vae


def by_level(codes: Tensor) -> list[Tensor]:
    parts = codes.split([math.prod(shape) for shape in SHAPES], dim=-1)
    return [part.unflatten(-1, shape) for part, shape in zip(parts, SHAPES, strict=True)]


def bounded(raw: Tensor) -> Tensor:
    return LOG_VARIANCE_BOUND * torch.tanh(raw / LOG_VARIANCE_BOUND)


def test_the_terms_are_those_of_each_level_given_the_draws_before() -> None:
    """Written out for each draw and image alone, in latents instead of codes: p(z_n | ...) has location 0 there."""
    torch.manual_seed(0)
    vae = make(scale=5.0)
    images, noise = torch.rand(3, 1, 4, 6).double(), torch.randn(2, 3, 2 * (6 + 6 + 24)).double()
    inference = vae(images, noise)
    high = vae.encoder.resolutions[0](images)
    features = [vae.encoder.resolutions[1](high)] * 2 + [high]
    for draw in range(2):
        for image in range(3):
            x = vae.decoder.start.expand(1, 8, 2, 3)
            kl, log_ratio, codes, numbers = [], torch.zeros(()).double(), [], by_level(noise[draw, image])
            layers: Any = iter(vae.decoder.layers)
            for level in range(3):
                layer = next(layers)
                if level == 2:
                    x, layer = layer(x), next(layers)
                joined = torch.cat([features[level][image : image + 1], x], 1)
                mean, raw = vae.encoder.posteriors[level](joined).chunk(2, dim=1)
                scale = (0.5 * bounded(layer.log_variance(x))).exp()
                p, q = Normal(torch.zeros_like(scale), scale), Normal(scale * mean, scale * (0.5 * bounded(raw)).exp())
                z = q.mean + q.stddev * numbers[level]
                kl.append(kl_divergence(q, p).flatten())
                log_ratio = log_ratio + (p.log_prob(z) - q.log_prob(z)).sum()
                codes.append((z / scale).flatten())
                x = layer.block(x + layer.latents(z))
            torch.testing.assert_close(inference.kl[draw, image], torch.cat(kl))
            torch.testing.assert_close(inference.log_ratio[draw, image], log_ratio)
            torch.testing.assert_close(inference.latents[draw, image], torch.cat(codes))
            expected = next(layers)(x)[0].sigmoid()
            torch.testing.assert_close(inference.likelihood.mean[3 * draw + image], expected)
    assert inference.kl.mean() > 0.1  # the posteriors are not the prior


def test_an_inference_agrees_with_the_posteriors_density_and_the_decoder() -> None:
    torch.manual_seed(0)
    vae = make(scale=5.0)
    images, noise = torch.rand(3, 1, 4, 6).double(), torch.randn(5, 3, 72).double()
    inference = vae(images, noise)
    posterior, latents = inference.posterior, inference.latents
    torch.testing.assert_close(posterior.sample(noise), latents)
    torch.testing.assert_close(vae.p_z.log_prob(latents) - posterior.log_prob(latents), inference.log_ratio)
    torch.testing.assert_close(vae.decode(latents.flatten(0, 1)).mean, inference.likelihood.mean)
    torch.testing.assert_close(posterior.sample(torch.zeros(3, 72).double()), posterior.mean)
    alone = vae.sample(posterior, noise[2:3])
    torch.testing.assert_close(alone.latents[0], latents[2])
    torch.testing.assert_close(alone.kl[0], inference.kl[2])
    torch.testing.assert_close(alone.log_ratio[0], inference.log_ratio[2])
    torch.testing.assert_close(alone.likelihood.mean, inference.likelihood.mean[6:9])


def test_a_level_depends_on_the_levels_before_and_not_on_those_after() -> None:
    torch.manual_seed(0)
    vae = make(scale=5.0)
    posterior, noise = vae.infer(torch.rand(1, 1, 4, 6).double()), torch.randn(1, 72).double()
    for level, start in enumerate((0, 12, 24)):
        other = noise.clone()
        other[0, start] += 1
        given, changed = (posterior.draw(numbers).posterior.mean for numbers in (noise, other))
        differs = [not torch.equal(*pair) for pair in zip(by_level(given), by_level(changed), strict=True)]
        assert differs == [number > level for number in range(3)]


def test_importance_weights_and_draws_from_the_prior_agree_on_the_probability_of_every_image() -> None:
    """All 16 images of 2 x 2 binary pixels: by both, their probabilities sum to 1."""
    torch.manual_seed(0)
    arguments = ["model.channels=[4,4]", "model.levels=[1,1]", "model.latent_channels=1"]
    vae = make(*arguments, shape=(1, 2, 2), scale=3.0)
    with torch.no_grad():
        for parameter in vae.decoder.layers[-1].parameters():
            parameter.mul_(10)  # of the logits
        images = torch.cartesian_prod(*[torch.tensor([0.0, 1.0]).double()] * 4).view(16, 1, 2, 2)
        weights = log_weights(vae(images, torch.randn(4000, 16, 5).double()), images).exp()
        likelihood = vae.decode(torch.randn(4000, 5).double())
        prior = torch.stack([likelihood.log_prob(image.expand(4000, 1, 2, 2)).exp().mean() for image in images])
    assert prior.sum().item() == pytest.approx(1.0, abs=1e-9)
    assert weights.mean(0).sum().item() == pytest.approx(1.0, abs=0.03)
    torch.testing.assert_close(weights.mean(0), prior, rtol=0.15, atol=0)
    assert prior.max() > 2 * prior.min()


def test_no_gradient_flows_through_a_detached_posterior_but_through_the_latents() -> None:
    torch.manual_seed(0)
    vae = make("model.conditional=true", "data.classes=[a,b]", scale=5.0)
    images, labels = torch.rand(2, 1, 4, 6).double(), torch.tensor([0, 1])
    latents = torch.randn(2, 72).double().requires_grad_()
    posterior = vae.infer(images, labels)
    weights = list(vae.parameters())
    assert sum(gradients(posterior.log_prob(latents), weights)) > 20
    detached = posterior.detached()
    assert torch.equal(detached.mean, posterior.mean) and not detached.mean.requires_grad
    assert not any(gradients(detached.log_prob(latents), weights))
    by_latents = [torch.autograd.grad(q.log_prob(latents).sum(), latents)[0] for q in (posterior, detached)]
    assert torch.equal(*by_latents) and by_latents[0].abs().min() > 0


def gradients(value: Tensor, weights: Sequence[Tensor]) -> list[bool]:
    found = torch.autograd.grad(value.sum(), weights, allow_unused=True)
    return [gradient is not None and bool(gradient.abs().sum() > 0) for gradient in found]


def test_images_of_another_size_have_more_latents_in_each_level() -> None:
    vae = make()
    assert vae.latent_shapes((1, 4, 6)) == SHAPES
    assert vae.latent_shapes((1, 8, 4)) == ((2, 4, 2), (2, 4, 2), (2, 8, 4))
    images = torch.rand(2, 1, 8, 4).double()
    inference = vae(images, torch.zeros(1, 2, 96).double())
    assert inference.likelihood.mean.shape == (2, 1, 8, 4)
    torch.testing.assert_close(vae.decode(inference.latents[0], (1, 8, 4)).mean, inference.likelihood.mean)
    with pytest.raises(ValueError, match=r"images of 5 x 6 can't be encoded: use sizes that 2 divides, fewer model.ch"):
        vae.infer(torch.rand(1, 1, 5, 6).double())


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["model.levels=[0,1]"],
        ["model.channels=[4,4,4]", "model.levels=[0,3,1]"],
        ["model.channels=[4]", "model.levels=[2]"],
        ["model.channels=[4,8]", "model.patch=2", "model.levels=[2,1]", "model.blocks=2"],
    ],
)
def test_the_config_knows_the_latents_and_a_bound_of_the_weights(arguments: list[str]) -> None:
    vae = make(*arguments, shape=(3, 8, 12))
    assert isinstance(vae.options, config.LadderConfig)
    assert vae.options.latents((3, 8, 12)) == vae.latent_dim
    levels = sum(vae.options.levels)
    assert len(vae.latent_shapes((3, 8, 12))) == len(vae.encoder.posteriors) == levels
    weights = sum(parameter.numel() for parameter in vae.parameters())
    assert weights / 4 < vae.options.weights_at_least((3, 8, 12)) <= weights


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["model.channels=[8,16]"],
            "model.levels=[0,1,2] needs a number for each of model.channels=[8,16]: how many levels of latents there "
            "are at that resolution",
        ),
        (["model.levels=[0,2,0]"], "model.levels=[0,2,0] ends with 0: the lowest resolution, the last, needs at least"),
        (["model.levels=[0,-1,1]"], "model.levels must be at least 0, not -1"),
        (["model.levels=[]"], "model.levels=[] needs a number for each of model.channels=[32,64,128]"),
        ([f"model.levels=[0,0,{10**18}]"], "the model's weights"),
        (["model.architecture=conv", "model.levels=[1]"], "model.levels does not apply to model.architecture=conv"),
    ],
)
def test_levels_that_no_model_can_have_are_refused(arguments: list[str], expected: str) -> None:
    assert expected in refusal(LADDER, *arguments)


@pytest.fixture(scope="module")
def run_dir(smoke_arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(
        config.load([*smoke_arguments[1:], *RUN, f"runs_dir={tmp_path_factory.mktemp('runs')}", "train.steps=6"])
    )


def test_a_run_resumes_bitwise(run_dir: Path, smoke_arguments: list[str], tmp_path: Path) -> None:
    for steps in (3, 6):
        resumed = train(config.load([*smoke_arguments[1:], *RUN, f"runs_dir={tmp_path}", f"train.steps={steps}"]))
    weights = [load_file(folder / "checkpoints/step_00000006/model.safetensors") for folder in (run_dir, resumed)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_an_evaluation_has_the_kl_of_each_level(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = evaluate(run_dir, ["evaluate.importance_samples=3", "train.threads=1"])
    assert len(result["kl_per_latent"]) == result["latents"] == 2 * (49 + 2 * 196)
    assert len(result["kl_per_level"]) == 3 and sum(result["kl_per_level"]) == pytest.approx(result["kl"], rel=1e-5)
    assert result["kl_per_level"][0] == pytest.approx(sum(result["kl_per_latent"][:98]), rel=1e-6)
    assert result["negative_log_likelihood"] <= result["negative_elbo"] + 1
    printed = [row.split("│")[1:3] for row in capsys.readouterr().out.splitlines() if "of level" in row]
    assert [name.strip() for name, _ in printed] == [f"KL of level {number}" for number in (1, 2, 3)]
    assert [float(value) for _, value in printed] == pytest.approx(result["kl_per_level"], abs=1e-4)


def test_the_columns_of_levels_keep_the_first_ones_alone(run_dir: Path) -> None:
    folder = sample(run_dir, ["sample.kind=levels", "sample.images=[4,2]", "train.threads=1"])
    stored = load_file(folder / "samples.safetensors")
    latents = stored["latents"].unflatten(0, (2, 3))
    for columns, end in enumerate((98, 490, 882)):
        assert torch.equal(latents[:, columns, :end], latents[:, 2, :end])
        assert not latents[:, columns, end:].any()
    source = opened(run_dir)
    vae = source.checkpoint.load_vae(source.config, torch.device("cpu"))
    torch.testing.assert_close(latents[:, 2], vae.infer(stored["test_images"]).mean)
    torch.testing.assert_close(stored["images"], vae.decode(stored["latents"]).mean)


def test_draws_are_encoded_and_posteriors_are_refused(run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not means and variances alone: use encode\.latents=draws"):
        encode(run_dir, ["train.threads=1", f"output={tmp_path}", "encode.latents=posterior"])
    assert not list(tmp_path.iterdir())
    folder = encode(run_dir, ["train.threads=1", f"output={tmp_path}", "encode.dtype=fp32"])
    assert folder.name.endswith("_train_draws_seed_0")
    (file,) = folder.glob("*.safetensors")
    assert load_file(file)["latents"].shape == (1000, 882)


@pytest.mark.slow
def test_the_report_is_written(run_dir: Path) -> None:
    assert "ladder 4-8-8, levels 0-2-1" in report(run_dir).read_text()


@pytest.mark.parametrize("conditional", [False, True])
def test_views_and_reports_have_the_kl_of_draws_and_not_that_at_the_means(conditional: bool, data_root: Path) -> None:
    """The oracle: an evaluation's."""
    digits = ["data.name=synthetic_digits", "data.synthetic_images=600", "data.image_shape=[1,28,28]"]
    classes = ["model.conditional=true", f"data.classes={[*range(10)]}".replace(" ", "")] if conditional else []
    settings = config.load([*SMALL, *digits, *classes, f"data.root={data_root}", "device=cpu", "train.threads=1"])
    with processes.join(settings) as world:
        vae = make(*classes, shape=(1, 28, 28), scale=5.0).float()
        trained = TrainedVAE(vae, settings, world)
        expected = metrics.encode(vae, trained.test, world, settings).kl
        torch.testing.assert_close(trained.kl, expected)
        assert trained.by_kl.tolist() == expected.argsort(descending=True).tolist()
        at_means = closed_form_kl(trained.posterior)
        assert (trained.kl.sum() / at_means.sum() - 1).abs() > 0.01
        assert trained.by_kl[:10].tolist() != at_means.argsort(descending=True)[:10].tolist()
        decoded = plane.decode_plane(vae, settings, None)
        assert decoded.kl == pytest.approx(expected.tolist(), rel=1e-5)
        assert decoded.latents == trained.by_kl[:2].tolist()


@pytest.mark.parametrize(("network", "counted"), [(SMALL, "; 3 levels: "), (["model.latent_dim=4"], "; 1 level: 4")])
def test_a_caption_counts_the_levels(network: list[str], counted: str, data_root: Path) -> None:
    digits = ["data.name=synthetic_digits", "data.synthetic_images=600", "data.image_shape=[1,28,28]"]
    settings = config.load([*network, *digits, f"data.root={data_root}", "device=cpu", "train.threads=1"])
    with processes.join(settings) as world:
        trained = TrainedVAE(build_vae(settings, (1, 28, 28)), settings, world)
        assert counted in levels(trained).description
