"""The recipe `autoencoder`: gradients of both networks, the adaptive weight, resumes, and options."""

import copy
import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.conftest import REPOSITORY, newest_checkpoint
from tests.feature_weights import random_tensors
from tests.forked import ForkServer
from tests.test_distributed import torchrun
from vae_dist import config as configs
from vae_dist.config import SIGMA_FLOOR
from vae_dist.data.batches import Batch
from vae_dist.distributed import processes
from vae_dist.errors import UserError
from vae_dist.features.lpips import LPIPS
from vae_dist.models import build_vae
from vae_dist.models.discriminator import PatchDiscriminator, accuracy, hinge, least_side
from vae_dist.models.vae import VAE, Inference
from vae_dist.runs.run import RunDirectory
from vae_dist.training.autoencoder_recipe import AutoencoderRecipe, Gradients
from vae_dist.training.first_stage import SMALLEST_NORM
from vae_dist.training.loop import train
from vae_dist.training.loss_scaler import LossScaler
from vae_dist.training.update import freeze

WEIGHT, KL = 0.3, 0.01
SCALE = "likelihood.scale.parameter"

BASE = [
    "data.name=synthetic_digits", "data.synthetic_images=600", "data.image_shape=[1,28,28]",
    "model.architecture=conv", "model.channels=[4,8]", "model.latent_channels=1",
    "train.recipe=autoencoder", "objective.reconstruction=laplace", "train.batch_size=6",
    "tracking.wandb=disabled", "device=cpu", "train.threads=1", f"first_stage.kl_weight={KL}",
]  # fmt: skip
ADVERSARIAL = [
    f"first_stage.adversarial_weight={WEIGHT}", "first_stage.discriminator_channels=4",
    "first_stage.discriminator_layers=2",
]  # fmt: skip


@contextmanager
def recipe_of(*arguments: str) -> Iterator[AutoencoderRecipe]:
    config = configs.load([*BASE, *arguments])
    with processes.join(config) as world:
        vae = build_vae(config, (1, 28, 28))
        yield AutoencoderRecipe(vae, config, world, LossScaler("fp32", world.device), 100)


def random_batch(vae: VAE, count: int = 6, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, 1, 28, 28), dtype=torch.uint8, generator=generator)
    noise = torch.randn(count, 1, vae.latent_dim, generator=generator)
    return Batch(pixels, noise, torch.empty(0, dtype=torch.int64))


def take(recipe: AutoencoderRecipe, batch: Batch, step: int = 0) -> Tensor:
    """Take one step; return its totals."""
    totals = torch.zeros(len(recipe.image_values) + len(recipe.norms) + 3, dtype=torch.float64)
    recipe.step(batch, torch.tensor(list(recipe.values(step).values()), dtype=torch.float64), totals)
    return totals


def forward(vae: VAE, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Images in [0, 1], their reconstructions, and the KL of each image, written from the paper's formulas."""
    images = batch.pixels.float() / 255
    posterior = vae.infer(images)
    mean, log_variance = posterior.mean, posterior.log_variance
    latents = mean + torch.exp(log_variance / 2) * batch.noise[:, 0]
    kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).mean(1)
    likelihood: Any = vae.decode(latents)
    return images, likelihood.location, kl


def plain_gradients(vae: VAE, critic: nn.Module, batch: Batch, weight: float) -> tuple[list[Tensor], list[Tensor]]:
    """Both networks' gradients by autograd, one network after the other, each with a graph of its own."""
    vae, critic = copy.deepcopy(vae), copy.deepcopy(critic)
    images, fakes, kl = forward(vae, batch)
    loss = (fakes - images).abs().mean() + KL * kl.mean() - weight * critic(2 * fakes - 1).mean()
    ours = torch.autograd.grad(loss, list(vae.parameters()))
    real, fake = critic(2 * images - 1), critic(2 * fakes.detach() - 1)
    loss = 0.5 * (torch.relu(1 - real).mean() + torch.relu(1 + fake).mean())
    return list(ours), list(torch.autograd.grad(loss, list(critic.parameters())))


