"""`model.architecture=autoencoder_kl`: diffusers' networks inside the contract of a VAE."""

import math
import shutil
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import Attention
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributions import Laplace, Normal, kl_divergence
from torch.func import functional_call, grad

from tests.conftest import REPOSITORY, newest_checkpoint
from tests.test_config import refusal
from tests.test_conv import DIGITS, records, tensors
from vae_dist import config
from vae_dist.errors import UserError
from vae_dist.evaluation.evaluate import evaluate
from vae_dist.models import build_vae
from vae_dist.models.autoencoder_kl import AutoencoderKLVAE, OneWideHead, diffusers_state, network_options
from vae_dist.models.norms import GroupNorm
from vae_dist.models.tensors import Shape
from vae_dist.training.loop import train
from vae_dist.views.sampling import sample

KL = "model.architecture=autoencoder_kl"
SMALL = [KL, "model.channels=[8,16]", "model.blocks=1", "model.norm_groups=4", "objective.reconstruction=laplace"]
SHAPE = (3, 8, 12)


def make(shape: Shape = SHAPE, *arguments: str) -> AutoencoderKLVAE:
    vae = build_vae(config.load([*SMALL, *arguments]), shape)
    assert isinstance(vae, AutoencoderKLVAE)
    return vae.eval()  # as a model is that diffusers has loaded


def batch(vae: AutoencoderKLVAE, count: int) -> tuple[Tensor, Tensor]:
    """Images, and noise for two draws of each."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(count, *vae.image_shape, generator=generator, dtype=vae.dtype)
    return images, torch.randn(2, count, vae.latent_dim, generator=generator, dtype=vae.dtype)


def diffusers_twin(vae: AutoencoderKLVAE) -> AutoencoderKL:
    """diffusers' model with the same weights."""
    twin = AutoencoderKL(**network_options(vae.options, vae.image_shape[0]))
    twin.load_state_dict(diffusers_state(vae), strict=True)
    return (twin.double() if vae.dtype == torch.float64 else twin).eval()


def loss(vae: AutoencoderKLVAE, images: Tensor, noise: Tensor) -> Tensor:
    inference = vae(images, noise)
    return inference.kl.sum() - inference.log_likelihood(images).sum()


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["model.quant_conv=false", "model.latent_channels=16"],
        ["model.mid_attention=false", "model.channels=[4,8,8]", "model.blocks=2"],
        ["model.attention=[1,4]", "model.channels=[4,8,8]", "model.blocks=2"],
        ["model.attention=[2]", "model.mid_attention=false"],
    ],
)
def test_posterior_and_decoded_images_are_bitwise_those_of_diffusers(arguments: list[str]) -> None:
    vae = make(SHAPE, *arguments)
    twin = diffusers_twin(vae)
    images, _ = batch(vae, 3)
    with torch.no_grad():
        posterior, theirs = vae.infer(images), twin.encode(2 * images - 1).latent_dist
        assert torch.equal(posterior.mean, theirs.mean.flatten(1))
        assert torch.equal(posterior.log_variance, theirs.logvar.flatten(1))
        assert torch.equal(vae.prior(posterior.mean), posterior.mean)
        decoded = twin.decode(theirs.mean.contiguous()).sample
        likelihood = vae.decode(posterior.mean)
        assert torch.equal(likelihood.mean, ((decoded + 1) / 2).clamp(0, 1))


def test_its_norms_are_diffusers_ones_but_for_their_kernel_of_16_bits() -> None:
    vae = make()
    norms = [module for module in vae.modules() if isinstance(module, nn.GroupNorm)]
    theirs = [module for module in diffusers_twin(vae).modules() if isinstance(module, nn.GroupNorm)]
    assert {type(norm) for norm in norms} == {GroupNorm} and len(norms) == len(theirs) > 0
    assert {norm.eps for norm in norms} == {norm.eps for norm in theirs}


def test_log_variances_are_clamped_as_diffusers_clamps_them() -> None:
    vae = make()
    raw = torch.tensor([-1e4, -30.5, -29.0, 0.1, 19.5, 21.0])
    posterior = vae.posterior(torch.cat([torch.zeros(6), raw]).unsqueeze(0))
    assert posterior.log_variance.tolist() == [raw.clamp(-30, 20).tolist()]


