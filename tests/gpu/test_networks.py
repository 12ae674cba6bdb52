"""Every architecture on one card, on colour images of a folder: bitwise the same resumed or not, captured or not."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from tests.gpu.conftest import STEPS, Train, resumed, state_of
from tests.gpu.test_training import outcome
from vae_dist import config
from vae_dist.distributed import processes
from vae_dist.models import build_vae
from vae_dist.models.norms import GroupNorm

if not torch.cuda.is_available():
    pytest.skip("there is no GPU", allow_module_level=True)
GRID = ["model.channels=[8,16]", "model.blocks=1", "model.latent_channels=2"]
SMALL_GRID = ["model.channels=[8]", *GRID[1:]]  # with attention: it takes the compiler a minute on one core
LEARNED, OPTIMAL = "objective.sigma_kind=learned", "objective.sigma_kind=optimal"
NETWORKS = {
    "mlp": ["model.hidden_dims=[64]", "model.latent_dim=8", "objective.reconstruction=gaussian", OPTIMAL],
    "conv": [*GRID, LEARNED, "model.conditional=true", "ema.decay=0.9", "optim.max_grad_norm=50"],
    "ladder": [*GRID, "model.levels=[1,1]", LEARNED],
    "resnet": [*SMALL_GRID, OPTIMAL, "train.accumulate=2"],
    "autoencoder_kl": [*SMALL_GRID, LEARNED, "model.norm_groups=4"],
}
UNCOMPILED = "train.compile=false"
ATTENTION = {"autoencoder_kl": ["model.attention=[1]"]}  # of more than the middle; left out where a compiler waits


def options_of(architecture: str) -> list[str]:
    if architecture == "autoencoder_kl":
        pytest.importorskip("diffusers")
    return [f"model.architecture={architecture}", *NETWORKS[architecture]]


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("architecture", NETWORKS)
def test_a_run_is_bitwise_the_same_resumed_or_captured(architecture: str, precision: str, colour_run: Train) -> None:
    given, name = [*options_of(architecture), f"train.precision={precision}"], f"{architecture}_{precision}"
    straight = colour_run(name, *given)
    assert "compile: true" in (straight / "config.yaml").read_text()
    plain = colour_run(f"{name}_plain", *given, "runtime.cuda_graph=false")
    assert outcome(plain, STEPS) == outcome(straight, STEPS) and state_of(plain) == state_of(straight)
    torch.compiler.reset()
    assert state_of(resumed(colour_run, f"{name}_resumed", *given)) == state_of(straight)


@pytest.mark.parametrize("architecture", NETWORKS)
def test_a_cpu_and_a_gpu_see_the_same_losses_of_a_network(architecture: str, colour_run: Train) -> None:
    # A large eps: otherwise Adam makes an update of every rounding error.
    given = [*options_of(architecture), *ATTENTION.get(architecture, []), UNCOMPILED]
    given += ["train.steps=10", "train.log_every=1", "optim.eps=0.001"]
    losses = []
    for device in ("cpu", "cuda"):
        folder = colour_run(f"{architecture}_on_{device}", *given, f"device={device}")
        rows = [row for row in outcome(folder, 10)[2] if "train/loss" in row]
        losses.append([[row[f"train/{name}"] for name in ("loss", "reconstruction", "kl")] for row in rows])
    assert len(losses[0]) == 10
    torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]), rtol=1e-4, atol=0.05)  # of 768 values


@pytest.mark.parametrize(("optimizer", "compiled"), [("adamw", "true"), ("adamax", "true"), ("adamax", "false")])
def test_a_run_of_another_optimizer_is_bitwise_the_same(optimizer: str, compiled: str, colour_run: Train) -> None:
    given = [*options_of("mlp"), f"optim.optimizer={optimizer}", "optim.weight_decay=0.01", f"train.compile={compiled}"]
    name = f"{optimizer}_{compiled}"
    straight = colour_run(name, *given)
    plain = colour_run(f"{name}_plain", *given, "runtime.cuda_graph=false")
    assert outcome(plain, STEPS) == outcome(straight, STEPS)
    torch.compiler.reset()
    assert state_of(resumed(colour_run, f"{name}_resumed", *given)) == state_of(straight)


def test_images_decoded_at_every_step_train_as_packed_ones(colour_run: Train) -> None:
    given = [*options_of("conv"), UNCOMPILED]
    packed, decoded = (colour_run(f"pack_{pack}", *given, f"data.pack={pack}") for pack in ("always", "never"))
    assert outcome(decoded, STEPS) == outcome(packed, STEPS)


def given_to(architecture: str) -> list[str]:
    classes = ["data.classes=[a,b]"] if architecture == "conv" else []
    options = [*options_of(architecture), *ATTENTION.get(architecture, []), *classes]
    return [*options, "objective.sigma=0.3", "objective.reconstruction=laplace"]


def gradients(architecture: str, *, recomputed: bool) -> Sequence[Tensor]:
    settings = config.load(given_to(architecture))
    with torch.device("cuda"):
        torch.manual_seed(0)
        vae = build_vae(settings, (3, 16, 16)).train()
        images, noise = torch.rand(8, 3, 16, 16), torch.randn(1, 8, vae.latent_dim)
    labels = torch.arange(8, device="cuda") % vae.classes if vae.classes else None
    if recomputed:
        vae.recompute_activations()
    with torch.autocast("cuda", torch.bfloat16):
        inference = vae(images, noise, labels)
    loss = inference.kl.sum() - inference.log_likelihood(images).sum()
    return torch.autograd.grad(loss, list(vae.parameters()))


@pytest.mark.parametrize("architecture", ["conv", "ladder", "resnet", "autoencoder_kl"])
def test_gradients_with_activations_computed_twice_are_bitwise_the_plain_ones(architecture: str) -> None:
    with processes.join(config.load([*given_to(architecture), "device=cuda"])):  # deterministic
        plain, twice = (gradients(architecture, recomputed=recomputed) for recomputed in (False, True))
    assert all(map(torch.equal, plain, twice))


@pytest.mark.parametrize("architecture", ["resnet", "autoencoder_kl"])
def test_a_run_that_computes_activations_twice_resumes_bitwise(architecture: str, colour_run: Train) -> None:
    given = [*options_of(architecture), "train.checkpointing=true", "train.precision=bf16"]
    straight = colour_run(f"{architecture}_twice", *given)
    assert state_of(resumed(colour_run, f"{architecture}_twice_resumed", *given)) == state_of(straight)


@pytest.mark.parametrize("offset", [0, 30])  # of which the variance of 16-bit numbers would lose all digits
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_norm_of_16_bits_is_off_by_its_rounding(dtype: torch.dtype, offset: int) -> None:
    torch.manual_seed(0)
    x = (torch.randn(6, 16, 9, 5, device="cuda") + offset).to(dtype)
    by_output = torch.randn(6, 16, 9, 5, device="cuda").to(dtype)
    ours, exact = GroupNorm(4, 16).cuda(), nn.GroupNorm(4, 16).cuda().double()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.copy_(torch.randn(16))
    exact.load_state_dict(ours.state_dict())
    found, expected = (
        [norm(given), *torch.autograd.grad(norm(given), [given, *norm.parameters()], by_output.to(given.dtype))]
        for norm, given in ((ours, x.clone().requires_grad_()), (exact, x.double().requires_grad_()))
    )
    assert [tensor.dtype for tensor in found] == [dtype, dtype, torch.float32, torch.float32]
    epsilon = torch.finfo(dtype).eps
    for tensor, wanted, rounding in zip(found, expected, (epsilon, epsilon, 1e-3, 1e-3), strict=True):
        largest = wanted.abs().max().item()
        torch.testing.assert_close(tensor.double(), wanted, rtol=rounding, atol=1e-4 * largest)