def critic_of(recipe: AutoencoderRecipe) -> PatchDiscriminator:
    assert recipe.discriminator is not None
    return recipe.discriminator


def gradients_of(recipe: AutoencoderRecipe, batch: Batch, weight: float = WEIGHT) -> Gradients:
    return recipe.gradients(batch, torch.tensor(weight))


def assert_close(ours: Sequence[Tensor], theirs: Sequence[Tensor], tolerance: float = 1e-5) -> None:
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).norm() <= tolerance * other.norm() + 1e-9


# ---- Gradients


def test_both_networks_gradients_are_those_of_their_own_losses_alone() -> None:
    with recipe_of(*ADVERSARIAL) as recipe:
        batch = random_batch(recipe.model)
        ours, critics = plain_gradients(recipe.model, critic_of(recipe), batch, WEIGHT)
        found = gradients_of(recipe, batch).of_weights
        assert_close(found[: len(ours)], ours)
        assert_close(found[len(ours) :], critics)
        assert all(weight.grad is None for network in recipe.networks.values() for weight in network.parameters())


def leaking_gradients(vae: VAE, critic: nn.Module, batch: Batch, weight: float) -> tuple[list[Tensor], list[Tensor]]:
    """The step of diffusers' train_autoencoderkl.py at 58eb52c: one optimizer's `zero_grad` at a time.

    The generator's backward fills the discriminator's gradients, which its own step then adds to; the discriminator's
    backward goes through reconstructions that are not detached.
    """
    vae, critic = copy.deepcopy(vae), copy.deepcopy(critic)
    images, fakes, kl = forward(vae, batch)
    ((fakes - images).abs().mean() + KL * kl.mean() - weight * critic(2 * fakes - 1).mean()).backward(retain_graph=True)
    ours = [parameter.grad.clone() for parameter in vae.parameters() if parameter.grad is not None]
    vae.zero_grad()
    real, fake = critic(2 * images - 1), critic(2 * fakes - 1)
    (0.5 * (torch.relu(1 - real).mean() + torch.relu(1 + fake).mean())).backward()
    return ours, [parameter.grad for parameter in critic.parameters() if parameter.grad is not None]


def test_a_public_step_that_leaks_has_other_gradients() -> None:
    with recipe_of(*ADVERSARIAL) as recipe:
        batch = random_batch(recipe.model)
        ours, leaking = leaking_gradients(recipe.model, critic_of(recipe), batch, WEIGHT)
        found = gradients_of(recipe, batch).of_weights
        assert_close(found[: len(ours)], ours)
        with pytest.raises(AssertionError):
            assert_close(found[len(ours) :], leaking, tolerance=0.05)


@pytest.mark.parametrize("adaptive", [False, True])
def test_gradients_as_a_pure_function_are_those_of_autograd(adaptive: bool) -> None:
    """A compiler traces the former."""
    learned = ["first_stage.reconstruction=likelihood", "objective.sigma_kind=learned", "objective.sigma=0.3"]
    with recipe_of(*ADVERSARIAL, *learned, f"first_stage.adaptive={str(adaptive).lower()}") as recipe:
        recipe.model.double(), critic_of(recipe).double()
        batch, strength = random_batch(recipe.model), torch.tensor(WEIGHT).double()
        batch = batch._replace(noise=batch.noise.double())
        weights = [*recipe.model.parameters(), *critic_of(recipe).parameters()]
        with torch.no_grad():
            functional = recipe._functional(*batch, strength, *weights)
        eager = recipe._eager(*batch, strength, *weights)
        assert len(eager) == 2 + adaptive + len(weights)
        assert_close(functional, eager, tolerance=1e-12)