def test_the_elbo_is_that_of_torchs_distributions() -> None:
    vae = make(SHAPE, "objective.sigma=0.2").double()
    twin = diffusers_twin(vae)
    images, noise = batch(vae, 3)
    inference = vae(images, noise)
    theirs = twin.encode(2 * images - 1).latent_dist
    mean, posterior = theirs.mean, Normal(theirs.mean, theirs.std)
    kl = kl_divergence(posterior, Normal(0.0, 1.0)).sum((1, 2, 3))
    torch.testing.assert_close(inference.kl.sum(2), kl.expand(2, 3))
    for number in range(2):
        latents = posterior.mean + posterior.stddev * noise[number].view(mean.shape)
        likelihood = Laplace((twin.decode(latents).sample + 1) / 2, 0.2)
        torch.testing.assert_close(
            inference.log_likelihood(images)[number], likelihood.log_prob(images).sum((1, 2, 3)), rtol=1e-9, atol=0
        )


@pytest.mark.parametrize(("shape", "attention"), [((1, 28, 28), "[]"), ((3, 16, 8), "[2,1]")])
def test_all_weights_take_part_and_no_random_number_is_drawn(shape: Shape, attention: str) -> None:
    vae = make(shape, "objective.sigma_kind=learned", f"model.attention={attention}").train()
    images, noise = batch(vae, 2)
    assert vae.latent_dim == config.load(SMALL).model.latents(shape) == math.prod(vae.latent_shapes(shape)[0])
    assert config.load(SMALL).model.weights_at_least(shape) <= sum(weight.numel() for weight in vae.parameters())
    state = torch.get_rng_state()
    loss(vae, images, noise).backward()
    assert torch.equal(state, torch.get_rng_state())
    for name, parameter in vae.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all()
        if not name.endswith("to_k.bias"):  # it adds the same to all scores of a query, which softmax removes
            assert parameter.grad.abs().sum() > 0, name


def test_an_image_does_not_depend_on_the_others_of_its_batch() -> None:
    vae = make().double()
    images, noise = batch(vae, 3)
    together = vae(images, noise)
    for index in range(3):
        alone = vae(images[index : index + 1], noise[:, index : index + 1])
        torch.testing.assert_close(together.kl[:, index], alone.kl[:, 0], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(
            together.log_likelihood(images)[:, index], alone.log_likelihood(images[index : index + 1])[:, 0]
        )


def test_functional_gradients_are_those_of_autograd() -> None:
    vae = make().double()
    images, noise = batch(vae, 2)
    loss(vae, images, noise).backward()
    expected = {name: weight.grad for name, weight in vae.named_parameters()}
    weights = {name: weight.detach() for name, weight in vae.named_parameters()}

    def functional(weights: dict[str, Tensor]) -> Tensor:
        inference = functional_call(vae, weights, (images, noise))
        return inference.kl.sum() - inference.log_likelihood(images).sum()

    for name, gradient in grad(functional)(weights).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-9)


def test_codes_are_the_same_for_images_in_any_memory_format() -> None:
    vae = make().double()
    images, _ = batch(vae, 3)
    mean = vae.infer(images).mean
    torch.testing.assert_close(vae.infer(images.to(memory_format=torch.channels_last)).mean, mean)
    assert torch.equal(mean.view(3, 4, 4, 6), vae.encoder(images)[:, :4])  # C, H, W order


