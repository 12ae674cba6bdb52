"""What a compiler traces for a GPU, where plain operations replace those whose compiled forms are slow there."""

from functools import partial
from typing import Any

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd

from vae_dist import config
from vae_dist.distributed import processes
from vae_dist.models import autoencoder_kl, blocks, build_vae, norms, pixel_distributions, tensors
from vae_dist.models.autoencoder_kl import OneWideHead, attended
from vae_dist.models.blocks import repeated
from vae_dist.training.autoencoder_recipe import AutoencoderRecipe
from vae_dist.training.loss_scaler import LossScaler
from vae_dist.training.vae_recipe import VAERecipe

slow = partial(pytest.param, marks=pytest.mark.slow)

MODULES = autoencoder_kl, blocks, norms, pixel_distributions, tensors  # that write something anew for a GPU
NETWORK = [
    "model.architecture=autoencoder_kl", "model.channels=[8,16]", "model.norm_groups=4", "model.attention=[2]",
    "objective.reconstruction=laplace",
]  # fmt: skip


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_pixels_repeated_by_a_broadcast_are_those_of_interpolate(memory_format: torch.memory_format) -> None:
    torch.manual_seed(0)
    given = torch.randn(2, 3, 4, 5).to(memory_format=memory_format)
    one, other = (given.clone().requires_grad_() for _ in range(2))
    output, expected = repeated(one), torch.nn.functional.interpolate(other, scale_factor=2, mode="nearest")
    assert torch.equal(output, expected) and output.is_contiguous(memory_format=torch.channels_last)
    by_output = torch.randn(2, 3, 8, 10)
    slopes = [torch.autograd.grad(y, x, by_output)[0] for y, x in ((output, one), (expected, other))]
    torch.testing.assert_close(slopes[0], slopes[1])


def test_attention_in_matrix_products_is_diffusers() -> None:
    torch.manual_seed(0)
    vae: Any = build_vae(config.load(NETWORK), (3, 16, 16))
    attention = vae.encoder.encoder.mid_block.attentions[0]
    assert attention.heads == 1 and isinstance(attention.processor, OneWideHead)
    one, other = (torch.randn(2, 16, 4, 3, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in "ab")
    output, expected = attended(attention, one), attention(other)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)
    by_output = torch.randn(2, 16, 4, 3)
    weights = [attention.to_q.weight, attention.to_out[0].weight]
    for found, wanted in zip(
        torch.autograd.grad(output, [one, *weights], by_output),
        torch.autograd.grad(expected, [other, *weights], by_output),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_attention_of_many_pixels_is_left_to_the_kernel_that_keeps_no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autoencoder_kl, "traced_on_gpu", lambda x: True)
    monkeypatch.setattr(autoencoder_kl, "attended", lambda attention, x: "products")
    processor = OneWideHead(lambda *given: "kernel")  # type: ignore[arg-type]
    sizes = {size: processor(None, torch.empty(1, 4, *size)) for size in ((32, 32), (64, 64), (64, 65), (128, 128))}
    assert list(sizes.values()) == ["products", "products", "kernel", "kernel"]


