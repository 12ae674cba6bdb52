import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.conftest import MakeConfig, batch_of, update_of
from tests.test_trainer import final
from tests.worker import scaled_accelerator
from vae_dist import config
from vae_dist.compute.compiled import Compiled
from vae_dist.config import Precision
from vae_dist.distributed import gradients, processes
from vae_dist.distributed import precision as precisions
from vae_dist.errors import RunError
from vae_dist.models import build_vae
from vae_dist.models.vae import VAE
from vae_dist.objectives import elbo
from vae_dist.plan import shard
from vae_dist.runs.claim import claim
from vae_dist.training.differentiate import Differentiate, Losses
from vae_dist.training.loop import train

needs_a_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ to compile a step with")
SCALE = 8.0


def losses_of(network: Callable[..., object], images: Tensor, noise: Tensor, beta: Tensor) -> Losses:
    inference = network(images, noise)
    return Losses(elbo(inference, images, beta), outputs=(inference.likelihood.mean,))  # type: ignore[attr-defined, arg-type]


def made(
    *arguments: str, precision: Precision = "fp64", scaled: bool = False, batch_size: float = 16.0
) -> tuple[VAE, Differentiate]:
    settings = config.load(["model.latent_dim=3", "model.hidden_dims=[20]", *arguments])
    vae = build_vae(settings, (1, 6, 6)).to(precisions.param_dtype(precision))
    accelerator = precisions.accelerator(precision)
    if scaled:
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    differentiate = Differentiate(
        vae, losses_of, batch_size=batch_size, autocast=precisions.autocast(precision, torch.device("cpu")),
        accelerator=accelerator, sum_dtype=torch.float64,
    )  # fmt: skip
    return vae, differentiate


def inputs(vae: VAE, *, scale: float = 1.0, draws: int = 2) -> list[Tensor]:
    """The scale of the loss, images, noise, beta, and the weights."""
    torch.manual_seed(1)
    images, noise = torch.rand(16, 1, 6, 6, dtype=vae.dtype), torch.randn(draws, 16, 3, dtype=vae.dtype)
    return [torch.tensor(scale), images, noise, torch.tensor(0.7, dtype=torch.float64), *vae.parameters()]


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
@pytest.mark.parametrize("scaled", [False, True])
def test_the_gradients_are_those_of_the_loss(likelihood: str, scaled: bool) -> None:
    vae, differentiate = made(f"objective.reconstruction={likelihood}", scaled=scaled)
    scale = SCALE if scaled else 1.0
    given = inputs(vae, scale=scale)
    loss, sums, output, *results = differentiate.eager(*given)
    _, images, noise, *_ = given
    inference = vae(images, noise)
    reconstruction, kl = -inference.log_likelihood(images).mean(0).sum(), inference.kl.sum() / 2
    expected = (reconstruction + 0.7 * kl) / 16
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(sums, torch.stack([reconstruction + 0.7 * kl, reconstruction, kl]).detach())
    torch.testing.assert_close(output, inference.likelihood.mean.detach())
    torch.testing.assert_close(results, list(torch.autograd.grad(scale * expected, list(vae.parameters()))))
    assert not any(tensor.requires_grad for tensor in (loss, sums, output, *results))
    assert all(parameter.grad is None for parameter in vae.parameters())


def test_functional_gradients_are_not_recorded_by_autograd() -> None:
    """Otherwise totals, which they are added to, would need a gradient, and keep every step's graph."""
    vae, differentiate = made()
    given = inputs(vae)
    assert given[-1].requires_grad
    assert not any(tensor.requires_grad for tensor in differentiate.functional(*given))


def test_gradients_of_uneven_shards_average_to_the_batchs() -> None:
    vae, differentiate = made()
    scale, images, noise, beta, *weights = inputs(vae)
    whole = differentiate.eager(scale, images, noise, beta, *weights)
    for world_size in (2, 3, 5):
        _, of_shard = made(batch_size=16 / world_size)
        of_shard._network = vae
        results: list[Sequence[Tensor]] = []
        for rank in range(world_size):
            rows = slice(shard(16, rank, world_size).start, shard(16, rank, world_size).stop)
            loss, _, _, *gradients = of_shard.eager(scale, images[rows], noise[:, rows], beta, *weights)
            results.append([loss, *gradients])
        means = [torch.stack(values).mean(0) for values in zip(*results, strict=True)]
        torch.testing.assert_close(means, [whole[0], *whole[3:]])


