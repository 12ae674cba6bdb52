"""The scale of a likelihood that is learned, or each batch's optimum: against textbook PyTorch, and through a run."""

import json
import math
import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.conftest import REPOSITORY, MakeConfig, batch_of, newest_checkpoint, opened, update_of
from tests.forked import ForkServer
from tests.test_cuda_graph import replaying
from tests.test_trainer import final, rows, timeless
from vae_dist import config
from vae_dist.config import SIGMA_FLOOR, ObjectiveConfig, OptimConfig
from vae_dist.data import datasets
from vae_dist.data.source import in_memory, read
from vae_dist.distributed import processes
from vae_dist.errors import UserError
from vae_dist.evaluation.evaluate import evaluate
from vae_dist.models import build_vae
from vae_dist.models.likelihoods import LocationScaleKind, likelihood_kind
from vae_dist.models.pixel_distributions import Gaussian
from vae_dist.models.vae import VAE
from vae_dist.plan import Plan
from vae_dist.reports.table import incomparable
from vae_dist.runs.lookup import find
from vae_dist.runs.sigma import deviation
from vae_dist.training import update
from vae_dist.training.loop import train
from vae_dist.training.optimizers import Adam
from vae_dist.training.recipes import RECIPES
from vae_dist.training.update import Update
from vae_dist.training.vae_recipe import VAERecipe

GAUSSIAN, LAPLACE = "objective.reconstruction=gaussian", "objective.reconstruction=laplace"
LEARNED, OPTIMAL = "objective.sigma_kind=learned", "objective.sigma_kind=optimal"
RATE = torch.tensor(1e-3).item()  # it is kept in float32
BUFFER = "likelihood.scale.sigma"
needs_a_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ to compile a step with")


def plain_batches(run_config: config.Config, draws: int, steps: int) -> list[tuple[Tensor, Tensor]]:
    """The plan's images `(50, 1, 28, 28)` and noise `(draws, 50, 8)` of each step, in float64."""
    training, _ = datasets.load_training(run_config.data)
    plan = Plan(run_config.seed, 1000, 50)
    noise = [plan.noise(range(step, step + 1), range(50), (draws, 8))[0].transpose(0, 1) for step in range(steps)]
    return [(read(training, plan.batch(step)).double() / 255, noise[step].double()) for step in range(steps)]


def plain_vae(*arguments: str, make_config: MakeConfig) -> VAE:
    """A VAE of a fixed scale, with the same weights at the start."""
    return build_vae(make_config(*arguments), (1, 28, 28)).double()


