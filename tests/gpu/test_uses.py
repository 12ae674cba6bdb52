"""What is done with a trained model on one card: evaluations with networks, encodings, exports, the Python API."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import vae_dist
from tests.feature_weights import random_tensors
from tests.gpu.conftest import Train
from vae_dist import config
from vae_dist.distributed import processes
from vae_dist.encoding.encode import encode
from vae_dist.evaluation.evaluate import evaluate
from vae_dist.features.inception import FIDInception
from vae_dist.features.lpips import LPIPS
from vae_dist.publishing.export import export

if not torch.cuda.is_available():
    pytest.skip("there is no GPU", allow_module_level=True)
CARD = "cuda"
NETWORKS = {
    "resnet": ["model.architecture=resnet", "model.attention=[2]", "ema.decay=0.9"],
    "conditional": ["model.architecture=conv", "model.conditional=true", "objective.sigma_kind=learned"],
}
TOLERANCES = {
    "negative_elbo": 1e-4, "negative_log_likelihood": 1e-4, "mean_squared_error": 1e-4, "psnr": 1e-4, "ssim": 1e-3,
    "lpips": 1e-3, "rfid": 2e-2,
}  # fmt: skip  # of values rounded to 8 bits a few are on other sides of a half


@pytest.fixture
def used(colour_run: Train) -> dict[str, Path]:
    """Trained runs; those that are there already are not trained again."""
    common = ["model.channels=[8,16]", "model.blocks=1", "model.latent_channels=2", "train.compile=false"]
    return {name: colour_run(name, *common, *options) for name, options in NETWORKS.items()}


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Files of LPIPS and Inception with random weights."""
    folder, kinds = tmp_path_factory.mktemp("weights"), {"perceptual": LPIPS, "inception": FIDInception}
    for name, kind in kinds.items():
        save_file(random_tensors(kind, seed=0), folder / f"{name}.safetensors")
    return [f"evaluate.{name}={folder}/{name}.safetensors" for name in kinds]


@pytest.mark.parametrize("name", NETWORKS)
def test_an_evaluation_with_networks_is_that_of_a_cpu_and_always_the_same(
    name: str, used: dict[str, Path], weights: list[str]
) -> None:
    given = [*weights, "evaluate.importance_samples=8", "evaluate.batch_size=5"]
    card, again, cpu = (evaluate(used[name], [*given, f"device={device}"]) for device in (CARD, CARD, "cpu"))
    assert card == again and card["protocol"]["device"] == CARD
    for metric, tolerance in TOLERANCES.items():
        assert card[metric] == pytest.approx(cpu[metric], rel=tolerance), metric
    # No convolution is in TF32.
    assert card["mean_squared_error"] == pytest.approx(cpu["mean_squared_error"], rel=1e-5)


def latents_of(folder: Path) -> dict[str, Tensor]:
    index: dict[str, Any] = json.loads((folder / "index.json").read_text())
    files = [load_file(folder / file["name"]) for file in index["files"]]
    latents = {name: torch.cat([file[name] for file in files]) for name in files[0]}
    assert len(files) > 1 and all(len(values) == index["images"] for values in latents.values())
    return latents


