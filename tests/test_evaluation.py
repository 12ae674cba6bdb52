import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributions import Bernoulli, MultivariateNormal, Normal

from tests.conftest import MakeConfig, Parts, opened
from tests.sources import of_pixels
from vae_dist import config
from vae_dist.config import ObjectiveConfig
from vae_dist.data import datasets
from vae_dist.data.source import DataInfo, Source, read, select
from vae_dist.distributed import processes
from vae_dist.distributed.world import World
from vae_dist.errors import UserError
from vae_dist.evaluation import protocol
from vae_dist.evaluation.evaluate import evaluate
from vae_dist.evaluation.metric_table import measurements
from vae_dist.evaluation.metrics import encode, measure, negative_log_likelihood, score
from vae_dist.evaluation.protocol import comparison_warning
from vae_dist.evaluation.similarity import PSNR_PROTOCOL
from vae_dist.models import build_vae
from vae_dist.models.likelihoods import GaussianPixels
from vae_dist.models.pixel_distributions import Gaussian, Number
from vae_dist.models.posteriors import LOG_VARIANCE_BOUND
from vae_dist.models.priors import StandardNormal
from vae_dist.models.tensors import Shape, to_unit
from vae_dist.models.vae import VAE
from vae_dist.objectives import active_units, elbo_terms
from vae_dist.plan import FIXED_SEED, Stream, standard_normal
from vae_dist.runs.run import RunDirectory
from vae_dist.terminal import progress
from vae_dist.training.loop import train
from vae_dist.views.sampling import sample


@pytest.fixture(scope="module")
def trained(smoke_arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs_dir = tmp_path_factory.mktemp("runs")
    return train(config.load([*smoke_arguments, f"runs_dir={runs_dir}", "name=a", "train.steps=10"]))


@pytest.fixture
def run_dir(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "runs/a"))


@pytest.fixture
def binary_run(make_config: MakeConfig) -> Path:
    return train(make_config("name=binary", "train.steps=40", "data.binarize=dynamic"))


def estimate(vae: VAE, images: Source, *arguments: str) -> Tensor:
    """The negative log-likelihood of each image, by one process."""
    settings = config.load(["device=cpu", "train.threads=1", *arguments])
    with processes.join(settings) as world:
        return negative_log_likelihood(vae, images, world, settings)


def estimate_of_run(run_dir: Path, *arguments: str) -> Tensor:
    source = opened(run_dir, arguments)
    vae = source.checkpoint.load_vae(source.config, torch.device("cpu"))
    return estimate(vae, datasets.load_test(source.config.data), *arguments)


