"""SSIM, LPIPS, rFID and FID of an evaluation."""

import csv
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.conftest import REPOSITORY, MakeConfig, opened
from tests.feature_weights import random_tensors
from tests.forked import ForkServer
from vae_dist import config
from vae_dist.config import EvaluateConfig
from vae_dist.data import datasets
from vae_dist.data.source import read
from vae_dist.distributed import processes
from vae_dist.distributed.world import World
from vae_dist.errors import UserError
from vae_dist.evaluation import fid, networks, similarity
from vae_dist.evaluation.evaluate import evaluate
from vae_dist.evaluation.metrics import measure
from vae_dist.evaluation.networks import Networks
from vae_dist.features import files
from vae_dist.features.inception import FIDInception
from vae_dist.features.lpips import LPIPS
from vae_dist.models.inputs import read_inputs
from vae_dist.training.loop import train
from vae_dist.views.sampling import sample

FEW = ["evaluate.importance_samples=0", "evaluate.batch_size=48", "train.threads=1"]


def pictures(*shape: int) -> tuple[Tensor, Tensor]:
    """Smooth images and noisy copies, partly out of [0, 1]."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(*shape[:2], 4, 4, generator=generator)
    images = torch.nn.functional.interpolate(coarse, shape[2:], mode="bicubic")
    return images + 0.1 * torch.randn(shape, generator=generator), images.clamp(0, 1)


def eight_bits(values: Tensor) -> np.ndarray:
    return np.rint(np.clip(values.double().numpy(), 0, 1) * 255) / 255


def test_psnr_is_that_of_8_bit_values() -> None:
    reconstructions, images = pictures(7, 3, 12, 9)
    errors = ((eight_bits(reconstructions) - eight_bits(images)) ** 2).mean((1, 2, 3))
    found = similarity.psnr(reconstructions, images)
    np.testing.assert_allclose(found.numpy(), 10 * np.log10(1 / errors), rtol=1e-12)
    order = torch.randperm(12 * 9, generator=torch.Generator().manual_seed(1))
    shuffled = [values.flatten(2)[:, :, order].view(7, 3, 12, 9) for values in (reconstructions, images)]
    assert torch.equal(similarity.psnr(shuffled[0], shuffled[1]), found)  # its sums are exact
    exact = torch.tensor(eight_bits(images))
    assert similarity.psnr(exact + 0.4 / 255, exact).tolist() == [100.0] * 7


def ssim_of_one(x: np.ndarray, y: np.ndarray) -> float:
    """SSIM of images (C, H, W), window by window (Wang et al. 2004, equations 13 to 16)."""
    distances = np.arange(11) - 5
    weights = np.exp(-(distances[:, None] ** 2 + distances[None] ** 2) / (2 * 1.5**2))
    weights /= weights.sum()
    values = []
    for channel in range(x.shape[0]):
        for row in range(x.shape[1] - 10):
            for column in range(x.shape[2] - 10):
                a, b = (image[channel, row : row + 11, column : column + 11] for image in (x, y))
                mean_a, mean_b = (weights * a).sum(), (weights * b).sum()
                variance_a, variance_b = (weights * (a - mean_a) ** 2).sum(), (weights * (b - mean_b) ** 2).sum()
                covariance = (weights * (a - mean_a) * (b - mean_b)).sum()
                values.append(
                    (2 * mean_a * mean_b + 1e-4)
                    * (2 * covariance + 9e-4)
                    / ((mean_a**2 + mean_b**2 + 1e-4) * (variance_a + variance_b + 9e-4))
                )
    return float(np.mean(values))


@pytest.mark.parametrize("shape", [(2, 1, 28, 28), (2, 3, 11, 17), (1, 3, 24, 16)])
def test_ssim_is_that_of_every_window(shape: tuple[int, ...]) -> None:
    reconstructions, images = pictures(*shape)
    values = similarity.ssim(reconstructions, images)
    expected = [ssim_of_one(x, y) for x, y in zip(eight_bits(reconstructions), eight_bits(images), strict=True)]
    assert values.dtype == torch.float64
    np.testing.assert_allclose(values.numpy(), expected, rtol=1e-10)
    torch.testing.assert_close(similarity.ssim(images, images), torch.ones(shape[0]).double(), rtol=0, atol=1e-12)


def test_ssim_is_that_of_torchmetrics_without_its_mirrored_borders() -> None:
    torchmetrics = pytest.importorskip("torchmetrics.functional.image")
    reconstructions, images = pictures(3, 3, 40, 56)
    _, every_position = torchmetrics.structural_similarity_index_measure(
        *(torch.from_numpy(eight_bits(values)) for values in (reconstructions, images)),
        data_range=1.0,
        reduction="none",
        return_full_image=True,
    )
    expected = every_position[..., 5:-5, 5:-5].mean((1, 2, 3))
    torch.testing.assert_close(similarity.ssim(reconstructions, images), expected, rtol=1e-9, atol=0)


def test_images_are_compared_as_8_bit_values(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = (torch.arange(256).float() / 255).view(1, 1, 16, 16)
    assert torch.equal(similarity._rounded(exact), torch.arange(256.0).view(1, 1, 16, 16))
    shifted = (exact + 0.4 / 255).clamp(max=1)
    assert similarity.ssim(shifted, exact).item() == pytest.approx(1, abs=1e-12)
    reconstructions, images = pictures(5, 1, 16, 16)
    whole = similarity.ssim(reconstructions, images)
    monkeypatch.setattr(similarity, "VALUES_AT_ONCE", 2 * 16 * 16)
    torch.testing.assert_close(similarity.ssim(reconstructions, images), whole, rtol=1e-12, atol=0)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "lpips.safetensors"
    save_file(random_tensors(LPIPS, seed=0), path)
    return path


@pytest.fixture
def run_dir(make_config: MakeConfig) -> Path:
    return train(make_config("name=a", "train.steps=5"))


def test_an_evaluation_has_ssim_and_the_lpips_of_a_file(run_dir: Path, weights: Path, tmp_path: Path) -> None:
    digits = read(datasets.load_test(opened(run_dir, FEW).config.data), range(20))
    np.save(tmp_path / "images.npy", digits.squeeze(1).numpy())
    folder = f"evaluate.folder={tmp_path}/images.npy"
    without, result = (evaluate(run_dir, [*FEW, folder, *more]) for more in ([], [f"evaluate.perceptual={weights}"]))
    vae = opened(run_dir, FEW).checkpoint.load_vae(opened(run_dir, FEW).config, torch.device("cpu"))
    images = vae.to_input(digits)
    with torch.no_grad():
        reconstructions = vae.decode(vae.infer(images).mean).mean
        network = files.load(LPIPS, weights, "key").network
        pair = (torch.from_numpy(eight_bits(values)).float() for values in (reconstructions, images))
        distances = network(*(2 * values.repeat(1, 3, 1, 1) - 1 for values in pair)).double()
    ssim = similarity.ssim(reconstructions, images)
    for name, values in {"ssim": ssim, "lpips": distances}.items():
        assert result[name] == pytest.approx(values.mean().item(), rel=1e-5)
        assert result["standard_errors"][name] == pytest.approx(values.std().item() / len(values) ** 0.5, rel=1e-4)
    kept = sorted((run_dir / "evaluations").glob("*.json"))
    assert [json.loads(path.read_text()) for path in kept] == [without, result]
    [table] = (run_dir / "evaluations").glob("*_lpips.csv")
    rows = {int(row["name"]): row for row in csv.DictReader(table.read_text().splitlines())}
    for name, values in {"ssim": ssim, "lpips": distances}.items():
        torch.testing.assert_close(
            [float(rows[index][name]) for index in range(20)], values.tolist(), rtol=1e-5, atol=0
        )
    protocol = result["protocol"]
    assert protocol["lpips_sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert "VGG16" in protocol["lpips"] and "8 bits, 11x11 Gaussian window" in protocol["ssim"]
    assert "lpips" not in without and "lpips" not in without["protocol"]
    same = without.keys() - {"standard_errors", "protocol"}
    assert {key: result[key] for key in same} == {key: without[key] for key in same}


def test_ssim_is_a_metric_of_the_record(run_dir: Path) -> None:
    result = evaluate(run_dir, FEW)
    record = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    assert record["test/ssim"] == result["ssim"] and "test/lpips" not in record


@pytest.mark.slow
def test_similarity_is_bitwise_the_same_on_three_processes(
    run_dir: Path, weights: Path, fork_server: ForkServer, tmp_path: Path
) -> None:
    arguments = [*FEW, f"evaluate.perceptual={weights}"]
    alone = evaluate(run_dir, arguments)
    jobs = tmp_path / "jobs.json"
    jobs.write_text(json.dumps([("evaluate", str(run_dir), [*arguments, f"output={tmp_path / 'three'}"])]))
    ended = fork_server.launch(3, str(REPOSITORY / "tests/worker.py"), str(jobs))
    assert [process.returncode for process in ended] == [0, 0, 0]
    assert json.loads((tmp_path / "three/evaluation.json").read_text()) == alone


def test_images_that_lpips_or_ssim_can_not_compare(run_dir: Path, weights: Path, tmp_path: Path) -> None:
    assert similarity.names((1, 10, 28), None) == ["psnr"] and "ssim" in similarity.names((3, 11, 11), None)
    with pytest.raises(UserError, match=r"evaluate\.perceptual=.*lpips can't be read \(No such file"):
        evaluate(run_dir, [*FEW, f"evaluate.perceptual={tmp_path}/lpips"])


@pytest.mark.parametrize("shape", [(1, 8, 28), (4, 32, 32)])
def test_lpips_is_refused_for_images_that_it_can_not_take(shape: tuple[int, ...], weights: Path) -> None:
    options = EvaluateConfig(perceptual=str(weights))
    with pytest.raises(UserError, match=r"evaluate\.perceptual is for grey or colour images of at least 16x16 pixels"):
        networks.load(options, shape, World.alone(torch.device("cpu")))


def drawn_features(count: int, size: int = 24) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    mixing = torch.randn(size, size, generator=generator).double()
    return torch.randn(count, size, generator=generator).double() @ mixing


@pytest.mark.parametrize("count", [200, 9])  # with covariances of full rank, and without
def test_the_frechet_distance_of_a_scaled_and_shifted_set_is_exact(count: int) -> None:
    features = drawn_features(count)
    shift, scale = torch.linspace(-1, 2, features.shape[1]).double(), 0.7
    means = (scale - 1) * features.mean(0) + shift
    expected = means.square().sum() + (1 - scale) ** 2 * features.T.cov().trace()
    assert fid.frechet_distance(features, scale * features + shift) == pytest.approx(expected.item(), rel=1e-10)
    assert fid.frechet_distance(features, features) == pytest.approx(0, abs=1e-9)


def test_the_frechet_distance_is_that_of_the_formula_with_a_root() -> None:
    first, second = drawn_features(300).numpy(), drawn_features(200).numpy()
    covariances = [np.cov(features, rowvar=False) for features in (first, second)]
    root = np.sqrt(np.linalg.eigvals(covariances[0] @ covariances[1]).real.clip(0)).sum()
    means = ((first.mean(0) - second.mean(0)) ** 2).sum()
    expected = means + np.trace(covariances[0]) + np.trace(covariances[1]) - 2 * root
    distance = fid.frechet_distance(torch.from_numpy(first), torch.from_numpy(second))
    assert distance == pytest.approx(expected, rel=1e-9)


def test_one_image_has_no_frechet_distance(make_config: MakeConfig) -> None:
    """Its covariance would be a division by 0."""
    with processes.join(make_config()) as world:
        assert fid.rfid(torch.rand(1, 2, 4), world) is None
        assert fid.rfid(torch.rand(2, 2, 4), world) is not None


class Averages(torch.nn.Module):
    """A stand-in for Inception: the averages of four quarters of a colour image of 8-bit values."""

    def forward(self, images: Tensor) -> Tensor:
        assert images.dtype == torch.uint8 and images.shape[1] == 3
        return torch.nn.functional.adaptive_avg_pool2d(images.float(), 2)[:, 0].flatten(1)


def averages(images: Tensor) -> Tensor:
    """The features of `Averages` in float64: `(N, 4)`."""
    return torch.from_numpy(eight_bits(images) * 255).reshape(-1, 2, 14, 2, 14).mean((2, 4)).flatten(1)


def test_the_rfid_is_the_distance_of_images_and_reconstructions(run_dir: Path) -> None:
    source = opened(run_dir, FEW)
    vae = source.checkpoint.load_vae(source.config, torch.device("cpu"))
    test = datasets.load_test(source.config.data)
    with processes.join(source.config) as world:
        metrics, by_image = measure(vae, test, world, source.config, Networks(inception=Averages()))
        without, _ = measure(vae, test, world, source.config)
    images = read_inputs(vae, test, range(test.info.count)).images
    with torch.no_grad():
        pair = (images, vae.decode(vae.infer(images).mean).mean)
    expected = fid.frechet_distance(*map(averages, pair))
    assert metrics.pop("rfid") == pytest.approx(expected, rel=1e-3) and expected > 1
    assert metrics == without and "rfid" not in by_image


@pytest.mark.parametrize("conditional", ["false", "true"])
def test_the_fid_is_the_distance_of_images_and_samples(conditional: str, make_config: MakeConfig) -> None:
    """The oracle: the samples that `vae-dist sample` writes, of a conditional model with all classes in turn."""
    run_dir = train(make_config("name=a", "train.steps=5", f"model.conditional={conditional}"))
    source = opened(run_dir, [*FEW, "evaluate.fid_samples=101", "evaluate.inception=unused"])
    vae = source.checkpoint.load_vae(source.config, torch.device("cpu"))
    test = datasets.load_test(source.config.data)
    with processes.join(source.config) as world:
        metrics, _ = measure(vae, test, world, source.config, Networks(inception=Averages()))
        reference = torch.ones(1, 4)
        assert fid.fid(vae, Averages(), reference, world, source.config) is None
        features = fid._of_samples(vae, Averages(), world, source.config)
    samples = load_file(sample(run_dir, ["sample.count=101"]) / "samples.safetensors")["images"]
    # One by one: after few steps they are so alike that others would have nearly the same distance.
    torch.testing.assert_close(features.double(), averages(samples), rtol=0, atol=0.02)
    images = read_inputs(vae, test, range(test.info.count)).images
    expected = fid.frechet_distance(averages(images), averages(samples))
    assert metrics["fid"] == pytest.approx(expected, rel=1e-3) and metrics["fid_samples"] == 101
    assert expected > 1
    stated = "p(x|z,y), of the classes in turn, z" if conditional == "true" else "p(x|z), z"
    assert str(fid.protocol(source.config, test.info)["fid"]).startswith(f"101 means of {stated} from the prior p(z)")


def test_samples_that_are_not_finite_end_an_evaluation(run_dir: Path) -> None:
    source = opened(run_dir, [*FEW, "evaluate.fid_samples=50", "evaluate.inception=unused"])
    vae = source.checkpoint.load_vae(source.config, torch.device("cpu"))

    class Prior(type(vae.p_z)):  # type: ignore[misc]
        def forward(self, noise: Tensor) -> Tensor:
            return noise.masked_fill(noise[:, :1] > 1, torch.nan)

    vae.p_z.__class__ = Prior
    with (
        processes.join(source.config) as world,
        pytest.raises(
            UserError, match=r"^([2-9]|1\d) of 50 samples from the prior are not finite; .*earlier checkpoint"
        ),
    ):
        fid.fid(vae, Averages(), torch.ones(2, 4), world, source.config)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["evaluate.fid_samples=100"], "fid_samples needs evaluate.inception, the file of the weights"),
        (["evaluate.fid_samples=1", "evaluate.inception=a"], "fid_samples must be at least 2, not 1"),
    ],
)
def test_a_fid_that_can_not_be_is_refused(arguments: list[str], expected: str) -> None:
    with pytest.raises(UserError, match=f"^evaluate.{expected}"):
        config.load(arguments)


@pytest.mark.slow
def test_an_evaluation_has_the_rfid_and_the_fid_of_a_file_on_any_number_of_processes(
    run_dir: Path, fork_server: ForkServer, tmp_path: Path
) -> None:
    path = tmp_path / "inception.safetensors"
    save_file(random_tensors(FIDInception, seed=0), path)
    np.save(tmp_path / "images.npy", np.random.default_rng(0).integers(0, 256, (7, 28, 28), dtype=np.uint8))
    arguments = [*FEW, "evaluate.batch_size=2", f"evaluate.folder={tmp_path}/images.npy", f"evaluate.inception={path}"]
    arguments += ["evaluate.fid_samples=5"]
    alone = evaluate(run_dir, arguments)
    assert alone["rfid"] > 0 and alone["protocol"]["rfid_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert alone["fid"] > 0 and alone["fid_samples"] == alone["protocol"]["fid_samples"] == 5
    assert alone["protocol"]["fid"].startswith("5 means of p(x|z), z from the prior p(z), the same draws")
    assert "the reference are the 7 images" in alone["protocol"]["fid"]
    jobs = tmp_path / "jobs.json"
    for size in (2, 3):
        jobs.write_text(json.dumps([("evaluate", str(run_dir), [*arguments, f"output={tmp_path / str(size)}"])]))
        ended = fork_server.launch(size, str(REPOSITORY / "tests/worker.py"), str(jobs))
        assert [process.returncode for process in ended] == [0] * size
        (kept,) = (tmp_path / str(size) / "evaluations").glob("*_rfid_fid5.json")
        assert json.loads(kept.read_text()) == alone
