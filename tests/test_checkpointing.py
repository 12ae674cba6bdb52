"""`train.checkpointing`: less memory, and the same bits."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad

from tests.benchmarks.activations import BATCH, kept
from tests.test_config import refusal
from tests.test_conv import DIGITS, tensors
from vae_dist import config
from vae_dist.models import build_vae
from vae_dist.models.vae import VAE
from vae_dist.training.loop import train

pytestmark = pytest.mark.usefixtures("one_thread")

MODELS = {
    "conv": ["model.channels=[8,16]", "model.blocks=2", "model.patch=2", "model.conditional=true"],
    "ladder": ["model.channels=[8,16]", "model.levels=[2,2]", "model.conditional=true"],
    "resnet": ["model.channels=[8,16]", "model.attention=[2]", "model.conditional=true"],
    "autoencoder_kl": [
        "model.channels=[8,16]", "model.norm_groups=4", "objective.reconstruction=laplace", "model.attention=[2]",
    ],
}  # fmt: skip
TWO_CLASSES = ["data.classes=[a,b]"]


def make(name: str, recomputes: bool) -> VAE:
    classes = TWO_CLASSES if "model.conditional=true" in MODELS[name] else []
    vae = build_vae(config.load([f"model.architecture={name}", *MODELS[name], *classes]), (1, 32, 32))
    if recomputes:
        vae.recompute_activations()
    return vae


def loss(vae: VAE, images: Tensor, noise: Tensor) -> Tensor:
    labels = torch.arange(len(images)) % 2 if vae.classes else None
    inference = vae(images, noise, labels)
    return inference.kl.sum() - inference.log_likelihood(images).sum()


@pytest.mark.parametrize("is_bf16", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_bitwise_the_same_with_less_memory(name: str, is_bf16: bool) -> None:
    torch.manual_seed(0)
    images = torch.rand(BATCH, 1, 32, 32)
    values, kept_bytes, gradients = [], [], []
    for recomputes in (False, True):
        vae = make(name, recomputes)
        noise = torch.randn(1, BATCH, vae.latent_dim, generator=torch.Generator().manual_seed(1))
        with kept() as count, torch.autocast("cpu", torch.bfloat16, enabled=is_bf16):
            values.append(loss(vae, images, noise))
            kept_bytes.append(count())
        values[-1].backward()
        gradients.append([parameter.grad for parameter in vae.parameters()])
    assert torch.equal(*values)
    for ours, theirs in zip(*gradients, strict=True):
        assert ours is not None and theirs is not None and torch.equal(ours, theirs)
    assert kept_bytes[1] < (0.5 if name == "ladder" else 0.4) * kept_bytes[0]  # whose features between levels are kept


def test_functional_gradients_are_not_possible_and_so_neither_are_compiled_ones() -> None:
    vae = make("resnet", recomputes=True)
    images, noise = torch.rand(2, 1, 32, 32), torch.randn(1, 2, vae.latent_dim)

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vae = vae

        def forward(self) -> Tensor:
            return loss(self.vae, images, noise)

    module = Loss()
    weights = {name: parameter.detach() for name, parameter in module.named_parameters()}
    with pytest.raises(RuntimeError, match="saved tensor hooks"):
        grad(lambda named: functional_call(module, named, ()))(weights)


def test_where_it_does_not_apply_it_is_refused() -> None:
    on = "train.checkpointing=true"
    assert "is for model.architecture=conv, ladder, resnet or autoencoder_kl: mlp keeps few activations" in refusal(on)
    message = "train.checkpointing=true does not go with train.compile=true"
    assert message in refusal(on, "model.architecture=conv", "train.compile=true")


ADVERSARIAL = [
    "train.recipe=autoencoder", "objective.reconstruction=laplace", "first_stage.adversarial_weight=0.5",
    "first_stage.adaptive=true", "first_stage.adversarial_start=1", "first_stage.discriminator_channels=4",
    "first_stage.discriminator_layers=1",
]  # fmt: skip


@pytest.mark.parametrize(
    "recipe", [pytest.param([], id="vae", marks=pytest.mark.slow), pytest.param(ADVERSARIAL, id="autoencoder")]
)
def test_a_run_may_change_it_and_reaches_the_same_bits(
    recipe: list[str], smoke_arguments: list[str], tmp_path: Path
) -> None:
    common = [*smoke_arguments[1:], *DIGITS, "model.architecture=resnet", "model.channels=[4,8]", "model.blocks=1"]
    common += ["train.batch_size=10", "train.accumulate=2", "checkpoint.every=2", f"runs_dir={tmp_path}", *recipe]
    straight = train(config.load([*common, "name=straight", "train.steps=4"]))
    for steps, recomputes in (2, True), (3, False), (4, True):
        changed = [f"train.steps={steps}", f"train.checkpointing={recomputes}".lower()]
        parts = train(config.load([*common, "name=parts", *changed]))
    expected, found = tensors(straight), tensors(parts)
    assert expected.keys() == found.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    assert config.read(parts / "config.yaml").train.compile is False