@pytest.mark.parametrize(("likelihood", "order"), [(GAUSSIAN, 2), (LAPLACE, 1)])
def test_an_optimal_scale_trains_the_logarithm_of_the_error(
    likelihood: str, order: int, make_config: MakeConfig
) -> None:
    """The oracle: D/2 log(mean squared error), of the Laplace D log(mean absolute error), and the KL, by autograd."""
    run_config = make_config(
        likelihood, OPTIMAL, "train.steps=12", "train.precision=fp64", "objective.samples=2", "train.accumulate=3",
        "objective.beta=0.7", "optim.max_grad_norm=100", "ema.decay=0.5",
    )  # fmt: skip
    folder = find(train(run_config), Path()).folder
    ours, average = (load_file(folder / f"{name}.safetensors") for name in ("model", "ema"))

    vae = plain_vae(likelihood, make_config=make_config)
    optimizer = torch.optim.Adam(vae.parameters(), RATE)
    error = torch.zeros(())
    for step, (images, noise) in enumerate(plain_batches(run_config, 2, 12)):
        output = vae(images, noise)
        location = vae.decoder(output.latents.flatten(0, 1))
        mean = (images.repeat(2, 1, 1, 1) - location).abs().pow(order).mean()
        loss = 784 / order * mean.log() + 0.7 * output.kl.sum() / 2 / 50
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 100)
        optimizer.step()
        decay = min(0.99, step / (step + 9))
        error = decay * error + (1 - decay) * mean.detach()
    for name, parameter in vae.named_parameters():
        torch.testing.assert_close(ours[name], parameter.detach(), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(ours[BUFFER], error ** (1 / order))
    assert torch.equal(average[BUFFER], ours[BUFFER])


def test_a_learned_scale_has_a_learning_rate_of_its_own(make_config: MakeConfig) -> None:
    """The oracle: torch's Adam with a group of its own for the logarithm, and no scaled gradient."""
    arguments = ["train.precision=fp64", "objective.sigma=0.25"]
    run_config = make_config(GAUSSIAN, LEARNED, "objective.sigma_rate=7", "train.steps=12", *arguments)
    run_dir = train(run_config)
    source = opened(run_dir)
    ours = source.checkpoint.load_vae(source.config, torch.device("cpu"))

    vae = plain_vae(GAUSSIAN, *arguments, make_config=make_config)
    logarithm = torch.zeros((), dtype=torch.float64, requires_grad=True)
    groups: list[dict[str, Any]] = [{"params": vae.parameters()}, {"params": [logarithm], "lr": 7 * RATE}]
    optimizer = torch.optim.Adam(groups, RATE)
    for images, noise in plain_batches(run_config, 1, 12):
        output = vae(images, noise)
        sigma = SIGMA_FLOOR + (0.25 - SIGMA_FLOOR) * logarithm.exp()
        squared = (images - vae.decoder(output.latents[0])).square().sum()
        density = squared / 2 / sigma**2 + 50 * 784 * (sigma.log() + 0.5 * math.log(2 * math.pi))
        optimizer.zero_grad()
        ((density + output.kl.sum()) / 50).backward()
        optimizer.step()
    assert isinstance(ours.likelihood, LocationScaleKind)
    learned = ours.likelihood.scale(784)
    expected = SIGMA_FLOOR + (0.25 - SIGMA_FLOOR) * logarithm.detach().exp()
    torch.testing.assert_close(learned, expected, rtol=1e-6, atol=0)
    assert abs(learned - 0.25) > 0.01
    for name, parameter in vae.named_parameters():
        torch.testing.assert_close(dict(ours.named_parameters())[name], parameter.detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("spread", [0.07, 0.0])
@pytest.mark.parametrize("name", ["gaussian", "laplace"])
def test_a_learned_scale_converges_to_the_deviation(name: str, spread: float) -> None:
    """To the floor where there is none. Its gradient is a mean over pixel values, which no norm notices."""
    torch.manual_seed(0)
    kind = likelihood_kind(ObjectiveConfig(name, 0.5, "learned"))
    assert isinstance(kind, LocationScaleKind)
    optimizer = Adam(kind.named_parameters(), OptimConfig())
    images, location = spread * torch.randn(32, 3, 16, 16), torch.zeros(32, 3, 16, 16)
    (parameter,) = kind.parameters()
    largest = 0.0
    for _ in range(900):
        loss = -kind(location).log_prob(images).mean()
        (gradient,) = torch.autograd.grad(loss, [parameter])
        largest = max(largest, abs(gradient.item()))
        optimizer.step([gradient], torch.tensor(1e-3))
    error = images.square().mean().sqrt() if name == "gaussian" else images.abs().mean()
    assert largest < 2
    found = kind.scale(1).item()
    assert found == pytest.approx(error.item(), rel=0.05) if spread else SIGMA_FLOOR < found < 1.5 * SIGMA_FLOOR


@pytest.mark.parametrize("flat", [False, True])
def test_the_average_starts_from_the_first_batch_and_ignores_skipped_updates(
    flat: bool, make_config: MakeConfig
) -> None:
    settings = make_config(
        GAUSSIAN, OPTIMAL, "objective.sigma=5", "ema.decay=0.5", "train.batch_size=20", "train.nonfinite=skip",
        "train.precision=fp32",
    )  # fmt: skip
    torch.manual_seed(0)
    pixels, noise = torch.randint(256, (6, 20, 1, 8, 8), dtype=torch.uint8), torch.randn(6, 20, 1, 8)
    noise[0, 3, 0, 1] = noise[3, 7, 0, 3] = torch.nan
    error, number = 0.0, 0
    with processes.join(settings) as world:
        updating = update_of(settings, world, (1, 8, 8), flat=flat)
        recipe = updating.recipe
        model, ema = recipe.networks.values()
        assert isinstance(model, VAE)
        for step in range(6):
            before = [tensor.detach().clone() for tensor in recipe.tensors]
            with torch.no_grad():
                images = pixels[step] / 255
                location = model.decoder(model(images, noise[step].transpose(0, 1)).latents[0])
                mean = (images - location).double().square().mean().item()
            updating(batch_of(pixels[step : step + 1], noise[step : step + 1]), [recipe.values(step)])
            if step in (0, 3):
                assert all(map(torch.equal, before, recipe.tensors))
                continue
            decay = number / (number + 9)
            error, number = decay * error + (1 - decay) * mean, number + 1
            for network in model, ema:
                assert network.state_dict()[BUFFER].item() == pytest.approx(math.sqrt(error), rel=1e-5)
        assert sum(tensor is model.state_dict(keep_vars=True)[BUFFER] for tensor in recipe.tensors) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments", [[GAUSSIAN, LEARNED], [LAPLACE, OPTIMAL], [GAUSSIAN, OPTIMAL, "train.precision=bf16"]]
)
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(arguments: list[str], make_config: MakeConfig) -> None:
    given = [*arguments, "train.accumulate=3", "train.log_every=7", "ema.decay=0.9"]
    whole = train(make_config("name=whole", *given))
    for steps in (14, 28, 40):
        parts = train(make_config("name=parts", f"train.steps={steps}", *given))
    assert final(parts) == final(whole)
    logged = [row["train/sigma"] for row in rows(whole) if "train/loss" in row]
    assert logged == [row["train/sigma"] for row in rows(parts) if "train/loss" in row]
    assert len(set(logged)) == 6 and (LEARNED in arguments or logged[-1] < 0.7 * logged[0])
    stored = opened(parts).config.objective.sigma
    assert stored is not None and 0.1 < stored < 0.4


@pytest.mark.parametrize("kind", [LEARNED, OPTIMAL])
@pytest.mark.parametrize("flat", [False, True])
def test_a_run_of_captured_steps_is_bitwise_the_run(
    flat: bool, kind: str, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [GAUSSIAN, kind, "optim.max_grad_norm=20", "train.accumulate=2", "train.log_every=7", "ema.decay=0.9"]
    monkeypatch.setitem(RECIPES, "vae", partial(VAERecipe, flat=flat))
    plain = train(make_config(*arguments, "name=plain", "train.steps=20"))
    monkeypatch.setattr(update, "Update", partial(Update, capture=replaying))
    captured = train(make_config(*arguments, "name=captured", "train.steps=20"))
    assert final(captured) == final(plain) and timeless(captured) == timeless(plain)


@pytest.mark.slow
@needs_a_compiler
@pytest.mark.parametrize("kind", [LEARNED, OPTIMAL])
@pytest.mark.parametrize("flat", [False, True])
def test_a_compiled_step_equals_the_eager_step(
    flat: bool, kind: str, make_config: MakeConfig, caplog: pytest.LogCaptureFixture
) -> None:
    arguments = [GAUSSIAN, kind, "train.precision=fp64", "train.accumulate=3", "train.batch_size=32", "ema.decay=0.9"]
    torch.manual_seed(2)
    pixels = torch.randint(256, (6, 32, 1, 8, 8), dtype=torch.uint8)
    noise = torch.randn(6, 32, 1, 8, dtype=torch.float64)
    results = []
    for choice in ("false", "true"):
        settings = make_config(*arguments, f"train.compile={choice}")
        with processes.join(settings) as world:
            updating = update_of(settings, world, (1, 8, 8), flat=flat and choice == "true")
            for step in range(6):
                updating(batch_of(pixels[step : step + 1], noise[step : step + 1]), [updating.recipe.values(step)])
            states = [network.state_dict().values() for network in updating.recipe.networks.values()]
            results.append([updating.totals, *(value for state in states for value in state)])
    assert "can't be compiled" not in caplog.text
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_the_optimum_is_that_of_the_batch_on_several_processes(
    size: int, make_config: MakeConfig, smoke_arguments: list[str], fork_server: ForkServer, tmp_path: Path
) -> None:
    """Shards of 50 images in two micro-batches are uneven on three processes. A resumed run is bitwise the same."""
    given = [
        GAUSSIAN, OPTIMAL, "train.accumulate=2", "train.precision=fp64", "train.log_every=7", "ema.decay=0.9",
        "train.validate_every=1000",
    ]  # fmt: skip
    alone = train(make_config(*given, "name=alone", "train.steps=20"))
    common = [*smoke_arguments, f"runs_dir={tmp_path / 'runs'}", *given]
    names = [("whole", 20), ("parts", 9), ("parts", 20)]
    jobs = [("train", "", [*common, f"name={name}", f"train.steps={steps}"]) for name, steps in names]
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    results = fork_server.launch(size, str(REPOSITORY / "tests/worker.py"), str(tmp_path / "jobs.json"))
    assert [result.returncode for result in results] == [0] * size, results[0].stderr
    whole, parts = tmp_path / "runs/whole", tmp_path / "runs/parts"
    assert final(parts) == final(whole)
    ours, theirs = (load_file((newest_checkpoint(run) or run) / "model.safetensors") for run in (whole, alone))
    assert ours.keys() == theirs.keys() and BUFFER in ours
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-6, atol=1e-9)
    logged = [[row["train/sigma"] for row in rows(run) if "train/loss" in row] for run in (whole, alone)]
    assert len(logged[0]) == 3 and logged[0] == pytest.approx(logged[1], rel=1e-9)


def pixels_of(run_config: config.Config) -> Any:
    return read(datasets.load_training(run_config.data)[0], range(1000)).numpy() / 255


@pytest.mark.parametrize(("likelihood", "order"), [("gaussian", 2), ("laplace", 1)])
@pytest.mark.parametrize("kind", [LEARNED, OPTIMAL])
def test_it_starts_from_the_deviation_of_the_training_images(
    kind: str, likelihood: str, order: int, make_config: MakeConfig
) -> None:
    settings = [f"objective.reconstruction={likelihood}", kind]
    run_dir = train(make_config("name=a", *settings, "train.steps=4"))
    stored = opened(run_dir).config
    pixels = pixels_of(stored)
    expected = np.mean(np.abs(pixels - pixels.mean(0)) ** order) ** (1 / order)
    assert stored.objective.sigma == float(f"{expected:.4g}")
    result = evaluate(run_dir, ["evaluate.importance_samples=2"])
    assert result["comparable"] is False and f"a {likelihood.capitalize()} of pixels" in result["warning"]
    value = load_file((newest_checkpoint(run_dir) or run_dir) / "model.safetensors")
    if kind == OPTIMAL:
        assert result["protocol"]["likelihood"] == f"{likelihood}, optimal sigma {value[BUFFER].item():.3g}"
    else:
        assert result["protocol"]["likelihood"].startswith(f"{likelihood}, learned sigma 0.")
    train(make_config("name=a", *settings, "train.steps=5"))  # null takes the stored value
    with pytest.raises(UserError, match=r"objective.sigma \(was 0\.\d+, now 0.5\)"):
        train(make_config("name=a", *settings, "train.steps=6", "objective.sigma=0.5"))


def test_a_fixed_sigma_is_1_by_default(make_config: MakeConfig) -> None:
    run_dir = train(make_config("name=a", GAUSSIAN, "train.steps=1"))
    assert opened(run_dir).config.objective.sigma == 1.0
    assert not any("train/sigma" in row for row in rows(run_dir))
    likelihood = build_vae(make_config(GAUSSIAN), (1, 4, 4)).decode(torch.zeros(1, 8))
    assert isinstance(likelihood, Gaussian) and likelihood.sigma == 1.0


def test_the_deviation_is_of_the_first_images() -> None:
    pixels = torch.randint(256, (1100, 3, 2, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    source = in_memory("noise", pixels, None, "noise")
    first = pixels[:1024].double().numpy() / 255
    assert deviation(source, 2) == pytest.approx(np.sqrt(first.var(0).mean()), rel=1e-12)
    assert deviation(source, 1) == pytest.approx(np.abs(first - first.mean(0)).mean(), rel=1e-12)


def test_equal_images_have_a_sigma_to_start_from(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    load = datasets.DATASETS["synthetic_digits"]

    def grey(data: Any, part: Any) -> Any:
        source = load(data, part)
        pixels = torch.full((source.info.count, 1, 28, 28), 77, dtype=torch.uint8)
        return in_memory("synthetic_digits", pixels, source.labels(torch.arange(len(pixels))), "grey")

    monkeypatch.setitem(datasets.DATASETS, "synthetic_digits", grey)
    for kind in (LEARNED, OPTIMAL):
        run_dir = train(make_config(f"name={kind[-7:]}", GAUSSIAN, kind))
        assert opened(run_dir).config.objective.sigma == 0.01
        assert all(SIGMA_FLOOR <= row["train/sigma"] < 1 for row in rows(run_dir) if "train/loss" in row)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            [LEARNED],
            "sigma_kind=learned needs a likelihood with a scale to fit, and bernoulli has none: use .*gaussian or",
        ),
        ([OPTIMAL], "sigma_kind=optimal needs a likelihood with a scale to fit, and bernoulli has none"),
        ([GAUSSIAN, OPTIMAL, "objective.bound=iwae"], "use objective.sigma_kind=learned with objective.bound=iwae$"),
        ([GAUSSIAN, OPTIMAL, "objective.bound=iwae_dreg"], "learned with objective.bound=iwae_dreg$"),
        ([GAUSSIAN, LEARNED, "objective.sigma=0.001"], "learned can't start from objective.sigma=0.001: use more than"),
        ([GAUSSIAN, "objective.sigma_kind=best"], "objective.sigma_kind must be one of fixed, learned, optimal, not"),
        ([GAUSSIAN, LEARNED, "objective.sigma_rate=0"], "objective.sigma_rate must be above 0"),
        ([LAPLACE, "objective.sigma=1e-10"], "objective.sigma=1e-10 can't"),
    ],
)
def test_a_scale_that_can_not_be_is_refused_first(
    arguments: list[str], message: str, make_config: MakeConfig, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        train(make_config("name=a", *arguments))
    assert not (tmp_path / "runs").exists()


def test_the_importance_weighted_bound_learns_its_scale(make_config: MakeConfig) -> None:
    run_dir = train(make_config(GAUSSIAN, LEARNED, "objective.bound=iwae", "objective.samples=3", "train.steps=30"))
    logged = [row["train/sigma"] for row in rows(run_dir) if "train/loss" in row]
    assert abs(logged[-1] - logged[0]) > 0.01


def test_densities_of_fitted_scales_compare_with_one_another(make_config: MakeConfig) -> None:
    runs = {}
    for number, arguments in enumerate(([LEARNED], [OPTIMAL], ["objective.sigma=0.3"])):
        runs[number] = opened(train(make_config(f"name=run{number}", GAUSSIAN, "train.steps=1", *arguments)))
    assert incomparable([runs[0], runs[1]]) is None
    warning = incomparable([runs[0], runs[2]])
    assert warning is not None and "objective.sigma (fitted, 0.3)" in warning


@pytest.mark.parametrize(
    ("arguments", "idle"),
    [
        (["objective.sigma=0.3", "objective.mixtures=5"], ["objective.sigma", "objective.mixtures"]),
        (["objective.reconstruction=discretized_logistic_mixture", "objective.sigma=0.3"], ["objective.sigma"]),
        ([GAUSSIAN, "objective.sigma_rate=3", "objective.mixtures=5"], ["objective.sigma_rate", "objective.mixtures"]),
        (["model.prior_components=5"], ["model.prior_components"]),
        (["model.prior=mixture", "model.prior_components=5"], []),
        ([GAUSSIAN, LEARNED, "objective.sigma=0.3", "objective.sigma_rate=3"], []),
        (["objective.reconstruction=discretized_logistic_mixture", "objective.mixtures=5"], []),
    ],
)
def test_options_of_another_likelihood_or_prior_have_a_warning(
    arguments: list[str], idle: list[str], make_config: MakeConfig
) -> None:
    run_dir = train(make_config("name=idle", "train.steps=1", *arguments))
    warnings = re.findall(r"WARNING (\S+) has no effect with", (run_dir / "log.txt").read_text())
    assert warnings == idle
