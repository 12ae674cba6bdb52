"""The recipe `autoencoder` on one card, with LPIPS of random weights and a discriminator."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.feature_weights import random_tensors
from tests.gpu.conftest import STEPS, Train, resumed, state_of
from tests.gpu.test_training import outcome
from vae_dist.features.lpips import LPIPS

if not torch.cuda.is_available():
    pytest.skip("there is no GPU", allow_module_level=True)
RECIPE = [
    "train.recipe=autoencoder", "model.latent_channels=2", "model.blocks=1", "first_stage.kl_weight=0.01",
    "first_stage.adversarial_weight=0.2", "first_stage.discriminator_channels=8", "ema.decay=0.9",
    "optim.max_grad_norm=10",
]  # fmt: skip
UNCOMPILED = [
    "train.compile=false", "model.architecture=resnet", "model.channels=[8,16]", "model.attention=[2]",
    "first_stage.discriminator_layers=2", "first_stage.perceptual_weight=0.1",
]  # fmt: skip
# To compile VGG16 and attention takes minutes on one core; tests/gpu/first_stage.py does it.
COMPILED = [
    "train.compile=true", "model.architecture=resnet", "model.channels=[8]", "model.mid_attention=false",
    "first_stage.discriminator_layers=1",
]  # fmt: skip
SCHEDULE = ["first_stage.adversarial_start=8", "first_stage.adversarial_ramp=5", "first_stage.head_start=5"]
COMPARED = ["loss", "reconstruction_error", "kl_per_latent", "perceptual", "adversarial", "discriminator_loss"]
FILES = ["discriminator", "discriminator_optimizer", "ema", "memory", "model", "optimizer"]


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    path = tmp_path_factory.mktemp("weights") / "lpips.safetensors"
    save_file(random_tensors(LPIPS, seed=0), path)
    return [*UNCOMPILED, f"first_stage.perceptual={path}"]


def weighed(adaptive: str) -> str:
    return f"first_stage.adaptive={'true' if adaptive == 'adaptive' else 'false'}"


@pytest.mark.parametrize(
    ("precision", "adaptive", "compiled"),
    [
        ("bf16", "adaptive", "eager"), ("fp32", "fixed", "eager"),
        ("bf16", "fixed", "compiled"), ("fp32", "adaptive", "compiled"),
    ],
)  # fmt: skip
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(
    precision: str, adaptive: str, compiled: str, recipe: list[str], colour_run: Train
) -> None:
    network = COMPILED if compiled == "compiled" else recipe
    given = [*RECIPE, *network, *SCHEDULE, weighed(adaptive), f"train.precision={precision}"]
    given += ["first_stage.skip_norm=1000"]
    name = f"{precision}_{adaptive}_{compiled}"
    straight = colour_run(name, *given)
    torch.compiler.reset()
    expected = state_of(straight)
    assert sorted(expected) == [f"{file}.safetensors" for file in FILES]
    assert state_of(resumed(colour_run, f"{name}_resumed", *given)) == expected
    moments = load_file(straight / f"checkpoints/step_{STEPS:08d}/discriminator_optimizer.safetensors")
    # The discriminator waits for step 3, and is trained in all steps from there on.
    assert {value.item() for key, value in moments.items() if key.endswith(".step")} == {STEPS - 3}


def losses(folder: Path) -> torch.Tensor:
    rows = [row for row in outcome(folder, 10)[2] if "train/loss" in row]
    assert len(rows) == 10
    return torch.tensor([[row.get(f"train/{name}", 0.0) for name in COMPARED] for row in rows])


@pytest.mark.parametrize("adaptive", ["adaptive", "fixed"])
def test_a_cpu_and_a_gpu_see_the_same_losses_of_the_recipe(adaptive: str, recipe: list[str], colour_run: Train) -> None:
    # A large eps: otherwise Adam makes an update of every rounding error.
    given = [*RECIPE, *recipe, weighed(adaptive), "train.steps=10", "train.log_every=1", "optim.eps=0.001"]
    cpu, card = (losses(colour_run(f"{adaptive}_{device}", *given, f"device={device}")) for device in ("cpu", "cuda"))
    torch.testing.assert_close(card, cpu, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("precision", "adaptive", "tolerance"), [("fp32", "adaptive", 1e-4), ("bf16", "fixed", 2e-2)])
def test_compiled_steps_have_the_losses_of_eager_ones(
    precision: str, adaptive: str, tolerance: float, colour_run: Train
) -> None:
    given = [*RECIPE, *COMPILED, weighed(adaptive), "train.steps=10", "train.log_every=1", "optim.eps=0.001"]
    given += [f"train.precision={precision}"]
    plain, compiled = (
        losses(colour_run(f"{precision}_{choice}_losses", *given, f"train.compile={choice}"))
        for choice in ("false", "true")
    )
    torch.testing.assert_close(compiled, plain, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("adaptive", ["adaptive", "fixed"])
def test_activations_computed_twice_change_no_bit(adaptive: str, recipe: list[str], colour_run: Train) -> None:
    given = [*RECIPE, *recipe, weighed(adaptive), "train.precision=bf16", "train.accumulate=2"]
    plain = colour_run(f"{adaptive}_kept", *given)
    twice = colour_run(f"{adaptive}_twice", *given, "train.checkpointing=true")
    assert state_of(twice) == state_of(plain)
    assert state_of(resumed(colour_run, f"{adaptive}_twice_resumed", *given, "train.checkpointing=true")) == state_of(
        plain
    )
