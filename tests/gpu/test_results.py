"""Computations on a GPU other than training: random numbers, products, evaluations, pictures."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.gpu.conftest import Train
from vae_dist import config
from vae_dist.distributed import processes
from vae_dist.evaluation.evaluate import evaluate
from vae_dist.models.discretized import DiscretizedLogisticMixture
from vae_dist.plan import Draws, Stream, bits, standard_normals
from vae_dist.reports.comparison import compare
from vae_dist.reports.report import report
from vae_dist.views.making import KINDS
from vae_dist.views.sampling import sample

if not torch.cuda.is_available():
    pytest.skip("there is no GPU", allow_module_level=True)
Allow = Callable[[bool], None]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("columns", [20, 7, 784])
def test_a_gpu_draws_the_random_numbers_of_numpy(columns: int, compiled: bool) -> None:
    card = torch.device("cuda", 0)
    draws = Draws(3, Stream.POSTERIOR, range(5, 12), range(2, 130), columns)
    assert torch.equal(bits(draws, card, compiled).cpu(), bits(draws))
    assert torch.equal(standard_normals(draws, card, compiled).cpu(), standard_normals(draws))


@pytest.fixture
def tf32() -> Iterator[Allow]:
    """Lets products be in TF32, or not. monkeypatch can't undo that: this holder of torch's has no attributes."""
    before = torch.backends.cuda.matmul.allow_tf32
    yield lambda allowed: setattr(torch.backends.cuda.matmul, "allow_tf32", allowed)
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize(
    ("m", "k", "n"), [(128, 784, 400), (128, 400, 40), (784, 128, 400), (5, 3, 7), (130, 1000, 33)]
)
@pytest.mark.parametrize("turned", [(False, True), (True, False), (False, False)])
def test_small_products_are_as_exact_as_cublas(m: int, k: int, n: int, turned: tuple[bool, bool], tf32: Allow) -> None:
    from vae_dist.compute import products

    torch.manual_seed(0)
    a = torch.randn((k, m) if turned[0] else (m, k), device="cuda")
    b = torch.randn((n, k) if turned[1] else (k, n), device="cuda")
    a, b = a.t() if turned[0] else a, b.t() if turned[1] else b
    exact = a.double() @ b.double()

    def product() -> Tensor:
        arguments = products.splits_and_precision(a, b)
        assert arguments is not None
        return products.product(a, b, *arguments).sum(0)

    def error(result: Tensor) -> float:
        return ((result - exact).norm() / exact.norm()).item()

    tf32(False)
    computed = product()
    assert error(computed) < 2 * max(error(a @ b), 6e-8)
    assert torch.equal(product(), computed)
    tf32(True)
    assert error(product()) < 1e-3


def evaluated(run_dir: Path, *arguments: str) -> dict[str, Any]:
    return evaluate(run_dir, ["evaluate.importance_samples=64", *arguments])


def test_an_evaluation_is_that_of_a_cpu_and_always_the_same(run: Train) -> None:
    folder = run("evaluated")
    card, again, cpu = (evaluated(folder, f"device={device}") for device in ("cuda", "cuda", "cpu"))
    assert card == again
    for name in ("negative_elbo", "kl", "negative_log_likelihood", "mean_squared_error"):
        assert card[name] == pytest.approx(cpu[name], rel=1e-4)
    assert card["protocol"]["device"] == "cuda"


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_kind_of_sample_is_that_of_a_cpu(kind: str, run: Train, tmp_path: Path) -> None:
    if kind == "scatter":
        pytest.importorskip("matplotlib")
    folder = run("sampled", "model.latent_dim=2")
    given = [f"sample.kind={kind}", *(["sample.codes=[[0,0],[1,-1]]"] if kind == "codes" else [])]
    for device in ("cuda", "cpu"):
        sample(folder, [*given, f"device={device}", f"output={tmp_path / device}"])
    files = {path.relative_to(tmp_path / "cuda") for path in (tmp_path / "cuda").rglob("*") if path.is_file()}
    assert files
    for path in files:
        if path.suffix == ".safetensors":
            card, cpu = load_file(tmp_path / "cuda" / path), load_file(tmp_path / "cpu" / path)
            torch.testing.assert_close(card, cpu, rtol=1e-3, atol=2e-3)


def test_the_probability_of_8_bit_pixels_and_draws_from_it_are_those_of_a_cpu() -> None:
    torch.manual_seed(0)
    output, noise = 2 * torch.randn(6, 100, 8, 8), torch.randn(6, 3, 8, 8)
    images = torch.randint(0, 256, (6, 3, 8, 8)) / 255
    results = []
    with processes.join(config.load(["device=cuda"])):  # deterministic
        for device in ("cuda", "cpu"):
            given = output.to(device).requires_grad_()
            log_prob = DiscretizedLogisticMixture.from_network(given, 10).log_prob(images.to(device))
            (gradient,) = torch.autograd.grad(log_prob.sum(), given)
            likelihood = DiscretizedLogisticMixture.from_network(given.detach(), 10)
            values = log_prob.detach(), gradient, likelihood.mean, likelihood.sample(noise.to(device))
            results.append([value.cpu() for value in values])
    for card, cpu in zip(*(of_device[:3] for of_device in results), strict=True):
        torch.testing.assert_close(card, cpu, rtol=1e-4, atol=1e-4)
    levels = [(255 * of_device[3]).round() for of_device in results]  # a card divides by a product: off by a bit
    assert (levels[0] == levels[1]).float().mean() > 0.99  # a rounding may choose another level or component


def test_runs_are_reported_and_compared(run: Train) -> None:
    pytest.importorskip("matplotlib")
    folders = [run("reported"), run("reported_too", "model.latent_dim=3")]
    assert report(folders[0], ["device=cuda"]).stat().st_size > 100_000
    assert (compare(folders, ["device=cuda"]) / "table.md").read_text()