def test_a_model_takes_images_of_other_sizes_that_its_factor_divides() -> None:
    vae = make((1, 28, 28), "model.channels=[4,8,8]")
    for shape in (1, 12, 40), (1, 4, 4):
        (latents,) = vae.latent_shapes(shape)
        assert latents == (4, shape[1] // 4, shape[2] // 4)
        images = torch.rand(2, *shape)
        inference = vae(images, torch.randn(1, 2, math.prod(latents)))
        assert inference.likelihood.mean.shape == (2, *shape)
    with pytest.raises(ValueError, match="images of 30 x 28 can't be encoded: use sizes that 4 divides"):
        vae.infer(torch.rand(1, 1, 30, 28))
    with pytest.raises(ValueError, match="images for this model have channels=1, not 3"):
        vae.infer(torch.rand(1, 3, 28, 28))


def test_bf16_is_off_by_rounding() -> None:
    vae = make()
    images, noise = batch(vae, 4)
    exact = vae(images, noise)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = vae(images, noise)
    assert rounded.likelihood.log_prob(images.repeat(2, 1, 1, 1)).dtype == rounded.kl.dtype == torch.float32
    torch.testing.assert_close(rounded.likelihood.mean, exact.likelihood.mean, rtol=0, atol=0.02)
    torch.testing.assert_close(rounded.kl.sum(2), exact.kl.sum(2), rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["objective.reconstruction=bernoulli"], "use objective.reconstruction=laplace or gaussian"),
        (["objective.reconstruction=discretized_logistic_mixture"], "use objective.reconstruction=laplace or gaussian"),
        (["model.conditional=true", "data.classes=[a,b]"], "its networks take no labels; use model.conditional=false"),
        (["model.channels=[8,16,16,16]"], "images of 8 x 12 can't be encoded: use sizes that 8 divides, or fewer"),
    ],
)
def test_what_the_network_lacks_is_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=f"model.architecture=autoencoder_kl can't be built: .*{message}"):
        make(SHAPE, *arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model.attention=[4]"], "model.attention has 4, but this model's resolutions are"),
        (["model.norm_groups=5"], "model.norm_groups=5 does not divide 8 of model.channels"),
        (["model.channels=[]"], "model.channels needs at least one number"),
        (["model.patch=2"], "model.patch does not apply to model.architecture=autoencoder_kl"),
        (["model.channels=[65536,65536,65536,65536]", "model.blocks=1024"], "the model's weights"),
        (["model.init_sha256=abc"], "model.init_sha256 is the sha256 of weights in model.init_from"),
        (["train.freeze=encoder"], "train.freeze=encoder needs model.init_from"),
        (["train.freeze=decoder"], "train.freeze must be one of none, encoder, not decoder"),
    ],
)
def test_options_that_do_not_fit_are_refused(arguments: list[str], message: str) -> None:
    assert message in refusal(*SMALL, *arguments)


def test_without_diffusers_the_message_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UserError, match="the extra `diffusers`: pip install diffusers"):
        make()


PRESETS = {  # millions of weights, and latents of 256 x 256 pixels: those of the published autoencoders
    "kl_f4": (55.3, (3, 64, 64)),
    "kl_f8": (83.65, (4, 32, 32)),
    "kl_f16": (69.61, (16, 16, 16)),
    "kl_f8_16ch": (83.82, (16, 32, 32)),
    "kl_small": (0.877, (4, 64, 64)),
}


@pytest.mark.parametrize("name", PRESETS)
def test_the_presets_have_the_sizes_of_the_published_autoencoders(name: str) -> None:
    loaded = config.load([str(REPOSITORY / f"configs/{name}.yaml"), "data.path=pictures"])
    with torch.device("meta"):
        vae = build_vae(loaded, (3, 256, 256))
    millions, latents = PRESETS[name]
    networks = sum(weight.numel() for weight in [*vae.encoder.parameters(), *vae.decoder.parameters()])
    assert networks / 1e6 == pytest.approx(millions, rel=2e-3)
    assert vae.latent_shapes((3, 256, 256)) == (latents,)


def published_f16() -> dict[str, Shape]:
    """The shapes of the published f16 autoencoder under diffusers' names, by hand.

    Its options are those of configs/autoencoder/autoencoder_kl_16x16x16.yaml in CompVis/latent-diffusion, its layers
    those of ldm/modules/diffusionmodules/model.py there, at 1dbf39c. A block of `down` or `up` with attention has one
    after each residual block.
    """
    shapes: dict[str, Shape] = {}

    def layer(name: str, *weight: int) -> None:
        shapes.update({f"{name}.weight": weight, f"{name}.bias": weight[:1]})

    def residual(name: str, before: int, after: int) -> None:
        layer(f"{name}.norm1", before)
        layer(f"{name}.conv1", after, before, 3, 3)
        layer(f"{name}.norm2", after)
        layer(f"{name}.conv2", after, after, 3, 3)
        if before != after:  # nin_shortcut
            layer(f"{name}.conv_shortcut", after, before, 1, 1)

    def attention(name: str, channels: int) -> None:
        layer(f"{name}.group_norm", channels)  # norm; q, k, v and proj_out, 1x1 convolutions there, matrices here
        for part in ("to_q", "to_k", "to_v", "to_out.0"):
            layer(f"{name}.{part}", channels, channels)

    ch, ch_mult, num_res_blocks, z_channels, embed_dim = 128, (1, 1, 2, 2, 4), 2, 16, 16
    attn_resolutions, resolution = (16,), 256
    widths = [ch * factor for factor in ch_mult]
    for half, sampled, ends in ("encoder", "downsamplers", (3, 2 * z_channels)), ("decoder", "upsamplers", (16, 3)):
        is_encoder = half == "encoder"
        order = list(range(5)) if is_encoder else [4, 3, 2, 1, 0]
        channels = widths[order[0]]
        layer(f"{half}.conv_in", channels, ends[0], 3, 3)
        for place, level in enumerate(order):
            block = f"{half}.{'down' if is_encoder else 'up'}_blocks.{place}"
            for number in range(num_res_blocks if is_encoder else num_res_blocks + 1):
                residual(f"{block}.resnets.{number}", channels, widths[level])
                channels = widths[level]
                if resolution // 2**level in attn_resolutions:
                    attention(f"{block}.attentions.{number}", channels)
            if level != order[-1]:
                layer(f"{block}.{sampled}.0.conv", channels, channels, 3, 3)
        for number in range(2):
            residual(f"{half}.mid_block.resnets.{number}", widths[-1], widths[-1])
        attention(f"{half}.mid_block.attentions.0", widths[-1])
        layer(f"{half}.conv_norm_out", channels)
        layer(f"{half}.conv_out", ends[1], channels, 3, 3)
    layer("quant_conv", 2 * embed_dim, 2 * z_channels, 1, 1)
    layer("post_quant_conv", z_channels, embed_dim, 1, 1)
    return shapes