def test_without_an_adversarial_weight_the_loss_is_error_and_kl() -> None:
    for kind in ("l1", "l2", "likelihood"):
        sigma = ["objective.sigma=0.2"]
        with recipe_of(f"first_stage.reconstruction={kind}", *sigma) as recipe:
            batch = random_batch(recipe.model)
            vae = copy.deepcopy(recipe.model)
            images, fakes, kl = forward(vae, batch)
            distance = (fakes - images).abs()
            error = {"l1": distance, "l2": distance**2, "likelihood": distance / 0.2 + math.log(0.4)}[kind].mean()
            theirs = torch.autograd.grad(error + KL * kl.mean(), list(vae.parameters()))
            found = gradients_of(recipe, batch)
            assert_close(found.of_weights, theirs)
            loss, reconstruction, per_latent = (found.sums / 6).tolist()
            assert reconstruction == pytest.approx(error.item(), rel=1e-5)
            assert per_latent == pytest.approx(kl.mean().item(), rel=1e-5)
            assert loss == pytest.approx(error.item() + KL * kl.mean().item(), rel=1e-5)


def test_a_learned_scale_is_in_the_optimizer_and_moves_to_the_mean_error() -> None:
    arguments = ["first_stage.reconstruction=likelihood", "objective.sigma_kind=learned", "objective.sigma=0.5"]
    with recipe_of(*arguments, "optim.learning_rate=0.003") as recipe:
        names = [name for name, _ in recipe.model.named_parameters()]
        assert any("scale" in name for name in names)
        for step in range(60):
            totals = take(recipe, random_batch(recipe.model, seed=step), step)
        values = dict(zip(recipe.image_values, (totals / 6).tolist(), strict=False))
        _, fakes, _ = forward(recipe.model, random_batch(recipe.model, seed=99))
        error = (fakes - random_batch(recipe.model, seed=99).pixels / 255).abs().mean().item()
        assert values["sigma"] == pytest.approx(error, rel=0.1)


@pytest.mark.parametrize("name", ["laplace", "gaussian"])
def test_a_learned_scale_has_the_gradient_that_it_has_in_the_recipe_vae(name: str) -> None:
    """That of the mean over pixel values by the logarithm, whatever the size of the images. The oracle: autograd."""
    arguments = [f"objective.reconstruction={name}", "objective.sigma_kind=learned", "objective.sigma=0.7"]
    with recipe_of("first_stage.reconstruction=likelihood", *arguments) as recipe:
        batch, vae = random_batch(recipe.model), copy.deepcopy(recipe.model)
        found = dict(
            zip((name for name, _ in vae.named_parameters()), gradients_of(recipe, batch).of_weights, strict=True)
        )
        gradient = found.pop(SCALE)
        images, fakes, kl = forward(vae, batch)
        logarithm = torch.zeros((), requires_grad=True)
        sigma = SIGMA_FLOOR + (0.7 - SIGMA_FLOOR) * logarithm.exp()
        distribution: Any = torch.distributions.Normal if name == "gaussian" else torch.distributions.Laplace
        loss = KL * kl.mean() - distribution(fakes, sigma).log_prob(images).mean()
        others = [weight for name, weight in vae.named_parameters() if name != SCALE]
        expected, *theirs = torch.autograd.grad(loss, [logarithm, *others])
        torch.testing.assert_close(gradient, expected)
        assert_close(list(found.values()), theirs)
        assert gradient.abs() > 0.1

        inference: Inference = vae(images, batch.noise.transpose(0, 1))
        density = inference.log_likelihood(images).mean()  # a sum over pixel values
        torch.testing.assert_close(gradient, -torch.autograd.grad(density, vae.get_parameter(SCALE))[0])