@pytest.mark.parametrize("precision", ["fp64", "fp32", "bf16"])
@pytest.mark.parametrize("as_program", [False, pytest.param(True, marks=[pytest.mark.slow, needs_a_compiler])])
def test_functional_gradients_equal_eager_ones(precision: Precision, as_program: bool) -> None:
    vae, differentiate = made(precision=precision, scaled=True)
    other = Compiled(differentiate.functional, differentiate.eager) if as_program else differentiate.functional
    ours, theirs = (list(compute(*inputs(vae, scale=SCALE))) for compute in (differentiate.eager, other))
    assert not (isinstance(other, Compiled) and other.failure)
    tolerance = {"fp64": 1e-12, "fp32": 1e-5, "bf16": 3e-2}[precision]
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.slow
@needs_a_compiler
@pytest.mark.parametrize("bound", ["null", "5"])
@pytest.mark.parametrize("flat", [False, True])
def test_a_compiled_step_equals_the_eager_step(
    bound: str, flat: bool, make_config: MakeConfig, caplog: pytest.LogCaptureFixture
) -> None:
    """Over micro-batches of unlike sizes, and over an update that is not finite and skipped."""
    arguments = [
        "train.precision=fp64", "train.accumulate=3", f"optim.max_grad_norm={bound}", "train.nonfinite=skip",
        "train.batch_size=32", "model.latent_dim=4", "objective.samples=2", "objective.beta_warmup_steps=10",
        "optim.warmup_steps=3", "ema.decay=0.9",
    ]  # fmt: skip
    torch.manual_seed(2)
    pixels = torch.randint(256, (6, 32, 1, 8, 8), dtype=torch.uint8)
    noise = torch.randn(6, 32, 2, 4, dtype=torch.float64)
    noise[2, 7, 1, 3] = math.nan
    results = []
    for choice in ("false", "true"):
        settings = make_config(*arguments, f"train.compile={choice}")
        with processes.join(settings) as world:
            update = update_of(settings, world, (1, 8, 8), flat=flat and choice == "true")
            totals = []
            for step in range(6):
                update(batch_of(pixels[step : step + 1], noise[step : step + 1]), [update.recipe.values(step)])
                totals.append(update.totals.clone())
            networks = update.recipe.networks.values()
            results.append([*totals, *(weight.detach() for network in networks for weight in network.parameters())])
            assert update.require_healthy(6) == 1
    assert "can't be compiled" not in caplog.text
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@needs_a_compiler
def test_a_resumed_compiled_run_is_bitwise_the_uninterrupted_one(make_config: MakeConfig) -> None:
    straight = train(make_config("train.compile=true", "train.steps=30", "name=straight"))
    for steps in (11, 30):
        torch.compiler.reset()  # the second one compiles anew, as another process would
        resumed = train(make_config("train.compile=true", f"train.steps={steps}", "name=resumed"))
    assert final(resumed) == final(straight)


def test_short_runs_are_not_compiled_and_long_ones_are(make_config: MakeConfig, tmp_path: Path) -> None:
    def is_compiled(*arguments: str) -> bool | None:
        settings = make_config("train.compile=null", *arguments)
        with processes.join(settings) as world, claim(settings, world) as (resolved, _, _):
            return resolved.config.train.compile

    assert is_compiled("train.epochs=2") is False
    assert is_compiled("train.steps=10000000") is (shutil.which("g++") is not None)
    assert is_compiled("train.steps=10000000", "train.compile=false") is False
    assert is_compiled("train.epochs=2", "train.compile=true") is True


@pytest.mark.parametrize(("fault", "ends"), [(math.nan, False), (2.0**-10, True)])
def test_a_gradient_that_no_loss_scale_mends_stops_the_run(
    fault: float, ends: bool, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that overflows with every scale above a small one does not."""
    differentiate = Differentiate.eager

    def faulty(self: Differentiate, scale: Tensor, *tensors: Tensor) -> Sequence[Tensor]:
        loss, sums, first, *others = differentiate(self, scale, *tensors)
        overflows = torch.where(scale > fault, math.inf, first) if ends else first * fault
        return [loss, sums, overflows, *others]

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**-3)
    monkeypatch.setattr(Differentiate, "eager", faulty)
    monkeypatch.setattr(precisions, "accelerator", scaled_accelerator(scaler))
    run = make_config("train.steps=40", "train.log_every=40", "name=a")
    if ends:
        record = json.loads((train(run) / "metrics.jsonl").read_text().splitlines()[-1])
        assert scaler.get_scale() == 2.0**-10 and record["step"] == 40
    else:
        with pytest.raises(RunError, match="not finite"):
            train(run)
        assert scaler.get_scale() < 2.0**-24  # smaller scales were tried first


def test_gradients_are_exchanged_in_whole_tensors_up_to_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "MOST_EXCHANGED", 10)
    sizes = [3, 3, 4, 1, 12, 2, 8, 9, 2]
    parts = list(gradients._parts([torch.empty(size) for size in sizes]))
    assert [[tensor.numel() for tensor in part] for part in parts] == [[3, 3, 4], [1], [12], [2, 8], [9], [2]]
