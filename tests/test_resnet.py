"""`model.architecture=resnet`: residual blocks, attention, and GroupNorm of 16-bit activations."""

import math
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import grad_and_value
from torch.nn.functional import group_norm

from tests.benchmarks.activations import BATCH, fake_cuda, kept
from tests.conftest import REPOSITORY
from tests.test_config import refusal
from tests.test_conv import DIGITS, records, tensors
from vae_dist import config
from vae_dist.errors import UserError
from vae_dist.evaluation.evaluate import evaluate
from vae_dist.models import build_vae
from vae_dist.models.blocks import ResidualBlock
from vae_dist.models.likelihoods import LIKELIHOODS
from vae_dist.models.norms import GroupNorm, Keep16Bits, traced
from vae_dist.models.resnet import Attention, ResNetVAE
from vae_dist.models.tensors import Shape
from vae_dist.training.loop import train
from vae_dist.views.sampling import sample

pytestmark = pytest.mark.usefixtures("one_thread")

RESNET = "model.architecture=resnet"
TINY = [RESNET, "model.channels=[4,8,8]", "model.blocks=1", "model.attention=[4]"]
SHAPE = (3, 8, 12)


def make(shape: Shape, *arguments: str) -> ResNetVAE:
    vae = build_vae(config.load([*TINY, *arguments]), shape)
    assert isinstance(vae, ResNetVAE)
    return vae


