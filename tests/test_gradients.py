import logging
import math
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor
from vae_dist.training.gradients import Gradients

from tests.conftest import MakeConfig
from tests.test_trainer import final
from vae_dist import config
from vae_dist.compute import compiled
from vae_dist.compute.compiled import Compiled
from vae_dist.config import Precision
from vae_dist.distributed import precision as precisions
from vae_dist.distributed import processes
from vae_dist.models import build_vae
from vae_dist.models.vae import VAE
from vae_dist.runs.claim import claim
from vae_dist.training.loop import train
from vae_dist.training.schedules import Schedule
from vae_dist.training.update import Update

needs_a_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ to compile a step with")


def made(*arguments: str, precision: Precision = "fp64", scaled: bool = False) -> tuple[VAE, Gradients]:
    settings = config.load(["model.latent_dim=3", "model.hidden_dims=[20]", *arguments])
    vae = build_vae(settings, (1, 6, 6)).to(precisions.param_dtype(precision))
    autocast = precisions.autocast(precision, torch.device("cpu"))
    return vae, Gradients(vae, 16.0, autocast, torch.float64, scaled=scaled)


def inputs(vae: VAE, precision: Precision = "fp64") -> list[Tensor]:
    """Images, noise, beta, the scale of the loss, and the weights."""
    torch.manual_seed(1)
    dtype = precisions.param_dtype(precision)
    images, noise = torch.rand(16, 1, 6, 6, dtype=dtype), torch.randn(16, 3, dtype=dtype)
    return [images, noise, torch.tensor(0.7, dtype=torch.float64), torch.tensor(8.0), *vae.parameters()]


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
@pytest.mark.parametrize("scale", [1, 8])
def test_the_gradients_are_those_of_the_loss(likelihood: str, scale: int) -> None:
    vae, gradients = made(f"objective.reconstruction={likelihood}", scaled=scale > 1)
    given = inputs(vae)
    loss, terms, *results = gradients.eager(*given)
    posterior, likelihood_of = vae(*given[:2])
    reconstruction, kl = -likelihood_of.log_prob(given[0]).sum(), posterior.kl().sum()
    expected = (reconstruction + 0.7 * kl) / 16
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(terms, torch.stack([reconstruction, kl]).detach())
    torch.testing.assert_close(results, list(torch.autograd.grad(scale * expected, list(vae.parameters()))))


@pytest.mark.parametrize("precision", ["fp64", "fp32", "bf16"])
@pytest.mark.parametrize("as_program", [False, pytest.param(True, marks=[pytest.mark.slow, needs_a_compiler])])
def test_compiled_gradients_equal_eager_ones(precision: Precision, as_program: bool) -> None:
    vae, gradients = made(precision=precision, scaled=True)
    other = Compiled(gradients.functional, gradients.eager) if as_program else gradients.functional
    ours, theirs = (list(compute(*inputs(vae, precision))) for compute in (gradients.eager, other))
    assert not (isinstance(other, Compiled) and other.failure)
    tolerance = {"fp64": 1e-12, "fp32": 1e-5, "bf16": 3e-2}[precision]
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_a_step_that_can_not_be_compiled_runs_uncompiled(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*arguments: object) -> object:
        raise RuntimeError("no working C++ compiler\nand much more")

    monkeypatch.setattr(torch._inductor, "compile", broken)
    vae, gradients = made()
    program = Compiled(gradients.functional, gradients.eager)
    with caplog.at_level(logging.WARNING, logger=compiled.__name__):
        results = [program(*inputs(vae)) for _ in range(2)]
    assert [record.message for record in caplog.records if record.name == compiled.__name__] == [
        "the step can't be compiled (RuntimeError: no working C++ compiler) and runs uncompiled"
    ]
    assert torch.equal(results[1][0], gradients.eager(*inputs(vae))[0])


@pytest.mark.slow
@needs_a_compiler
@pytest.mark.parametrize("bound", ["null", "5"])
@pytest.mark.parametrize("flat", [False, True])
def test_a_compiled_step_equals_the_eager_step(
    bound: str, flat: bool, make_config: MakeConfig, caplog: pytest.LogCaptureFixture
) -> None:
    """Over micro-batches of unlike sizes, and over an update that is not finite and skipped."""
    arguments = ["train.precision=fp64", "train.accumulate=3", f"optim.max_grad_norm={bound}", "train.nonfinite=skip"]
    torch.manual_seed(2)
    pixels = torch.randint(256, (6, 32, 1, 8, 8), dtype=torch.uint8)
    noise = torch.randn(6, 32, 4, dtype=torch.float64)
    noise[2, 7, 3] = math.nan
    results = []
    for choice in ("false", "true"):
        settings = make_config(*arguments, f"train.compile={choice}", "train.batch_size=32", "model.latent_dim=4")
        with processes.join(settings) as world:
            vae = build_vae(settings, (1, 8, 8)).double()
            update = Update(vae, settings, world, flat=flat and choice == "true")
            totals = []
            for step in range(6):
                update(pixels[step : step + 1], noise[step : step + 1], [Schedule(1e-3, 0.1 * step)])
                totals.append(update.totals.clone())
            results.append([*totals, *(weight.detach() for weight in vae.parameters())])
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
        with processes.join(settings) as world, claim(settings, world) as (resolved, _):
            return resolved.config.train.compile

    assert is_compiled("train.epochs=2") is False
    assert is_compiled("train.steps=10000000") is (shutil.which("g++") is not None)
    assert is_compiled("train.steps=10000000", "train.compile=false") is False
    assert is_compiled("train.epochs=2", "train.compile=true") is True