def test_the_f16_preset_has_the_layers_of_the_published_autoencoder() -> None:
    loaded = config.load([str(REPOSITORY / "configs/kl_f16.yaml"), "data.path=pictures"])
    with torch.device("meta"):
        vae = build_vae(loaded, (3, 256, 256))
    assert isinstance(vae, AutoencoderKLVAE)
    assert {name: tuple(tensor.shape) for name, tensor in diffusers_state(vae).items()} == published_f16()


def test_attention_is_at_the_named_resolutions_and_in_the_middle() -> None:
    vae = make((1, 16, 24), "model.channels=[4,8,8]", "model.blocks=2", "model.attention=[2]")
    seen: list[Shape] = []
    for module in vae.modules():
        if isinstance(module, Attention):
            assert module.heads == 1 and isinstance(module.processor, OneWideHead)
            module.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape)))
    vae(torch.rand(3, 1, 16, 24), torch.randn(1, 3, vae.latent_dim))
    level, middle = (3, 8, 8, 12), (3, 8, 4, 6)
    assert seen == [level, level, middle, middle, level, level, level]  # one block more in the decoder


# ---- Through the whole package


@pytest.fixture(scope="module")
def common(smoke_arguments: list[str]) -> list[str]:
    options = ["train.batch_size=10", "train.log_every=1", "objective.sigma_kind=learned", "ema.decay=0.9"]
    return [*smoke_arguments[1:], *DIGITS, *SMALL, *options, "evaluate.importance_samples=2"]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_stopped_run_continues_to_the_same_bits(common: list[str], precision: str, tmp_path: Path) -> None:
    common = [*common, f"runs_dir={tmp_path}", f"train.precision={precision}", "checkpoint.every=2"]
    straight = train(config.load([*common, "name=straight", "train.steps=4"]))
    for steps in 2, 4:
        parts = train(config.load([*common, "name=parts", f"train.steps={steps}"]))
    expected, found = tensors(straight), tensors(parts)
    assert {name.split()[0] for name in expected} == {"model", "ema", "optimizer"}
    assert expected.keys() == found.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    measured = evaluate(straight, ["train.threads=1", "evaluate.chunk=500"])
    assert measured["latents"] == 4 * 14 * 14
    drawn = load_file(sample(straight, ["train.threads=1", "sample.count=2"]) / "samples.safetensors")
    assert drawn["latents"].shape == (2, 4 * 14 * 14)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ to compile a step with")
def test_a_compiled_step_trains_as_an_uncompiled_one(
    common: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    common = [*common, f"runs_dir={tmp_path}", "train.steps=3"]
    for compiled in ("false", "true"):
        train(config.load([*common, f"name={compiled}", f"train.compile={compiled}", "train.precision=fp64"]))
    assert "can't be compiled" not in caplog.text
    assert records(tmp_path / "true", "train/loss") == pytest.approx(
        records(tmp_path / "false", "train/loss"), rel=1e-9
    )


def test_a_checkpoint_names_weights_as_diffusers_does(common: list[str], tmp_path: Path) -> None:
    run = train(config.load([*common, f"runs_dir={tmp_path}", "name=a", "train.steps=1"]))
    folder = newest_checkpoint(run)
    assert folder is not None
    parts = [name.partition(".") for name in load_file(folder / "model.safetensors")]
    names = {rest for part, _, rest in parts if part in ("encoder", "decoder")}
    assert names == diffusers_state(make((1, 28, 28))).keys()