def batch(vae: ResNetVAE, count: int) -> tuple[Tensor, Tensor]:
    """Images, and noise for two draws of each."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(count, *vae.image_shape, generator=generator, dtype=vae.dtype)
    return images, torch.randn(2, count, vae.latent_dim, generator=generator, dtype=vae.dtype)


@pytest.mark.parametrize(
    ("shape", "options", "latents"),
    [
        ((1, 28, 28), [], (4, 7, 7)),
        ((3, 8, 12), ["model.blocks=3", "model.attention=[1,2]", "model.latent_channels=5"], (5, 2, 3)),
        ((2, 16, 8), ["model.channels=[6]", "model.attention=[]", "model.mid_attention=false"], (4, 16, 8)),
    ],
)
def test_images_and_latents_have_their_shapes_and_all_weights_take_part(
    shape: Shape, options: list[str], latents: Shape
) -> None:
    vae = make(shape, *options)
    assert vae.latent_shapes(shape) == (latents,)
    loaded = config.load([*TINY, *options]).model
    assert loaded.latents(shape) == vae.latent_dim == math.prod(latents)
    assert loaded.weights_at_least(shape) <= sum(weight.numel() for weight in vae.parameters())
    images, noise = batch(vae, 3)
    inference = vae(images, noise)
    assert inference.likelihood.mean.shape == (6, *shape)
    (inference.kl.sum() - inference.log_likelihood(images).sum()).backward()
    for name, parameter in vae.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    larger = torch.rand(2, shape[0], 2 * shape[1], 3 * shape[2])  # images of another size
    assert vae(larger, torch.zeros(1, 2, 6 * vae.latent_dim)).likelihood.mean.shape == larger.shape


def test_its_sizes_are_those_of_latent_diffusions_f8() -> None:
    with torch.device("meta"):
        ours = build_vae(config.load([RESNET, "model.channels=[128,256,512,512]"]), (3, 256, 256))
        theirs = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=4,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
    biases = 2 * 3 * 512  # of queries, keys and values, which ours has not
    assert sum(weight.numel() for weight in ours.parameters()) == sum(w.numel() for w in theirs.parameters()) - biases


def test_attention_is_at_the_named_resolutions_and_in_the_middle() -> None:
    def count(*options: str) -> list[int]:
        vae = make((1, 16, 16), "model.channels=[4,6,8]", *options)
        return [module.qkv.in_channels for module in vae.modules() if isinstance(module, Attention)]

    one = "model.mid_attention=false"
    assert count("model.attention=[]", one) == []
    assert count("model.attention=[]") == [8, 8]
    assert count("model.attention=[2]", one) == [6, 6, 6]  # of the encoder's one block, and of the decoder's two
    assert count("model.attention=[4,1]", "model.blocks=2", one) == [4, 4, 8, 8, 8, 8, 8, 4, 4, 4]
    vae = make((1, 16, 16))
    networks = vae.encoder, vae.decoder
    blocks = [sum(isinstance(layer, ResidualBlock) for layer in network.children()) for network in networks]
    assert blocks == [3 * 1 + 2, 3 * 2 + 2]


@pytest.mark.parametrize(("channels", "heads"), [(8, 1), (64, 1), (96, 2), (130, 5)])
def test_attention_is_that_of_a_loop(channels: int, heads: int) -> None:
    torch.manual_seed(0)
    layer = Attention(channels, 1.0).double()
    x = torch.randn(2, channels, 3, 4, dtype=torch.float64)
    assert layer.heads == heads
    normalised = nn.functional.group_norm(x, layer.norm.num_groups)
    matrix, size = layer.qkv.weight[:, :, 0, 0], channels // heads
    for image, of_image, found in zip(normalised, x, layer(x), strict=True):
        pixels = image.flatten(1).T  # (12, channels)
        parts = []
        for head in range(heads):
            rows = [slice(part * channels + head * size, part * channels + (head + 1) * size) for part in range(3)]
            queries, keys, values = (pixels @ matrix[of_part].T for of_part in rows)
            parts.append(torch.softmax(queries @ keys.T / size**0.5, 1) @ values)
        output = nn.functional.linear(torch.cat(parts, 1), layer.output.weight[:, :, 0, 0], layer.output.bias)
        torch.testing.assert_close(found, of_image + output.T.view(channels, 3, 4))


@pytest.mark.parametrize("options", [["model.channels=[4]"], ["model.channels=[8,16,16,24]", "model.blocks=4"]])
def test_a_fresh_model_is_finite_and_starts_near_the_prior(options: list[str]) -> None:
    vae = make((1, 16, 32), *options, "model.attention=[1]")
    _, noise = batch(vae, 4)
    images = torch.cat([torch.rand(2, 1, 16, 32), torch.zeros(1, 1, 16, 32), torch.ones(1, 1, 16, 32)])
    inference = vae(images, noise)
    assert inference.kl.mean() < 0.02  # nats per latent
    assert (inference.likelihood.mean - 0.5).abs().max() < 0.2
    (inference.kl.sum() - inference.log_likelihood(images).sum()).backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in vae.parameters())


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_it_takes_every_likelihood(likelihood: str) -> None:
    vae = make(SHAPE, f"objective.reconstruction={likelihood}")
    images, noise = batch(vae, 2)
    assert vae(images, noise).log_likelihood(images).isfinite().all()


def test_bf16_is_off_by_rounding() -> None:
    vae = make((1, 28, 28), "model.channels=[16,32,32]")
    images, noise = batch(vae, 4)
    exact = vae(images, noise)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = vae(images, noise)
    assert rounded.log_likelihood(images).dtype == rounded.kl.dtype == torch.float32
    torch.testing.assert_close(rounded.log_likelihood(images), exact.log_likelihood(images), rtol=2e-3, atol=0)
    torch.testing.assert_close(rounded.kl.sum(2), exact.kl.sum(2), rtol=0.05, atol=0.05)


def test_what_does_not_fit_is_refused_with_what_to_do() -> None:
    assert (
        "model.attention has 3, but this model's resolutions are the image's divided by 1, 2, 4: use some"
        in refusal(RESNET, "model.attention=[4,3]")
    )
    assert "model.attention has 8" in refusal(RESNET, "model.attention=[8]")
    assert "model.channels needs at least one number" in refusal(RESNET, "model.channels=[]")
    assert "model.patch does not apply to model.architecture=resnet" in refusal(RESNET, "model.patch=2")
    with pytest.raises(UserError, match=r"30 x 28 can't be encoded: use sizes that 4 divides, or fewer model.channels"):
        make((1, 30, 28))
    assert config.load(TINY).model.summary() == "resnet 4-8-8"


# ---- GroupNorm of 16-bit activations


def kept_in_16_bits(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    output: Tensor = Keep16Bits.apply(x, weight, bias, 4, 1e-5)[0]
    return output


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("offset", [0, 30])  # of which the variance of numbers of 16 bits would lose all digits
def test_a_norm_of_16_bits_has_statistics_in_fp32(dtype: torch.dtype, offset: float) -> None:
    torch.manual_seed(0)
    x = (torch.randn(BATCH, 16, 9, 5) + offset).to(dtype)
    weight, bias, by_output = 1 + 0.1 * torch.randn(16), torch.randn(16), torch.randn(BATCH, 16, 9, 5).to(dtype)
    exact = [tensor.double().requires_grad_() for tensor in (x, weight, bias)]
    expected = group_norm(exact[0], 4, exact[1], exact[2])
    expected.backward(by_output.double())
    given = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
    with kept() as count:
        output = kept_in_16_bits(*given)
    output.backward(by_output)
    assert output.dtype == dtype and [tensor.grad.dtype for tensor in given if tensor.grad is not None] == [
        dtype, torch.float32, torch.float32,
    ]  # fmt: skip
    epsilon = torch.finfo(dtype).eps
    torch.testing.assert_close(output.double(), expected, rtol=epsilon / 2 + 1e-5, atol=1e-5)  # its rounding alone
    for tensor, wanted, rounding in zip(given, exact, (epsilon, 1e-4, 1e-4), strict=True):
        assert tensor.grad is not None and wanted.grad is not None
        largest = wanted.grad.abs().max().item()
        torch.testing.assert_close(tensor.grad.double(), wanted.grad, rtol=rounding / 2 + 1e-5, atol=1e-5 * largest)
    assert count() == 2 * x.numel() + 2 * 4 * 4 * BATCH  # the input, and mean and deviation of four groups in fp32

    def loss(*tensors: Tensor) -> Tensor:
        return (kept_in_16_bits(*tensors) * by_output).sum()

    gradients, _ = grad_and_value(loss, argnums=(0, 1, 2))(x, weight, bias)
    assert all(torch.equal(found, tensor.grad) for found, tensor in zip(gradients, given, strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("offset", [0, 30])
def test_the_norm_that_a_compiler_traces_is_torchs(dtype: torch.dtype, offset: float) -> None:
    torch.manual_seed(0)
    weight, bias = 1 + 0.1 * torch.randn(16), torch.randn(16)
    for shape in (BATCH, 16, 9, 5), (BATCH, 16, 7):
        x = (torch.randn(shape) + offset).to(dtype)
        for laid_out in [x, *([x.to(memory_format=torch.channels_last)] if x.ndim == 4 else [])]:
            given, exact = laid_out.clone().requires_grad_(), x.double().requires_grad_()
            output, expected = (
                traced(given, weight, bias, 4, 1e-5),
                group_norm(exact, 4, weight.double(), bias.double()),
            )
            assert output.dtype == dtype and output.stride() == laid_out.stride()
            rounding = max(torch.finfo(dtype).eps, 1e-6)
            torch.testing.assert_close(output.double(), expected, rtol=rounding, atol=30 * 1e-6)
            by_output = torch.randn(shape).to(dtype)
            gradients = [
                torch.autograd.grad(o, i, by_output.to(o.dtype))[0] for o, i in ((output, given), (expected, exact))
            ]
            torch.testing.assert_close(
                gradients[0].double(), gradients[1], rtol=rounding, atol=1e-4 if offset else 1e-5
            )


def test_on_a_gpu_autocast_leaves_the_norm_in_16_bits() -> None:
    kept_bytes = []
    for norm in nn.GroupNorm, GroupNorm:
        with fake_cuda(is_bf16=True), kept() as count:
            layers = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), norm(4, 8), nn.SiLU(), nn.Conv2d(8, 8, 3, padding=1))
            output = layers[:2](torch.empty(BATCH, 8, 4, 4))
            assert output.dtype == (torch.float32 if norm is nn.GroupNorm else torch.bfloat16)
            layers(torch.empty(BATCH, 8, 4, 4))
            kept_bytes.append(count())
    assert kept_bytes[1] < 0.7 * kept_bytes[0]
    with fake_cuda(is_bf16=True):
        torch.set_autocast_dtype("cuda", torch.float16)
        assert GroupNorm(4, 8)(torch.empty(BATCH, 8, 4, 4, dtype=torch.float16)).dtype == torch.float16


def test_in_fp32_and_on_a_cpu_the_norm_is_torchs() -> None:
    torch.manual_seed(0)
    ours, theirs = GroupNorm(2, 8), nn.GroupNorm(2, 8)
    for x in torch.randn(2, 8, 4, 4), torch.randn(2, 8, 4, 4).bfloat16():
        assert torch.equal(ours(x), theirs(x))
    with FakeTensorMode(), torch.device("cuda"):
        assert GroupNorm(2, 8)(torch.empty(2, 8, 4, 4)).dtype == torch.float32


# ---- Through the whole package


@pytest.mark.slow  # autoencoder_kl's is quick
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_stopped_run_continues_to_the_same_bits(smoke_arguments: list[str], precision: str, tmp_path: Path) -> None:
    common = [*smoke_arguments[1:], *DIGITS, *TINY, "model.conditional=true", "train.batch_size=10"]
    common += [f"runs_dir={tmp_path}", f"train.precision={precision}", "checkpoint.every=2", "ema.decay=0.9"]
    common += ["train.log_every=1", "evaluate.importance_samples=2"]
    straight = train(config.load([*common, "name=straight", "train.steps=4"]))
    for steps in 2, 4:
        parts = train(config.load([*common, "name=parts", f"train.steps={steps}"]))
    expected, found = tensors(straight), tensors(parts)
    assert {name.split()[0] for name in expected} == {"model", "ema", "optimizer"}
    assert expected.keys() == found.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    measured = evaluate(straight, ["train.threads=1", "evaluate.chunk=500"])
    assert measured["latents"] == 4 * 7 * 7
    drawn = load_file(sample(straight, ["train.threads=1", "sample.count=2"]) / "samples.safetensors")
    assert drawn["latents"].shape == (2, 4 * 7 * 7)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ to compile a step with")
def test_a_compiled_step_trains_as_an_uncompiled_one(
    smoke_arguments: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    common = [*smoke_arguments[1:], *DIGITS, *TINY, f"runs_dir={tmp_path}", "train.batch_size=10", "train.steps=3"]
    common += ["model.channels=[4]", "model.attention=[1]", "model.mid_attention=false"]  # fewer kernels to compile
    for compiled in ("false", "true"):
        options = [f"name={compiled}", f"train.compile={compiled}", "train.precision=fp64", "train.log_every=1"]
        train(config.load([*common, *options]))
    assert "can't be compiled" not in caplog.text
    assert records(tmp_path / "true", "train/loss") == pytest.approx(
        records(tmp_path / "false", "train/loss"), rel=1e-9
    )


def test_the_config_has_a_model_that_two_cores_train() -> None:
    loaded = config.load([str(REPOSITORY / "configs/resnet.yaml"), "data.path=pictures"])
    with torch.device("meta"):
        vae = build_vae(loaded, (3, 64, 64))
    assert vae.latent_shapes((3, 64, 64)) == ((4, 16, 16),)
    assert sum(weight.numel() for weight in vae.parameters()) < 2e6