@pytest.mark.parametrize(
    "network",
    [
        ["model.architecture=conv"],
        ["model.architecture=ladder", "model.levels=[1,1]"],
        ["model.architecture=resnet", "model.blocks=1"],
    ],
)
@pytest.mark.parametrize(
    "options",
    [
        slow(["objective.reconstruction=bernoulli"]),
        slow(["objective.reconstruction=gaussian", "objective.sigma_kind=optimal"]),
        slow(["objective.reconstruction=gaussian", "objective.sigma_kind=learned", "objective.bound=iwae"]),
        slow(["objective.reconstruction=discretized_logistic_mixture", "objective.bound=iwae"]),
        ["objective.reconstruction=laplace", "model.conditional=true"],
    ],
)
def test_gradients_traced_for_a_gpu_are_those_of_autograd(
    network: list[str], options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing relies on the order of images in memory, which is another one there."""
    check_gradients([*network, *options], monkeypatch)


def test_doubly_reparameterised_gradients_traced_for_a_gpu_are_those_of_autograd(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A hook on the draws weighs their gradients."""
    check_gradients(["model.architecture=conv", "objective.bound=iwae_dreg"], monkeypatch)


def check_gradients(options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare the gradients that the compiler traces with those of autograd."""
    torch.manual_seed(0)
    torch.compiler.reset()  # it compiles one function eight times at most
    for module in MODULES:
        monkeypatch.setattr(module, "traced_on_gpu", lambda x: torch.compiler.is_compiling())
    given = [*options, "model.channels=[4,8]", "data.name=synthetic_digits", "train.batch_size=2"]
    settings = config.load([*given, "device=cpu", "train.threads=1", "objective.samples=3"])
    settings.data.classes = ["a", "b"]
    with processes.join(settings) as world:
        vae = build_vae(settings, (1, 16, 16))
        gradients = VAERecipe(vae, settings, world, LossScaler("fp32", world.device), 1, flat=False)._differentiate
        labels = torch.tensor([0, 1]) if vae.classes else torch.empty(0, dtype=torch.int64)
        images, noise, values = torch.rand(2, 1, 16, 16), torch.randn(3, 2, vae.latent_dim), torch.tensor([0.1, 1, 0.3])
        inputs = [torch.ones(()), images, noise, labels, values.double(), *vae.parameters()]
        backend = aot_autograd(fw_compiler=lambda graph, _: graph.forward)
        with torch.no_grad():
            results = torch.compile(gradients.functional, fullgraph=True, backend=backend)(*inputs)
        for found, wanted in zip(results, gradients.eager(*inputs), strict=True):
            # Importance weights are rounded by 1e-4: their logarithms are thousands of nats. Another order is off by 1.
            assert (found - wanted).norm() <= 1e-3 * wanted.norm() + 1e-6


@pytest.mark.slow
def test_a_step_traced_for_a_gpu_has_its_order_and_no_addition_by_indices(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card ran a step of kl-f8 of which a third was the latter, and a tenth copies from one order to the other."""
    for module in MODULES:
        monkeypatch.setattr(module, "traced_on_gpu", lambda x: torch.compiler.is_compiling())
    graphs: list[Any] = []

    def keep(graph: Any, inputs: Any) -> Any:
        graphs.append(graph.graph)
        return graph.forward

    given = [*NETWORK, "train.recipe=autoencoder", "data.name=synthetic_digits", "train.batch_size=2"]
    given += ["first_stage.adversarial_weight=0.2", "first_stage.adaptive=true", "first_stage.discriminator_channels=8"]
    settings = config.load([*given, "device=cpu", "train.threads=1", "first_stage.discriminator_layers=1"])
    with processes.join(settings) as world:
        vae = build_vae(settings, (3, 16, 16))
        recipe = AutoencoderRecipe(vae, settings, world, LossScaler("fp32", world.device), 1)
        assert recipe.discriminator is not None
        pixels, noise = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8), torch.randn(2, 1, vae.latent_dim)
        inputs = [pixels, noise, torch.empty(0), torch.tensor(0.3), *vae.parameters()]
        inputs += list(recipe.discriminator.parameters())
        program = torch.compile(recipe._functional, fullgraph=True, backend=aot_autograd(fw_compiler=keep))
        with torch.no_grad():
            results = program(*inputs)
        for found, wanted in zip(results, recipe._eager(*inputs), strict=True):
            assert (found - wanted).norm() <= 1e-4 * wanted.norm() + 1e-6
    (graph,) = graphs
    names = {str(node.target) for node in graph.nodes}
    assert not [name for name in names if "index_put" in name or "attention" in name or "upsample" in name]
    backward = [node for node in graph.nodes if node.target is torch.ops.aten.convolution_backward.default]
    kept = [node.args[place].meta["val"] for node in backward for place in range(3)]
    large = [tensor for tensor in kept if min(tensor.shape[:2]) > 1 and tensor.shape[1] > 8]
    assert len(large) > 50 and all(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in large)
    # Flattened pixels are written in C, H, W order, and then once more in that of the next convolution.
    views = [node for node in graph.nodes if node.target is torch.ops.aten.view.default]
    shapes = [(node.args[0].meta["val"].shape, node.meta["val"].shape) for node in views]
    flattened = [before[2:] for before, after in shapes if len(before) == 4 and before[3] > 1 and len(after) == 3]
    assert set(flattened) == {(8, 8)}, "more than the attention at 8 x 8 flattens pixels"