@pytest.mark.parametrize("adaptive", [False, True])
def test_micro_batches_give_the_large_batch(adaptive: bool) -> None:
    arguments = [*ADVERSARIAL, f"first_stage.adaptive={str(adaptive).lower()}"]
    with recipe_of(*arguments) as whole, recipe_of(*arguments, "train.accumulate=4") as parts:
        batch = random_batch(whole.model)
        one, other = gradients_of(whole, batch), gradients_of(parts, batch)
        assert_close(other.of_weights, one.of_weights)
        assert_close(other.of_adversarial, one.of_adversarial)
        torch.testing.assert_close(other.sums, one.sums, rtol=1e-5, atol=1e-6)
        assert len(one.of_adversarial) == adaptive


def test_the_perceptual_term_has_a_gradient(tmp_path: Path) -> None:
    """diffusers' train_autoencoderkl.py at 58eb52c computes LPIPS under no_grad: there it changes the loss alone."""
    tensors = random_tensors(LPIPS, seed=0)
    save_file(tensors, tmp_path / "lpips.safetensors")
    file = f"first_stage.perceptual={tmp_path / 'lpips.safetensors'}"
    with recipe_of("first_stage.perceptual_weight=0.5", file) as recipe, recipe_of() as without:
        batch = random_batch(recipe.model)
        vae = copy.deepcopy(recipe.model)
        images, fakes, kl = forward(vae, batch)
        network = LPIPS()
        network.load_state_dict(tensors)
        wide = [2 * part.expand(-1, 3, -1, -1) - 1 for part in (fakes, images)]
        perceptual = network(*wide).mean()
        loss = (fakes - images).abs().mean() + KL * kl.mean() + 0.5 * perceptual
        theirs = torch.autograd.grad(loss, list(vae.parameters()))
        found = gradients_of(recipe, batch)
        assert_close(found.of_weights, theirs)
        with pytest.raises(AssertionError):
            assert_close(found.of_weights, gradients_of(without, batch).of_weights, tolerance=0.05)
        place = recipe.image_values.index("perceptual")
        assert found.sums[place] / 6 == pytest.approx(perceptual.item(), rel=1e-4)
        assert recipe.frozen.keys() == {"perceptual"}


