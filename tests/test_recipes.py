"""A recipe of two networks, on one process; test_distributed runs it on several."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import MakeConfig, batch_of, update_of
from tests.two_networks import TwoNetworks
from tests.worker import scaled_accelerator
from vae_dist import objectives
from vae_dist.config import Config
from vae_dist.distributed import precision, processes
from vae_dist.distributed.world import World
from vae_dist.errors import UserError
from vae_dist.models import build_vae
from vae_dist.runs.lookup import find
from vae_dist.training.loop import train
from vae_dist.training.loss_scaler import LossScaler
from vae_dist.training.recipes import totals_of
from vae_dist.training.update import Update

SETTINGS = ["train.recipe=two_networks", "ema.decay=0.9", "train.batch_size=50", "train.accumulate=3"]
PARTS = ("model", "ema", "critic", "optimizer", "critic_optimizer")


def made(config: Config, world: World) -> tuple[TwoNetworks, Update]:
    scaler = LossScaler(config.train.precision, world.device)
    dtype = torch.float64 if config.train.precision == "fp64" else torch.float32
    recipe = TwoNetworks(build_vae(config, (1, 28, 28)).to(dtype), config, world, scaler, 40)
    return recipe, Update(recipe, config, world, scaler)


def step(update: Update, dtype: torch.dtype = torch.float32, spoil: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Take step 0 on random images; return them and the noise."""
    torch.manual_seed(0)
    pixels = torch.randint(0, 256, (50, 1, 28, 28), dtype=torch.uint8)
    noise = torch.randn(50, *update.recipe.noise_shape, dtype=dtype) * spoil
    update(batch_of(pixels.unsqueeze(0), noise.unsqueeze(0)), [update.recipe.values(0)])
    return pixels, noise


@pytest.mark.parametrize("nonfinite", ["stop", "skip"])
def test_fp16_applies_no_update_that_the_guard_skips(
    nonfinite: str, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scaler knows of the step's own gradients alone: later ones are finite again."""
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    monkeypatch.setattr(precision, "accelerator", scaled_accelerator(scaler))
    config = make_config(f"train.nonfinite={nonfinite}", "train.compile=false", "train.precision=fp32")
    with processes.join(config) as world:
        update = update_of(config, world, (1, 28, 28))
        weights = [parameter.detach().clone() for parameter in update.recipe.model.parameters()]
        for spoil, moves in (math.nan, False), (1.0, nonfinite == "skip"):
            step(update, spoil=spoil)
            after = update.recipe.model.parameters()
            assert all(torch.equal(*pair) for pair in zip(weights, after, strict=True)) is not moves


def outcome(run_dir: Path, step: int = 40) -> list[bytes]:
    folder = run_dir / f"checkpoints/step_{step:08d}"
    return [(folder / f"{name}.safetensors").read_bytes() for name in PARTS]


def test_each_network_gets_the_gradients_of_its_own_loss(make_config: MakeConfig) -> None:
    """The oracle: both losses by hand, the critic's on detached reconstructions, each with torch's Adam."""
    config = make_config(*SETTINGS, "train.precision=fp64")
    with processes.join(config) as world:
        recipe, update = made(config, world)
        theirs, _ = made(config, world)
        adams = [
            torch.optim.Adam(network.parameters(), lr) for network, lr in ((theirs.vae, 1e-3), (theirs.critic, 5e-4))
        ]
        pixels, noise = step(update, torch.float64)
    images = pixels.double() / 255
    inference = theirs.vae(images, noise.transpose(0, 1))
    fakes = inference.likelihood.mean
    distance = (theirs.features(fakes) - theirs.features(images)).square().sum()
    fooled = torch.nn.functional.binary_cross_entropy_with_logits(theirs.critic(fakes), torch.ones(50, 1).double())
    loss = (objectives.elbo_terms(inference, images).negative_elbo.sum() + distance) / 50 + 10 * fooled
    logits = torch.cat([theirs.critic(images), theirs.critic(fakes.detach())])
    truth = torch.tensor([1.0, 0.0]).double().repeat_interleave(50).unsqueeze(1)
    critic_loss = 2 * torch.nn.functional.binary_cross_entropy_with_logits(logits, truth)
    for network, of_network, adam in (theirs.vae, loss, adams[0]), (theirs.critic, critic_loss, adams[1]):
        parameters = list(network.parameters())
        gradients = torch.autograd.grad(of_network, parameters, retain_graph=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        adam.step()
    for ours, expected in (recipe.vae, theirs.vae), (recipe.critic, theirs.critic):
        for mine, parameter in zip(ours.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(mine, parameter, rtol=1e-6, atol=1e-9)
            assert mine.grad is None
    totals = dict(zip(totals_of(recipe), update.totals.tolist(), strict=True))
    assert totals["loss"] / 50 == pytest.approx(loss.item())
    assert totals["critic_loss"] / 50 == pytest.approx(critic_loss.item())


@pytest.mark.parametrize("spoilt", ["neither", "the VAE", "the critic"])
def test_both_updates_are_skipped_or_none(spoilt: str, make_config: MakeConfig) -> None:
    config = make_config(*SETTINGS, "train.precision=fp32", "train.nonfinite=skip")
    with processes.join(config) as world:
        recipe, update = made(config, world)
        with torch.no_grad():
            if spoilt == "the critic":  # its loss overflows where the VAE's, which sees one sign alone, does not
                dict(recipe.critic.named_parameters())["3.bias"].fill_(torch.inf)
        before = [tensor.detach().clone() for tensor in recipe.tensors]
        step(update, spoil=torch.nan if spoilt == "the VAE" else 1.0)
        changed = [not torch.equal(old, new) for old, new in zip(before, recipe.tensors, strict=True)]
        assert all(changed) if spoilt == "neither" else not any(changed)
        assert update.require_healthy(1) == (spoilt != "neither")


@pytest.mark.parametrize("compiled", ["false", pytest.param("true", marks=pytest.mark.slow)])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(compiled: str, make_config: MakeConfig) -> None:
    given = [*SETTINGS, f"train.compile={compiled}", "train.log_every=7", "data.binarize=dynamic"]
    whole = train(make_config("name=whole", *given))
    for steps in (13, 26, 40):
        parts = train(make_config("name=parts", f"train.steps={steps}", *given))
    assert outcome(parts) == outcome(whole)
    average, model = (load_file(whole / f"checkpoints/step_00000040/{name}.safetensors") for name in ("ema", "model"))
    assert average.keys() == model.keys() and not any(torch.equal(average[name], model[name]) for name in model)


def test_a_checkpoint_knows_its_frozen_network(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = train(make_config("name=a", *SETTINGS, "train.steps=3"))
    assert "features" in find(run_dir, Path()).manifest.frozen
    assert not list(run_dir.glob("checkpoints/*/features*"))
    create = TwoNetworks.__init__

    def with_other_features(self: TwoNetworks, *given: object) -> None:
        create(self, *given)  # type: ignore[arg-type]
        dict(self.features.named_parameters())["1.weight"].data.add_(1.0)

    monkeypatch.setattr(TwoNetworks, "__init__", with_other_features)
    with pytest.raises(UserError, match="other weights of the frozen network 'features'"):
        train(make_config("name=a", *SETTINGS, "train.steps=6"))


def test_an_unknown_recipe_lists_the_choices(make_config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"unknown train\.recipe 'gan'; choose from .*vae"):
        train(make_config("name=a", "train.recipe=gan"))
    assert not (tmp_path / "runs").exists()
