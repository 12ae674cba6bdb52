import logging
import math
import shutil
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.conftest import MakeConfig
from tests.test_trainer import final
from vae_dist import config, gradients, runtime
from vae_dist.config import Precision
from vae_dist.gradients import Compiled, Gradients
from vae_dist.model import build_vae
from vae_dist.model.vae import VAE
from vae_dist.start import settle
from vae_dist.trainer import train
from vae_dist.update import Update

needs_a_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ to compile a step with")


def made(*arguments: str, precision: Precision = "fp64") -> tuple[VAE, Gradients]:
    asked = config.load(["model.latent_dim=3", "model.hidden_dims=[20]", *arguments])
    vae = build_vae(asked, (1, 6, 6)).to(runtime.dtype(precision))
    autocast = runtime.autocast(precision, torch.device("cpu"))
    return vae, Gradients(vae, 16.0, autocast, torch.float64)


def inputs(precision: Precision = "fp64") -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    dtype = runtime.dtype(precision)
    return torch.rand(16, 1, 6, 6, dtype=dtype), torch.randn(16, 3, dtype=dtype), torch.tensor(0.7, dtype=torch.float64)


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_the_gradients_are_those_of_the_loss(likelihood: str) -> None:
    vae, find = made(f"objective.reconstruction={likelihood}")
    images, noise, beta = inputs()
    found = find(images, noise, beta, None)
    posterior, given = vae(images, noise)
    reconstruction, kl = -given.log_prob(images).sum(), posterior.kl().sum()
    loss = (reconstruction + 0.7 * kl) / 16
    torch.testing.assert_close(found.loss, loss.detach())
    torch.testing.assert_close(found.terms, torch.stack([reconstruction, kl]).detach())
    for ours, expected in zip(found.gradients, torch.autograd.grad(loss, list(vae.parameters())), strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("precision", ["fp64", "fp32", "bf16"])
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=[pytest.mark.slow, needs_a_compiler])])
def test_what_is_compiled_gives_the_same(precision: Precision, compiled: bool) -> None:
    _, eager = made(precision=precision)
    program = Compiled(eager.functional, eager) if compiled else eager.functional
    scale = torch.tensor(8.0)
    ours, theirs = (find(*inputs(precision), scale) for find in (eager, program))
    if isinstance(program, Compiled):  # and it has not fallen back
        assert program._program is not None
    tolerance = {"fp64": 1e-12, "fp32": 1e-5, "bf16": 3e-2}[precision]
    close = partial(torch.testing.assert_close, rtol=tolerance, atol=tolerance)
    close(ours.loss, theirs.loss)
    close(ours.terms, theirs.terms)
    for one, another in zip(ours.gradients, theirs.gradients, strict=True):
        close(one, another)


def test_a_step_that_can_not_be_compiled_runs_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*arguments: object, **options: object) -> object:
        def program(*arguments: object) -> None:
            raise RuntimeError("no working C++ compiler\nand much more")

        return program

    monkeypatch.setattr(torch, "compile", broken)
    _, eager = made()
    find = Compiled(eager.functional, eager)
    with caplog.at_level(logging.WARNING, logger=gradients.__name__):
        found = [find(*inputs(), None) for _ in range(2)]
    assert [record.message for record in caplog.records] == [
        "the step can't be compiled (RuntimeError: no working C++ compiler) and runs as it is"
    ]
    assert torch.equal(found[1].loss, eager(*inputs(), None).loss)


@pytest.mark.slow
@needs_a_compiler
@pytest.mark.parametrize("bound", ["null", "5"])
def test_a_compiled_step_is_the_step(bound: str, make_config: MakeConfig) -> None:
    """Over parts of unlike sizes, and over an update that is not finite and left out."""
    arguments = ["train.precision=fp64", "train.accumulate=3", f"optim.max_grad_norm={bound}", "train.nonfinite=skip"]
    torch.manual_seed(2)
    pixels = torch.randint(256, (6, 32, 1, 8, 8), dtype=torch.uint8)
    noise = torch.randn(6, 32, 4, dtype=torch.float64)
    noise[2, 7, 3] = math.nan
    results = []
    for compiled in ("false", "true"):
        asked = make_config(*arguments, f"train.compile={compiled}", "train.batch_size=32", "model.latent_dim=4")
        with runtime.join(asked) as world:
            vae = build_vae(asked, (1, 8, 8)).double()
            update = Update(vae, asked, world)
            totals = [update(pixels[step], noise[step], 1e-3, 0.1 * step) for step in range(6)]
            results.append([*totals, *(weight.detach() for weight in vae.parameters())])
            assert update.require_sound(6) == 1
            if isinstance(update._find, Compiled):  # and it has not fallen back
                assert update._find._program is not None
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@needs_a_compiler
def test_a_compiled_run_that_went_on_is_bitwise_the_run_that_never_stopped(make_config: MakeConfig) -> None:
    straight = train(make_config("train.compile=true", "train.steps=30", "name=straight"))
    for steps in (11, 30):
        torch.compiler.reset()  # the second one compiles anew, as another process would
        resumed = train(make_config("train.compile=true", f"train.steps={steps}", "name=resumed"))
    assert final(resumed) == final(straight)


def test_short_runs_are_not_compiled_and_long_ones_are(make_config: MakeConfig, tmp_path: Path) -> None:
    def settled(*arguments: str) -> bool | None:
        asked = make_config("train.compile=null", *arguments)
        with ExitStack() as held, runtime.join(asked) as world:
            return settle(asked, world, held).config.train.compile

    assert settled("train.epochs=2") is False
    assert settled("train.steps=10000000") is (shutil.which("g++") is not None)
    assert settled("train.steps=10000000", "train.compile=false") is False
    assert settled("train.epochs=2", "train.compile=true") is True