@pytest.mark.parametrize(("precision", "in_a_step"), [("fp32", False), ("bf16", True)])
def test_lpips_may_use_tf32_in_a_step_in_bf16_and_nothing_else_may(
    precision: str, in_a_step: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file(random_tensors(LPIPS, seed=0), tmp_path / "lpips.safetensors")
    file = f"first_stage.perceptual={tmp_path / 'lpips.safetensors'}"
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # as in every process of ours
    with recipe_of("first_stage.perceptual_weight=0.5", file, f"train.precision={precision}") as recipe:
        assert not torch.backends.cudnn.allow_tf32
        seen = []
        hook = recipe.frozen["perceptual"].register_forward_hook(
            lambda *_: seen.append(torch.backends.cudnn.allow_tf32)
        )
        take(recipe, random_batch(recipe.model))
        hook.remove()
        assert seen == [in_a_step] and not torch.backends.cudnn.allow_tf32


def test_a_frozen_encoder_keeps_its_weights() -> None:
    config = configs.load([*BASE, *ADVERSARIAL, "ema.decay=0.5"])
    config.train.freeze = "encoder"
    with processes.join(config) as world:
        vae = build_vae(config, (1, 28, 28))
        freeze(vae, config)
        recipe = AutoencoderRecipe(vae, config, world, LossScaler("fp32", world.device), 100)
        before = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
        take(recipe, random_batch(vae))
        for network in vae, recipe.model:
            for name, tensor in network.state_dict().items():
                assert torch.equal(tensor, before[name]) == name.startswith("encoder."), name


# ---- The adversarial weight


def test_the_adaptive_factor_is_the_ratio_of_the_last_steps_norms_at_the_last_layer() -> None:
    with recipe_of(*ADVERSARIAL, "first_stage.adaptive=true") as recipe:
        first, second = random_batch(recipe.model, seed=1), random_batch(recipe.model, seed=2)
        vae, critic = copy.deepcopy(recipe.model), copy.deepcopy(critic_of(recipe))
        images, fakes, kl = forward(vae, first)
        last = [weight for weight in vae.decoder.parameters() if weight.ndim > 1][-1]
        others = torch.autograd.grad((fakes - images).abs().mean() + KL * kl.mean(), last, retain_graph=True)[0]
        adversarial = torch.autograd.grad(-critic(2 * fakes - 1).mean(), last)[0]
        totals = take(recipe, first)
        names = [*recipe.image_values, *recipe.norms]
        factor = names.index("adversarial_factor")
        assert totals[factor] == pytest.approx(1 / (1 + SMALLEST_NORM))  # nothing is known before the first step
        expected = (others.norm() / (adversarial.norm() + SMALLEST_NORM)).item()
        ours, _ = plain_gradients(recipe.model, critic_of(recipe), second, WEIGHT * expected)
        found = gradients_of(recipe, second, WEIGHT * expected)
        assert_close(found.of_weights[: len(ours)], ours)
        assert take(recipe, second, 1)[factor] == pytest.approx(expected, rel=1e-4)


def test_the_adaptive_factor_has_a_largest_value() -> None:
    with recipe_of(*ADVERSARIAL, "first_stage.adaptive=true", "first_stage.adaptive_most=0.5") as recipe:
        recipe.memory.norms.copy_(torch.tensor([3.0, 1.0]))
        assert (
            take(recipe, random_batch(recipe.model))[[*recipe.image_values, *recipe.norms].index("adversarial_factor")]
            == 0.5
        )


def test_the_discriminator_has_a_head_start_and_the_weight_a_ramp() -> None:
    schedule = ["first_stage.adversarial_start=4", "first_stage.adversarial_ramp=2", "first_stage.head_start=3"]
    with recipe_of(*ADVERSARIAL, *schedule) as recipe:
        weights = [recipe.values(step)["adversarial_weight"] for step in range(8)]
        assert weights == pytest.approx([0, 0, 0, 0, WEIGHT / 2, WEIGHT, WEIGHT, WEIGHT])
        critic = critic_of(recipe)
        for step in range(3):
            before = copy.deepcopy(critic.state_dict())
            take(recipe, random_batch(recipe.model, seed=step), step)
            moved = any(not torch.equal(before[name], now) for name, now in critic.state_dict().items())
            assert moved == (step >= 1)


def test_the_autoencoder_does_not_feel_the_discriminator_before_its_start() -> None:
    schedule = ["first_stage.adversarial_start=2", "first_stage.head_start=2"]
    with recipe_of(*ADVERSARIAL, *schedule) as recipe, recipe_of() as alone:
        for step in range(3):
            for one in recipe, alone:
                take(one, random_batch(one.model, seed=step), step)
            equal = all(map(torch.equal, recipe.model.parameters(), alone.model.parameters()))
            assert equal == (step < 2)


# ---- Updates that are skipped


def test_every_number_of_a_checkpoint_is_compared_over_the_processes() -> None:
    with recipe_of(*ADVERSARIAL, "first_stage.adaptive=true", "ema.decay=0.5") as recipe:
        compared = {tensor.data_ptr() for tensor in recipe.tensors}
        for name, network in recipe.networks.items():
            for key, tensor in network.state_dict().items():
                assert tensor.data_ptr() in compared, (name, key)


def test_a_spike_changes_nothing_and_is_counted() -> None:
    with recipe_of(*ADVERSARIAL, "first_stage.skip_norm=1e-6", "ema.decay=0.5") as recipe:
        averages = [weight.zero_() for weight in recipe.networks["ema"].parameters()]  # other ones than the weights
        tensors = [tensor for optimizer in recipe.optimizers.values() for tensor in optimizer.tensors] + averages
        before = [tensor.clone() for tensor in tensors]
        totals = take(recipe, random_batch(recipe.model))
        assert len(recipe.optimizers) == 2 and all(map(torch.equal, before, tensors))
        names = [*recipe.image_values, *recipe.norms]
        assert totals[names.index("spikes")] == 1 and recipe.memory.spikes == 1
        assert totals[-3:].tolist() == [1, 1, 0]  # the run goes on
    with recipe_of(*ADVERSARIAL, "first_stage.skip_norm=1e6") as recipe:
        take(recipe, random_batch(recipe.model))
        assert recipe.memory.spikes == 0


@pytest.mark.parametrize(("before", "skip_norm", "kept"), [(0.1, 1e-6, True), (100, 1e-6, False), (0.1, 1e6, False)])
def test_a_spike_does_not_raise_the_adaptive_weight(before: float, skip_norm: float, kept: bool) -> None:
    """It may lower it: a weight that is too large, and not the images, may be what makes a norm large."""
    with recipe_of(*ADVERSARIAL, "first_stage.adaptive=true", f"first_stage.skip_norm={skip_norm}") as recipe:
        recipe.memory.norms.copy_(torch.tensor([before, 1.0]))
        take(recipe, random_batch(recipe.model))
        others, adversarial = recipe.memory.norms.tolist()
        assert [others, adversarial] == pytest.approx([before, 1]) if kept else 0.2 < others / adversarial < 50


def test_a_discriminator_that_is_not_finite_stops_both_updates() -> None:
    with recipe_of(*ADVERSARIAL) as recipe:
        with torch.no_grad():
            next(critic_of(recipe).parameters()).fill_(math.nan)
        before = [weight.clone() for weight in recipe.model.parameters()]
        totals = take(recipe, random_batch(recipe.model))
        assert totals[-1] == 1 and all(map(torch.equal, before, recipe.model.parameters()))


# ---- Runs

EVERYTHING = [
    *BASE, *ADVERSARIAL, "first_stage.adaptive=true", "first_stage.skip_norm=5", "ema.decay=0.9",
    "first_stage.adversarial_start=3", "first_stage.head_start=2", "train.log_every=2", "checkpoint.every=2",
    "train.validate_every=1",
]  # fmt: skip
FILES = ["model", "ema", "discriminator", "memory", "optimizer", "discriminator_optimizer"]


def contents(run: Path) -> dict[str, bytes]:
    folder = newest_checkpoint(run)
    assert folder is not None
    return {name: (folder / f"{name}.safetensors").read_bytes() for name in FILES}


def test_a_resumed_run_is_bitwise_the_uninterrupted_one(data_root: Path, tmp_path: Path) -> None:
    common = [*EVERYTHING, f"data.root={data_root}", f"runs_dir={tmp_path}"]
    train(configs.load([*common, "name=whole", "train.steps=8"]))
    for steps in (3, 5, 8):
        train(configs.load([*common, "name=cut", f"train.steps={steps}"]))
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    whole, cut = (RunDirectory(tmp_path / name).metrics[-1] for name in ("whole", "cut"))
    drop = {"train/images_per_second"}
    assert {k: v for k, v in whole.items() if k not in drop} == {k: v for k, v in cut.items() if k not in drop}
    errors = dict(RunDirectory(tmp_path / "whole").points("validation/reconstruction"))
    best = RunDirectory(tmp_path / "whole").best()
    assert best is not None and len(errors) == 8 and errors[best.step] == min(errors.values())
    assert whole["validation/best_reconstruction"] == min(errors.values())


def moments(run: Path) -> dict[str, Tensor]:
    """Both networks' first moments after one step: a tenth of their gradients."""
    folder = newest_checkpoint(run)
    assert folder is not None
    files = [load_file(folder / f"{name}.safetensors") for name in ("optimizer", "discriminator_optimizer")]
    return {name: value for file in files for name, value in file.items() if name.endswith("exp_avg")}


@pytest.mark.parametrize("size", [3, pytest.param(2, marks=pytest.mark.slow)])
def test_both_networks_gradients_are_averaged_over_the_processes(
    size: int, fork_server: ForkServer, data_root: Path, tmp_path: Path
) -> None:
    """diffusers' trainer calls the unwrapped network, so that its gradients are never averaged; RAE's does so with the
    discriminator. There each process would have the gradients of its own images."""
    arguments = [
        *BASE, *ADVERSARIAL, "train.steps=1", "train.batch_size=7", "train.precision=fp64",
        f"data.root={data_root}", f"runs_dir={tmp_path}",
    ]  # fmt: skip
    train(configs.load([*arguments, "name=one"]))
    for result in fork_server.launch(size, str(REPOSITORY / "vae_dist/train.py"), *arguments, "name=several"):
        assert result.returncode == 0, result.stderr
    one, several = moments(tmp_path / "one"), moments(tmp_path / "several")
    assert one.keys() == several.keys()
    for name, value in one.items():
        assert (several[name] - value).norm() <= 1e-9 * value.norm() + 1e-15, name


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_a_run_on_several_processes_resumes_bitwise(
    size: int, fork_server: ForkServer, data_root: Path, tmp_path: Path
) -> None:
    common = [*EVERYTHING, f"data.root={data_root}", f"runs_dir={tmp_path}"]
    for name, steps in (("whole", 8), ("cut", 3), ("cut", 8)):
        command = [str(REPOSITORY / "vae_dist/train.py"), *common, f"name={name}", f"train.steps={steps}"]
        assert {result.returncode for result in fork_server.launch(size, *command)} == {0}
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ to compile a step with")
def test_a_compiled_run_on_two_processes_trains_as_an_uncompiled_one(data_root: Path, tmp_path: Path) -> None:
    common = [
        *(option for option in BASE if not option.startswith("model.")), "model.hidden_dims=[8]", "model.latent_dim=3",
        *ADVERSARIAL, "first_stage.discriminator_layers=1", "first_stage.adaptive=true", "train.precision=fp64",
        "train.steps=4", "train.log_every=1", "train.validate_every=4",
        f"data.root={data_root}", f"runs_dir={tmp_path}",
    ]  # fmt: skip
    for compiled in ("false", "true"):
        command = [str(REPOSITORY / "vae_dist/train.py"), *common, f"name={compiled}", f"train.compile={compiled}"]
        result = torchrun(2, *command)
        assert result.returncode == 0, result.stderr
    assert "can't be compiled" not in (tmp_path / "true/log.txt").read_text()
    uncompiled, compiled_rows = (
        [row for row in RunDirectory(tmp_path / name).metrics if "train/loss" in row] for name in ("false", "true")
    )
    assert len(uncompiled) == 4
    for one, other in zip(compiled_rows, uncompiled, strict=True):
        for name in ("loss", "adversarial", "discriminator_loss", "adversarial_factor", "grad_norm"):
            assert one[f"train/{name}"] == pytest.approx(other[f"train/{name}"], rel=1e-9), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["first_stage.perceptual=lpips.safetensors"], "LPIPS is not trained on"),
        (["first_stage.adversarial_start=3"], "there is no discriminator"),
        ([*ADVERSARIAL, "first_stage.adversarial_start=5"], "the loss never has its adversarial term"),
        (["first_stage.skip_norm=1e-6"], "no update was applied since the last record"),
        ([*ADVERSARIAL, "first_stage.adversarial_start=3", "first_stage.skip_norm=1e6"], None),
    ],
)
def test_options_without_an_effect_have_a_warning(
    arguments: list[str], message: str | None, data_root: Path, tmp_path: Path
) -> None:
    common = [*BASE, f"data.root={data_root}", f"runs_dir={tmp_path}", "train.steps=4", "train.log_every=4"]
    run = train(configs.load([*common, *arguments]))
    warnings = [line for line in (run / "log.txt").read_text().splitlines() if "WARNING" in line]
    assert [line for line in warnings if message in line] if message else not warnings