@pytest.mark.parametrize("latents", ["posterior", "draws"])
@pytest.mark.parametrize("name", NETWORKS)
def test_latents_are_those_of_a_cpu_and_always_the_same(
    name: str, latents: str, used: dict[str, Path], tmp_path: Path
) -> None:
    given = [f"encode.latents={latents}", "encode.shard_images=32", "evaluate.batch_size=8"]
    card, again, cpu = (
        encode(used[name], [*given, f"device={device}", f"output={tmp_path / place}"])
        for place, device in (("card", CARD), ("again", CARD), ("cpu", "cpu"))
    )
    assert all((again / path.name).read_bytes() == path.read_bytes() for path in card.glob("latents-*"))
    found, expected = latents_of(card), latents_of(cpu)
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        torch.testing.assert_close(found[key], values, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # by torch.export.load of torch 2.11
@pytest.mark.parametrize("name", NETWORKS)
def test_exports_of_a_card_run_anywhere(
    name: str, used: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    folder = export(used[name], [f"device={CARD}", f"output={tmp_path}", "export.formats=[program]"])
    loaded = vae_dist.load(used[name], device=CARD)
    images = torch.rand(3, 3, 16, 16)
    labels = (torch.tensor([0, 1, 1]),) if loaded.model.classes else ()
    posterior = loaded.encode(images, *labels)
    decoded = loaded.decode(posterior.mean, *labels)
    programs = {part: torch.export.load(folder / f"{part}.pt2").module() for part in ("encoder", "decoder")}
    mean, log_variance = programs["encoder"](images, *labels)
    torch.testing.assert_close(posterior.mean.cpu(), mean, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(posterior.log_variance.cpu(), log_variance, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(decoded.cpu(), programs["decoder"](mean, *labels)[0], rtol=1e-3, atol=1e-4)
    assert (folder / "samples.png").stat().st_size > 0


@pytest.mark.parametrize("name", NETWORKS)
def test_a_model_of_a_card_is_exported_as_onnx(name: str, used: dict[str, Path], tmp_path: Path) -> None:
    for library in "onnx", "onnxruntime", "onnxscript":
        pytest.importorskip(library)
    folder = export(used[name], [f"device={CARD}", f"output={tmp_path}", "export.formats=[onnx]"])
    assert (folder / "encoder.onnx").stat().st_size > 0


@pytest.mark.parametrize("name", NETWORKS)
def test_the_python_api_computes_and_returns_on_the_card(
    name: str, used: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    card, cpu = (vae_dist.load(used[name], device=device) for device in (CARD, "cpu"))
    test = card.images("test", count=6)
    assert test.labels is not None
    labels = test.labels if card.model.classes else None
    host = None if labels is None else labels.cpu()
    posterior = card.encode(test.images, labels)
    latents = posterior.sample(torch.zeros_like(posterior.mean).unsqueeze(0))[0]
    on_card = {
        "images": test.images, "labels": test.labels, "mean": posterior.mean, "log_variance": posterior.log_variance,
        "decoded": card.decode(latents, labels), "reconstructed": card.reconstruct(test.images.cpu(), host),
        "prior": card.prior(3, seed=1), "sample": card.sample(4, seed=1),
        "likelihood": card.log_likelihood(test.images, samples=4, labels=labels),
    }  # fmt: skip
    assert {tensor.device for tensor in on_card.values()} == {torch.device(CARD, 0)}
    posterior = cpu.encode(test.images.cpu(), host)
    expected = {
        "mean": posterior.mean, "log_variance": posterior.log_variance,
        "decoded": cpu.decode(posterior.mean, host), "reconstructed": cpu.reconstruct(test.images.cpu(), host),
        "prior": cpu.prior(3, seed=1), "sample": cpu.sample(4, seed=1),
        "likelihood": cpu.log_likelihood(test.images.cpu(), samples=4, labels=host),
    }  # fmt: skip
    found = {key: on_card[key].cpu() for key in expected}
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert card.show_samples(4).size[0] > 0 and card.show_reconstructions(test.images, labels).size[0] > 0


def test_a_network_of_features_is_that_of_a_cpu_with_its_gradient(weights: list[str]) -> None:
    tensors = load_file(Path(weights[0].partition("=")[2]))
    found = []
    with processes.join(config.load([f"device={CARD}"])):  # deterministic, and not in TF32
        for device in (CARD, CARD, "cpu"):
            network = LPIPS()
            network.load_state_dict(tensors)
            network.to(device)
            torch.manual_seed(0)
            one, other = (2 * torch.rand(4, 3, 33, 18) - 1 for _ in range(2))
            given = one.to(device).requires_grad_()
            distance = network(given, other.to(device))
            found.append([distance.detach().cpu(), torch.autograd.grad(distance.sum(), given)[0].cpu()])
    (distances, slopes), again, (expected, of_cpu) = found
    assert all(map(torch.equal, [distances, slopes], again))
    torch.testing.assert_close(distances, expected, rtol=1e-4, atol=1e-6)
    assert nn.functional.cosine_similarity(slopes.flatten(), of_cpu.flatten(), 0) > 0.9999