PIXELS = torch.randint(0, 256, (300, 1, 3, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
SIGMA = 0.3


class Linear(VAE):
    """A VAE of two linear layers, with four latents."""

    def __init__(self, encoder: nn.Module, decoder: nn.Module) -> None:
        super().__init__((1, 3, 4), GaussianPixels(ObjectiveConfig(sigma=SIGMA)))
        self.encoder = nn.Sequential(nn.Flatten(), encoder)
        self.decoder = nn.Sequential(decoder, nn.Unflatten(1, (1, 3, 4)))
        self.p_z = StandardNormal(4)

    def latent_shapes(self, image_shape: Shape) -> tuple[Shape, ...]:
        return ((4,),)


def linear_gaussian_vae(shift: float = 0.0, widen: float = 0.0) -> tuple[VAE, Tensor]:
    """A VAE whose p(x) is known, and log p(x) of `PIXELS`.

    x = W z + b + sigma e with orthogonal columns in W, so that the exact posterior is a diagonal Gaussian; the encoder
    returns its mean plus `shift` and its log-variance plus `widen`. The fourth latent is dead: its column is 0.
    """
    generator = torch.Generator().manual_seed(1)
    columns = torch.linalg.qr(torch.randn(12, 3, generator=generator).double()).Q * torch.tensor([1.0, 0.5, 0.2])
    weight, bias = torch.cat([columns, torch.zeros(12, 1)], 1).double(), torch.full((12,), 0.5).double()
    variance = 1 / (1 + weight.square().sum(0) / SIGMA**2)
    encoder, decoder = nn.Linear(12, 8).double(), nn.Linear(4, 12).double()
    with torch.no_grad():
        decoder.weight.copy_(weight)
        decoder.bias.copy_(bias)
        to_mean = (variance / SIGMA**2).unsqueeze(1) * weight.T
        raw = LOG_VARIANCE_BOUND * torch.atanh((variance.log() + widen) / LOG_VARIANCE_BOUND)
        encoder.weight.copy_(torch.cat([to_mean, torch.zeros(4, 12)]))
        encoder.bias.copy_(torch.cat([shift - to_mean @ bias, raw]))
    vae = Linear(encoder, decoder).eval()
    marginal = MultivariateNormal(bias, weight @ weight.T + SIGMA**2 * torch.eye(12).double())
    return vae, marginal.log_prob(to_unit(PIXELS, torch.float64).flatten(1))


@pytest.mark.parametrize("count", [1, 7, 100])
def test_with_the_exact_posterior_any_number_of_samples_is_exact(count: int) -> None:
    vae, log_likelihood = linear_gaussian_vae()
    estimates = estimate(vae, of_pixels(PIXELS), f"evaluate.importance_samples={count}", "evaluate.chunk=700")
    torch.testing.assert_close(estimates, -log_likelihood, rtol=0, atol=1e-9)


def test_with_another_posterior_the_estimate_falls_to_the_exact_value() -> None:
    vae, log_likelihood = linear_gaussian_vae(shift=0.3, widen=0.5)
    excess = [
        (estimate(vae, of_pixels(PIXELS), f"evaluate.importance_samples={count}") + log_likelihood).mean().item()
        for count in (1, 10, 100, 5000)
    ]
    assert excess == sorted(excess, reverse=True)
    assert excess[0] > 0.3 and 0 < excess[2] < 0.02 and abs(excess[3]) < 1e-3


def test_the_estimate_matches_torch_distributions_sample_by_sample(binary_run: Path) -> None:
    """The oracle: one image and one sample at a time, in float64."""
    source = opened(binary_run)
    vae = source.checkpoint.load_vae(source.config, torch.device("cpu")).double()
    pixels = read(datasets.load_test(source.config.data), range(5))
    expected = []
    for index, image in enumerate(to_unit(pixels, torch.float64)):
        posterior = vae.infer(image.unsqueeze(0))
        q, weights = Normal(posterior.mean, (0.5 * posterior.log_variance).exp()), []
        for number in range(9):
            row = range(index, index + 1)
            noise = standard_normal(FIXED_SEED, Stream.IMPORTANCE, number, row, vae.latent_dim)
            latents = q.mean + q.stddev * noise
            log_prob = Bernoulli(logits=vae.decoder(latents)[0]).log_prob(image).sum()
            ratio = (Normal(0.0, 1.0).log_prob(latents) - q.log_prob(latents)).sum()
            weights.append((log_prob + ratio).item())
        expected.append(-np.logaddexp.reduce(weights) + np.log(9))
    single = estimate(vae.float(), of_pixels(pixels), "evaluate.importance_samples=9", "evaluate.chunk=20")
    np.testing.assert_allclose(single.numpy(), expected, rtol=0, atol=1e-4)


def test_chunks_and_threads_move_the_estimate_below_a_ten_thousandth(binary_run: Path) -> None:
    cuts = [
        ["evaluate.chunk=1"],
        ["evaluate.chunk=640", "evaluate.batch_size=64"],
        ["evaluate.chunk=1000000"],
        ["evaluate.batch_size=7"],
        ["train.threads=2"],
    ]
    whole = estimate_of_run(binary_run, "evaluate.importance_samples=50")
    for cut in cuts:
        part = estimate_of_run(binary_run, "evaluate.importance_samples=50", *cut)
        torch.testing.assert_close(part, whole, rtol=0, atol=1e-4)


def test_more_samples_begin_with_the_same_ones_and_tighten_the_bound(binary_run: Path) -> None:
    estimates = {count: estimate_of_run(binary_run, f"evaluate.importance_samples={count}") for count in (1, 9, 90)}
    means = [value.mean().item() for value in estimates.values()]
    assert means == sorted(means, reverse=True) and means[0] > means[2] + 1
    for count in (9, 90):  # the first weight alone contributes 1 / count of itself to the mean weight
        assert (estimates[count] <= estimates[1] + math.log(count) + 1e-4).all()
    result = evaluate(binary_run, ["evaluate.importance_samples=90"])
    assert result["negative_log_likelihood"] == pytest.approx(means[2], abs=1e-4) and means[2] < result["negative_elbo"]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_not_finite_makes_its_estimate_nan(bad: float) -> None:
    """A sum would hide a weight of zero, whose logarithm is -inf."""
    vae, _ = linear_gaussian_vae()

    class Spoiled(Gaussian):
        def log_prob(self, images: Tensor) -> Tensor:
            values = super().log_prob(images)
            if len(values) == 1200:  # four samples of each of the 300 images: the ELBO, of one sample, stays finite
                values[33] = bad
            return values

    class SpoiledPixels(GaussianPixels):
        def distribution(self, location: Tensor, sigma: Number) -> Gaussian:
            return Spoiled(location, sigma)

    vae.likelihood = SpoiledPixels(ObjectiveConfig(sigma=SIGMA))
    arguments = ["evaluate.importance_samples=4", "evaluate.batch_size=300", "evaluate.chunk=1200"]
    estimates = estimate(vae, of_pixels(PIXELS), *arguments)
    assert estimates[33].isnan() and estimates.isfinite().sum() == 299
    message = r"negative_log_likelihood is not finite for 1 of 300 images \(the first: image 33\)"
    settings = config.load(["device=cpu", *arguments])
    with processes.join(settings) as world, pytest.raises(UserError, match=message):
        measure(vae, of_pixels(PIXELS), world, settings)


def test_a_model_whose_metrics_are_not_finite_is_refused(run_dir: Path) -> None:
    source = opened(run_dir)
    vae = source.checkpoint.load_vae(source.config, torch.device("cpu"))
    parts = Parts(vae, source.config)
    parts.optimizer.step([torch.ones_like(parameter) for parameter in vae.parameters()], torch.tensor(1e-3))
    list(vae.decoder.parameters())[-2].data.mul_(1e38)  # finite, or it could not be saved
    state = source.checkpoint.state
    state.step = 11
    RunDirectory(run_dir).save(source.config, parts, state)
    with pytest.raises(UserError, match=r"negative_elbo is not finite for 200 of 200 images .* evaluate an earlier"):
        evaluate(run_dir, ["evaluate.importance_samples=0"])
    assert not (run_dir / "evaluation.json").exists()
    assert evaluate(run_dir / "checkpoints/step_00000010")["step"] == 10


def test_a_dead_latent_is_not_active_and_has_no_kl() -> None:
    vae, _ = linear_gaussian_vae()
    settings = config.load(["device=cpu", "evaluate.batch_size=70"])
    with processes.join(settings) as world:
        encodings = encode(vae, of_pixels(PIXELS), world, settings)
    means = vae.infer(to_unit(PIXELS, torch.float64)).mean.detach()
    np.testing.assert_allclose(encodings.variance, np.var(means.numpy(), axis=0), rtol=1e-12, atol=1e-15)
    assert active_units(encodings.variance) == 3
    assert encodings.kl[3].abs() < 1e-12 and (encodings.kl[:3] > 0.01).all()
    decoded = vae.decode(means).mean.detach().numpy()
    expected = ((decoded - PIXELS.numpy() / 255.0) ** 2).mean((1, 2, 3))
    np.testing.assert_allclose(encodings.squared_error.numpy(), expected)


def test_one_image_has_no_statistics_over_images() -> None:
    vae, _ = linear_gaussian_vae()
    settings = config.load(["device=cpu", "evaluate.importance_samples=0"])
    with processes.join(settings) as world:
        metrics, _ = measure(vae, of_pixels(PIXELS[:1]), world, settings)
    assert metrics["active_units"] is None and set(metrics["standard_errors"].values()) == {None}
    shown = {one.metric.key: one.error for one in measurements(metrics)}
    assert "active_units" not in shown and shown["negative_elbo"] is None


def test_standard_errors_and_bits_are_those_of_numpy(binary_run: Path) -> None:
    arguments = ["evaluate.importance_samples=5"]
    result, source = evaluate(binary_run, arguments), opened(binary_run, arguments)
    test = datasets.load_test(source.config.data)
    with processes.join(source.config) as world:
        vae = source.checkpoint.load_vae(source.config, world.device)
        terms = score(vae, test, world, source.config)
        encodings = encode(vae, test, world, source.config)
        nll = negative_log_likelihood(vae, test, world, source.config)
    by_image = {
        "negative_elbo": terms.negative_elbo.numpy(),
        "reconstruction": terms.reconstruction.numpy(),
        "kl": terms.kl.numpy(),
        "negative_log_likelihood": nll.numpy(),
        "mean_squared_error": encodings.squared_error.numpy(),
        "psnr": encodings.similarity["psnr"].numpy(),
        "ssim": encodings.similarity["ssim"].numpy(),
    }
    assert result["standard_errors"].keys() == by_image.keys()
    for name, values in by_image.items():
        assert result[name] == pytest.approx(np.mean(values))
        assert result["standard_errors"][name] == pytest.approx(np.std(values, ddof=1) / np.sqrt(200))
    assert result["bits_per_dimension"] == pytest.approx(np.mean(nll.numpy()) / (28 * 28 * np.log(2)))
    assert sum(result["kl_per_latent"]) == pytest.approx(result["kl"], rel=1e-5) and len(result["kl_per_latent"]) == 8

    without = evaluate(binary_run, ["evaluate.importance_samples=0"])
    assert without["negative_log_likelihood"] is None and without["importance_samples"] == 0
    assert without["bits_per_dimension"] == pytest.approx(result["negative_elbo"] / (28 * 28 * np.log(2)))


@pytest.mark.parametrize(
    ("arguments", "warning"),
    [
        (["data.binarize=dynamic"], None),
        (["data.binarize=none"], "a Bernoulli of pixels that are not binary is not a likelihood"),
        (["data.binarize=threshold"], "cut at half of white"),
        (["objective.reconstruction=gaussian"], "a density, of which sigma decides the size"),
    ],
)
def test_incomparable_metrics_have_a_warning(
    arguments: list[str], warning: str | None, make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    result = evaluate(train(make_config("name=a", "train.steps=1", *arguments)), ["evaluate.importance_samples=2"])
    assert result["comparable"] is (warning is None)
    shown = capsys.readouterr().out
    assert (warning or "") in (result["warning"] or "") and (result["warning"] or "") in shown
    assert "mean over the images ± its standard error\npixels " in shown  # lines, not one line with escapes
    is_probability = arguments[0] in ("data.binarize=dynamic", "data.binarize=threshold")
    assert (result["bits_per_dimension"] is not None) is is_probability
    assert math.isfinite(result["negative_log_likelihood"])


def test_a_warning_holds_for_colour_images_of_ones_own(make_config: MakeConfig) -> None:
    colour = make_config("data.name=folder", "data.path=/home/me/pictures", "data.image_shape=[3,8,8]")
    assert comparison_warning(colour, "pictures") == (
        "a Bernoulli of pixels that are not binary is not a likelihood: compare these numbers with others on the same "
        "pixels of pictures, not with papers on binarised images (for those, train on grey images with "
        "data.binarize=dynamic)"
    )
    cut = make_config("objective.reconstruction=gaussian", "data.binarize=threshold")
    density = comparison_warning(cut, "pictures")
    assert density is not None and "is a density, of which sigma decides the size" in density


def test_the_protocol_states_the_conditions_of_the_metrics(binary_run: Path) -> None:
    stated = evaluate(binary_run, ["evaluate.importance_samples=3", "train.threads=1"])["protocol"]
    expected = {
        "dataset": "synthetic_digits", "split": "test", "images": 200, "image_shape": [1, 28, 28],
        "likelihood": "bernoulli", "posterior_samples": 1, "importance_samples": 3, "noise_seed": 0,
        "precision": "fp32", "training_precision": "fp32", "device": "cpu", "threads": 1, "batch_size": 500,
    }  # fmt: skip
    assert expected.items() <= stated.items()
    assert "drawn once with seed 0" in stated["pixels"] and stated["versions"]["torch"] == torch.__version__


def test_the_protocol_is_of_the_evaluation_where_the_training_differs_and_latents_need_a_part_of_it() -> None:
    training = ["objective.samples=5", "train.precision=fp64", "data.validation_images=3", "weights=ema"]
    options = ["evaluate.batch_size=7", "evaluate.chunk=9", "evaluate.importance_samples=null", "evaluate.split=test"]
    info = DataInfo("own", 12, (1, 4, 4), None, "grey, 0 to 1", "an identity")  # too small for the window of SSIM
    given = config.load([*training, *options]), info, World.alone(torch.device("cpu"))
    of_latents = {
        "dataset": "own.npy", "split": "all", "images": 12, "image_shape": [1, 4, 4], "pixels": "grey, 0 to 1",
        "weights": "raw", "precision": "fp64", "training_precision": "fp64", "device": "cpu", "batch_size": 7,
        "threads": torch.get_num_threads(),
    }  # fmt: skip
    of_metrics = {
        "likelihood": "bernoulli", "posterior_samples": 1, "importance_samples": 0, "noise_seed": 0, "chunk": 9,
        "psnr": PSNR_PROTOCOL,
    }  # fmt: skip
    described = protocol.describe(*given, dataset="own.npy", split="all", likelihood="bernoulli", weights="raw")
    versions = described.pop("versions")
    assert described == of_latents | of_metrics
    found = protocol.of_latents(*given, dataset="own.npy", split="all", weights="raw")
    assert found == of_latents | {"versions": versions}


def test_each_split_and_number_of_samples_is_kept(run_dir: Path) -> None:
    kept = run_dir / "evaluations"
    few = evaluate(run_dir, ["evaluate.importance_samples=2"])
    held_out = evaluate(run_dir, ["evaluate.split=validation", "evaluate.importance_samples=2"])
    latest = evaluate(run_dir, ["evaluate.importance_samples=null"])
    names = ["step_00000010_test.json", "step_00000010_test_k2.json", "step_00000010_validation_k2.json"]
    assert sorted(path.name for path in kept.iterdir()) == names
    assert [json.loads((kept / name).read_text()) for name in names] == [latest, few, held_out]
    assert json.loads((run_dir / "evaluation.json").read_text()) == latest

    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    trained = next(record for record in records if "validation/negative_elbo" in record)
    assert held_out["negative_elbo"] == trained["validation/negative_elbo"]
    assert records[-2]["validation/negative_log_likelihood"] == held_out["negative_log_likelihood"]
    assert records[-3]["test/active_units"] == few["active_units"] and records[-3]["test/importance_samples"] == 2
    assert "test/negative_log_likelihood" not in records[-1]


def test_a_run_without_validation_images_cannot_be_evaluated_on_them(make_config: MakeConfig) -> None:
    run_dir = train(make_config("name=a", "train.steps=1", "data.validation_images=0"))
    with pytest.raises(UserError, match=r"use evaluate\.split=test"):
        evaluate(run_dir, ["evaluate.split=validation"])


def test_a_long_estimate_shows_its_progress(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate(run_dir)
    assert "left" not in capsys.readouterr().err  # it ends before the first message is due
    monkeypatch.setattr(progress, "LINE_SECONDS", 0)
    evaluate(run_dir, ["evaluate.importance_samples=100", "evaluate.chunk=5000"])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("negative log-likelihood: ")]
    assert [line.split()[2] for line in lines] == ["25%,", "50%,", "75%,", "100%,"]
    assert lines[-1].endswith("0:00 left")


def test_every_image_counts_once_also_in_a_last_smaller_chunk(run_dir: Path, make_config: MakeConfig) -> None:
    """The oracle: the test images one by one."""
    result = evaluate(run_dir, ["evaluate.batch_size=64"])  # 200 images: three chunks and a smaller one
    assert result["images"] == 200 and result["split"] == "test" and result["step"] == 10

    source = opened(run_dir)
    vae = source.checkpoint.load_vae(source.config, torch.device("cpu"))
    test = datasets.load_test(source.config.data)
    expected = []
    for index in range(200):
        image = to_unit(read(test, [index]))
        noise = standard_normal(FIXED_SEED, Stream.EVALUATION, 0, range(index, index + 1), vae.latent_dim)
        expected.append(elbo_terms(vae(image, noise.unsqueeze(0)), image).negative_elbo)
    assert result["negative_elbo"] == pytest.approx(torch.cat(expected).double().mean().item(), abs=1e-4)
    assert result["negative_elbo"] == pytest.approx(result["reconstruction"] + result["kl"])


def test_fewer_large_images_are_computed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """500 images of 256 x 256 would take a wide decoder 100 GiB, at the first validation of a training."""
    sizes: list[int] = []
    infer = VAE.infer

    def noted(self: VAE, images: Tensor, *rest: Any) -> Any:
        sizes.append(len(images))
        return infer(self, images, *rest)

    monkeypatch.setattr(VAE, "infer", noted)
    images = of_pixels(torch.zeros(13, 3, 256, 256, dtype=torch.uint8))
    settings = config.load(["model.hidden_dims=[1]", "evaluate.importance_samples=3", "device=cpu"])
    with processes.join(settings) as world:
        vae = build_vae(settings, (3, 256, 256))
        for measure in score, encode, negative_log_likelihood:
            measure(vae, images, world, settings)
    assert sizes == [10, 3] * 3
    small, large, chosen = (1, 28, 28), (3, 4096, 4096), config.load(["evaluate.batch_size=7", "evaluate.chunk=9"])
    options = settings.evaluate
    assert [options.images_at_once(shape) for shape in (small, large)] == [500, 1]
    assert [options.draws_at_once(shape) for shape in (small, large)] == [2000, 1]
    assert (chosen.evaluate.images_at_once(large), chosen.evaluate.draws_at_once(large)) == (7, 9)


def test_an_evaluation_is_reproducible_bitwise(run_dir: Path) -> None:
    assert evaluate(run_dir) == evaluate(run_dir)


def test_metrics_are_written_to_the_files_of_the_contract(run_dir: Path) -> None:
    result = evaluate(run_dir)
    assert json.loads((run_dir / "evaluation.json").read_text()) == result
    assert json.loads((run_dir / "evaluations/step_00000010_test_k128.json").read_text()) == result
    names = {"dataset", "split", "images", "step", "negative_elbo", "reconstruction", "kl"}
    assert names | {"negative_log_likelihood", "importance_samples", "active_units"} <= result.keys()
    last = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["test/negative_elbo"] == result["negative_elbo"] and last["step"] == 10
    assert (run_dir / "images/test_step_00000010.png").exists()


def test_output_can_go_elsewhere(run_dir: Path, tmp_path: Path) -> None:
    before = sorted(run_dir.rglob("*"))
    evaluate(run_dir, [f"output={tmp_path / 'out'}"])
    sample(run_dir, [f"output={tmp_path / 'out'}"])
    assert (tmp_path / "out/evaluation.json").exists()
    assert sorted(run_dir.rglob("*")) == before


def test_an_older_checkpoint_can_be_evaluated(make_config: MakeConfig) -> None:
    run_dir = train(make_config("name=a", "checkpoint.every=5", "train.steps=10"))
    older = evaluate(run_dir / "checkpoints/step_00000005")
    assert older["step"] == 5
    assert older["negative_elbo"] > evaluate(run_dir)["negative_elbo"]


@pytest.mark.slow
def test_a_run_that_was_moved_can_be_evaluated(run_dir: Path, tmp_path: Path) -> None:
    first = evaluate(run_dir)
    assert evaluate(run_dir.rename(tmp_path / "moved")) == first


@pytest.mark.slow
def test_binarised_test_images_are_the_same_in_every_evaluation(make_config: MakeConfig) -> None:
    run_dir = train(make_config("name=a", "train.steps=10", "data.binarize=dynamic"))
    assert evaluate(run_dir) == evaluate(run_dir)
    assert evaluate(run_dir)["binarize"] == "dynamic"


def test_an_images_terms_do_not_depend_on_the_images_after_its_chunk(run_dir: Path) -> None:
    source = opened(run_dir, ["evaluate.batch_size=50"])
    test = datasets.load_test(source.config.data)
    with processes.join(source.config) as world:
        vae = source.checkpoint.load_vae(source.config, world.device)
        whole = score(vae, test, world, source.config)
        first = score(vae, select(test, torch.arange(100), "the first 100"), world, source.config)
    assert torch.equal(whole.kl[:100], first.kl)
    assert torch.equal(whole.reconstruction[:100], first.reconstruction)


def test_chunks_and_threads_move_the_elbo_below_a_ten_thousandth(run_dir: Path) -> None:
    bounds = []
    for arguments in (
        ["evaluate.batch_size=200"],
        ["evaluate.batch_size=37"],
        ["train.threads=1"],
        ["train.threads=2"],
    ):
        source = opened(run_dir, arguments)
        test = datasets.load_test(source.config.data)
        with processes.join(source.config) as world:
            vae = source.checkpoint.load_vae(source.config, world.device)
            result = score(vae, test, world, source.config)
            bounds.append(result.negative_elbo)
    for other in bounds[1:]:
        torch.testing.assert_close(other, bounds[0], rtol=0, atol=1e-3)
        assert abs(other.mean() - bounds[0].mean()) < 1e-4


def test_samples_come_from_the_seed_and_more_begin_with_the_same(run_dir: Path) -> None:
    few = load_file(sample(run_dir, ["sample.count=5"]) / "samples.safetensors")
    many = load_file(sample(run_dir, ["sample.count=700"]) / "samples.safetensors")
    other = load_file(sample(run_dir, ["sample.count=5", "sample.seed=1"]) / "samples.safetensors")
    assert many["images"].shape == (700, 1, 28, 28) and many["latents"].shape == (700, 8)
    torch.testing.assert_close(many["images"][:5], few["images"])
    assert torch.equal(many["latents"][:5], few["latents"])
    assert not torch.equal(other["latents"], few["latents"])
    assert few["images"].min() >= 0 and few["images"].max() <= 1


def test_samples_are_the_means_of_the_likelihood(run_dir: Path) -> None:
    tensors = load_file(sample(run_dir, ["sample.count=5"]) / "samples.safetensors")
    source = opened(run_dir)
    vae = source.checkpoint.load_vae(source.config, torch.device("cpu"))
    torch.testing.assert_close(vae.decode(tensors["latents"]).mean, tensors["images"])


def test_chosen_codes_are_decoded_and_each_can_be_a_file(make_config: MakeConfig) -> None:
    run_dir = train(make_config("name=flat", "model.latent_dim=2", "train.steps=10"))
    codes = "[[0,0],[0,1],[1,1],[-1,-1],[-0.9,-0.9],[-0.5,-0.5]]"
    folder = sample(run_dir, [f"sample.codes={codes}", "sample.files=true"])
    tensors = load_file(folder / "samples.safetensors")
    assert tensors["latents"].tolist()[1] == [0.0, 1.0]
    assert sorted(path.name for path in folder.glob("0*.png")) == [f"{index:06d}.png" for index in range(6)]
    assert (folder / "grid.png").exists()


def test_codes_of_the_wrong_size_are_refused(run_dir: Path) -> None:
    with pytest.raises(UserError, match="codes of 2 numbers, but this model has 8 latents"):
        sample(run_dir, ["sample.codes=[[0,0]]"])
    with pytest.raises(UserError, match="codes of 1 or 8 numbers"):
        sample(run_dir, ["sample.codes=[[0],[0,0,0,0,0,0,0,0]]"])


def test_an_evaluation_during_a_training_writes_files_alone(
    make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With any `output`: the run in W&B belongs to the training."""
    run_dir = train(make_config("name=a", "train.steps=10", "tracking.wandb=offline"))
    records = sorted((run_dir / "wandb").iterdir())
    for output in run_dir, tmp_path / "elsewhere":
        with RunDirectory(run_dir).claim():
            evaluate(run_dir, ["evaluate.importance_samples=0", f"output={output}"])
        assert "a training is writing" in capsys.readouterr().err
        assert sorted((run_dir / "wandb").iterdir()) == records and not (tmp_path / "elsewhere/wandb").exists()
    assert "test/negative_elbo" in (run_dir / "metrics.jsonl").read_text()
    evaluate(run_dir, ["evaluate.importance_samples=0"])
    assert len(sorted((run_dir / "wandb").iterdir())) > len(records)