def test_images_that_lpips_can_not_take_are_refused_before_a_run_begins(tmp_path: Path) -> None:
    pixels = torch.zeros(20, 12, 12, 3, dtype=torch.uint8).numpy()
    np.save(tmp_path / "small.npy", pixels)
    save_file(random_tensors(LPIPS, seed=0), tmp_path / "lpips.safetensors")
    arguments = [
        *(option for option in BASE if not option.startswith("data.")), "data.name=array",
        f"data.path={tmp_path / 'small.npy'}", f"first_stage.perceptual={tmp_path / 'lpips.safetensors'}",
        "first_stage.perceptual_weight=1", f"runs_dir={tmp_path / 'new'}",
    ]  # fmt: skip
    with pytest.raises(UserError, match="images of at least 16 x 16, and these are 12 x 12"):
        train(configs.load(arguments))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["objective.reconstruction=bernoulli"], "needs objective.reconstruction=laplace or gaussian"),
        (["objective.beta=2"], "weighs its KL by first_stage.kl_weight"),
        (["objective.sigma_kind=learned", "objective.sigma=0.1"], "first_stage.reconstruction=likelihood with"),
        (["first_stage.adaptive=true"], "first_stage.adaptive needs first_stage.adversarial_weight"),
        (["first_stage.adversarial_weight=1", "first_stage.discriminator_layers=4"], "images of at least 48 x 48"),
        (["first_stage.perceptual_weight=1"], "needs first_stage.perceptual, the file that"),
        (["first_stage.perceptual_weight=1", "first_stage.perceptual=no.safetensors"], "no.safetensors can't be read"),
        (["train.recipe=vae"], "are for train.recipe=autoencoder"),
    ],
)
def test_options_that_do_not_fit_are_refused(arguments: list[str], message: str, data_root: Path) -> None:
    with pytest.raises(UserError, match=message):
        train(configs.load([*BASE, f"data.root={data_root}", "runs_dir=new", *arguments]))
    assert not Path("new").exists()


def test_a_launchers_fp16_is_refused_where_auto_has_become_it() -> None:
    config = configs.load(BASE)
    scaler: Any = SimpleNamespace(active=True)
    with processes.join(config) as world, pytest.raises(UserError, match="is for fp32, tf32, bf16 and fp64"):
        AutoencoderRecipe(build_vae(config, (1, 28, 28)), config, world, scaler, 1)


# ---- The discriminator


def test_the_discriminator_is_of_each_image_alone() -> None:
    torch.manual_seed(0)
    critic = PatchDiscriminator(3, 8, 3)
    images = torch.rand(4, 3, 64, 64) * 2 - 1
    logits = critic(images)
    assert logits.shape == (4, 6, 6)
    torch.testing.assert_close(critic(images[1:2]), logits[1:2], rtol=1e-4, atol=1e-6)
    assert not [module for module in critic.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    with torch.autocast("cpu", torch.bfloat16):
        assert critic(images).dtype == torch.float32
    assert 0.015 < next(critic.parameters()).std() < 0.025


@pytest.mark.parametrize("layers", range(1, 6))
def test_the_smallest_image_of_a_discriminator_is_known(layers: int) -> None:
    side = least_side(layers)
    critic = PatchDiscriminator(1, 8, layers)
    assert critic(torch.rand(1, 1, side, side)).numel() >= 1
    with pytest.raises(RuntimeError):
        critic(torch.rand(1, 1, side - 1, side - 1))


def test_losses_are_means_over_patches() -> None:
    real, fake = torch.tensor([[[2.0, 0.5]]]), torch.tensor([[[-3.0, 0.25]]])
    assert hinge(real, fake).item() == pytest.approx(0.5 * ((0 + 0.5) / 2 + (0 + 1.25) / 2))
    assert accuracy(real, fake).item() == 0.75
