import re
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli as TorchBernoulli
from torch.distributions import Normal, kl_divergence

from vae_dist import config
from vae_dist.config import ARCHITECTURES, Config, ObjectiveConfig
from vae_dist.errors import UserError
from vae_dist.models import build_vae
from vae_dist.models.likelihoods import BernoulliPixels
from vae_dist.models.mlp import TRANSPOSED_ROWS, Layers
from vae_dist.models.pixel_distributions import Bernoulli, Gaussian
from vae_dist.models.posteriors import LOG_VARIANCE_BOUND
from vae_dist.models.priors import Prior, StandardNormal
from vae_dist.models.tensors import Shape, ShapeError
from vae_dist.models.vae import VAE
from vae_dist.objectives import OBJECTIVES

SMALL = {  # by architecture
    "mlp": ["model.hidden_dims=[16,8]", "model.latent_dim=3"],
    "conv": ["model.channels=[8,16]", "model.latent_channels=2"],
    "ladder": ["model.channels=[8,16]", "model.levels=[1,2]", "model.latent_channels=2"],
    "resnet": ["model.channels=[8,16]", "model.latent_channels=2", "model.blocks=1", "model.attention=[2]"],
    "autoencoder_kl": [
        "model.channels=[8,16]",
        "model.blocks=1",
        "model.norm_groups=4",
        "objective.reconstruction=laplace",
        "model.mid_attention=false",  # whose bias of the keys has no gradient
    ],
}
CASES = [(name, shape) for name in ARCHITECTURES for shape in ((1, 28, 28), (3, 32, 32), (2, 8, 12))] + [
    ("mlp", (2, 5, 7))
]


def make(*arguments: str, architecture: str = "mlp") -> Config:
    return config.load([f"model.architecture={architecture}", *SMALL[architecture], *arguments])


@pytest.mark.parametrize(("architecture", "shape"), CASES)
def test_every_architecture_keeps_the_contract_of_shapes(architecture: str, shape: tuple[int, ...]) -> None:
    vae = build_vae(make(architecture=architecture), shape)
    images, noise = torch.rand(4, *shape), torch.randn(2, 4, vae.latent_dim)
    output = vae(images, noise)
    assert output.posterior.mean.shape == output.posterior.log_variance.shape == (4, vae.latent_dim)
    assert output.likelihood.mean.shape == (8, *shape)
    assert output.latents.shape == noise.shape and output.log_ratio.shape == (2, 4)
    assert output.kl.shape == (2, 4, vae.latent_dim) and output.log_likelihood(images).shape == (2, 4)
    assert vae.prior(torch.zeros(5, vae.prior_numbers)).shape == (5, vae.latent_dim)
    (output.kl.sum() - output.log_likelihood(images).sum()).backward()
    for name, parameter in vae.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
        assert name.startswith(("encoder.", "decoder."))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_image_does_not_see_the_others_of_its_batch(architecture: str) -> None:
    vae = build_vae(make(architecture=architecture), (1, 28, 28)).double()
    images, noise = torch.rand(6, 1, 28, 28).double(), torch.randn(1, 6, vae.latent_dim).double()
    together = vae(images, noise).likelihood.mean
    torch.testing.assert_close(together[2:3], vae(images[2:3], noise[:, 2:3]).likelihood.mean)
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in vae.modules())


# A group of a GroupNorm that has one value maps it to 0 whatever the image: the codes of all images would be the same.
LEVELS = "model.levels=[1,1]"
ONE_VALUE = [  # of 2 x 2 pixels; what follows is enough
    ("conv", ["model.channels=[8,1]"], ["model.channels=[8,8]"]),
    ("ladder", ["model.channels=[8,1]", LEVELS], ["model.channels=[8,8]", LEVELS]),
    ("resnet", ["model.channels=[8,1]", "model.attention=[]"], ["model.channels=[1,8]", "model.attention=[]"]),
    ("autoencoder_kl", ["model.channels=[8,4]"], ["model.channels=[4,8]"]),
]


@pytest.mark.parametrize(("architecture", "too_few", "enough"), ONE_VALUE)
def test_a_model_that_would_not_see_its_images_is_refused(
    architecture: str, too_few: list[str], enough: list[str]
) -> None:
    message = "images of 2 x 2 can't be encoded: at 1 x 1 no group .* larger images, a larger last number in model.cha"
    with pytest.raises(UserError, match=message):
        build_vae(make(*too_few, architecture=architecture), (1, 2, 2))
    larger = build_vae(make(*too_few, architecture=architecture), (1, 4, 4))
    with pytest.raises(ValueError, match=message):
        larger.infer(torch.rand(6, 1, 2, 2))
    for vae, shape in (larger, (1, 4, 4)), (build_vae(make(*enough, architecture=architecture), (1, 2, 2)), (1, 2, 2)):
        images = torch.rand(6, *shape, generator=torch.Generator().manual_seed(0))
        codes = vae.infer(images).mean
        assert (codes.amax(0) - codes.amin(0)).max() > 1e-4
        torch.testing.assert_close(vae.infer(images[:1]).mean, codes[:1])  # also where a single group has one value


@pytest.mark.parametrize("rows", [1, 5, TRANSPOSED_ROWS, TRANSPOSED_ROWS + 1])
def test_transposed_layers_equal_torchs_sequential(rows: int) -> None:
    layers = Layers(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    images = torch.randn(rows, 7, dtype=torch.float64)
    weights = torch.randn(rows, 3, dtype=torch.float64)
    results = []
    for forward in layers, nn.Sequential(*layers):
        x = images.clone().requires_grad_()
        output = forward(x)
        results.append([output, *torch.autograd.grad((output * weights).sum(), [x, *layers.parameters()])])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("hidden_dims", ["[]", "[7]", "[9,8,7]"])
def test_the_decoder_mirrors_any_hidden_sizes(hidden_dims: str) -> None:
    vae = build_vae(make(f"model.hidden_dims={hidden_dims}"), (1, 4, 4))
    sizes = [module.in_features for module in vae.encoder.modules() if isinstance(module, nn.Linear)]
    mirrored = [module.out_features for module in vae.decoder.modules() if isinstance(module, nn.Linear)]
    assert sizes == mirrored[::-1]


@pytest.mark.parametrize("name", ["relu", "tanh"])
def test_hidden_layers_have_the_activation_of_the_config(name: str) -> None:
    vae = build_vae(make(f"model.activation={name}"), (1, 4, 4)).double()
    images, latents = torch.rand(5, 1, 4, 4).double(), torch.randn(5, 3).double()
    for network, inputs in (vae.encoder, images), (vae.decoder, latents):
        expected = inputs.flatten(1)
        *hidden, last = (module for module in network.modules() if isinstance(module, nn.Linear))
        for layer in hidden:
            expected = {"relu": torch.relu, "tanh": torch.tanh}[name](expected @ layer.weight.T + layer.bias)
        torch.testing.assert_close(network(inputs).flatten(1), expected @ last.weight.T + last.bias)


def test_the_default_is_the_tutorials_network() -> None:
    vae = build_vae(config.load([]), (1, 28, 28))
    shapes = [tuple(parameter.shape) for parameter in vae.parameters() if parameter.ndim == 2]
    assert shapes == [(400, 784), (80, 400), (400, 40), (784, 400)]  # the mean's and the log-variance's head in one


def test_weights_are_a_function_of_the_seed_alone() -> None:
    torch.manual_seed(5)
    first = build_vae(make("seed=1"), (1, 8, 8)).state_dict()
    state = torch.get_rng_state()
    second = build_vae(make("seed=1"), (1, 8, 8)).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = build_vae(make("seed=2"), (1, 8, 8)).state_dict()
    assert not torch.equal(first["encoder.layers.0.weight"], other["encoder.layers.0.weight"])


@pytest.mark.parametrize("architecture", ["mlp", "conv", "resnet", "autoencoder_kl"])
def test_images_with_their_channels_last_are_refused_before_anything_is_trained(architecture: str) -> None:
    with pytest.raises(UserError, match=r"images of shape \[28, 28, 1\] can't be drawn: .* with at most 4 channels"):
        build_vae(make(architecture=architecture), (28, 28, 1))


def test_the_likelihood_is_the_configs() -> None:
    assert isinstance(build_vae(make(), (1, 4, 4)).decode(torch.zeros(1, 3)), Bernoulli)
    gaussian = build_vae(make("objective.reconstruction=gaussian", "objective.sigma=0.5"), (1, 4, 4))
    likelihood = gaussian.decode(torch.zeros(1, 3))
    assert isinstance(likelihood, Gaussian) and likelihood.sigma == 0.5


def test_unknown_names_list_the_choices() -> None:
    with pytest.raises(
        UserError, match=r"unknown objective\.reconstruction 'bernouli'; choose from bernoulli, .*gaussian"
    ):
        build_vae(make("objective.reconstruction=bernouli"), (1, 4, 4))
    with pytest.raises(UserError, match=r"unknown model\.prior 'normal'; choose from mixture, standard_normal"):
        build_vae(make("model.prior=normal"), (1, 4, 4))


class Convolutional(VAE):
    """Latents `(4, H / 4, W / 4)` by one convolution each way."""

    def __init__(self) -> None:
        super().__init__((1, 28, 28), BernoulliPixels(ObjectiveConfig()))
        self.encoder: nn.Module = nn.Conv2d(1, 2 * 4, 4, stride=4)
        self.decoder: nn.Module = nn.ConvTranspose2d(4, 1, 4, stride=4)
        self.p_z: Prior = StandardNormal(self.latent_dim)

    def latent_shapes(self, image_shape: Shape) -> tuple[Shape, ...]:
        if image_shape[1] % 4 or image_shape[2] % 4:
            raise ValueError(f"4 must divide {image_shape[1]} and {image_shape[2]}")
        return ((4, image_shape[1] // 4, image_shape[2] // 4),)


@pytest.fixture
def convolutional() -> VAE:
    torch.manual_seed(0)
    return Convolutional().double()


def test_shaped_latents_have_the_loss_of_each_image_alone(convolutional: VAE) -> None:
    """Seven images with latents of seven rows and columns: a sum over the wrong dimension would broadcast."""
    images, noise = torch.rand(7, 1, 28, 28).double(), torch.randn(1, 7, 196).double()
    losses = []
    for image, of_image in zip(images, noise[0], strict=True):
        mean, raw = convolutional.encoder(image.unsqueeze(0))[0].split(4)
        q = Normal(mean, (0.5 * LOG_VARIANCE_BOUND * torch.tanh(raw / LOG_VARIANCE_BOUND)).exp())
        logits = convolutional.decoder((q.mean + q.stddev * of_image.view(4, 7, 7)).unsqueeze(0))[0]
        log_likelihood = TorchBernoulli(None, logits, False).log_prob(image).sum()
        losses.append(kl_divergence(q, Normal(0.0, 1.0)).sum() - log_likelihood)
    computed = OBJECTIVES["elbo"](convolutional(images, noise), images, torch.tensor(1.0))["loss"]
    torch.testing.assert_close(computed, torch.stack(losses))


@pytest.mark.parametrize("shape", [(1, 28, 28), (1, 12, 20)])
def test_draws_at_once_equal_single_draws(shape: Shape, convolutional: VAE) -> None:
    images = torch.rand(3, *shape).double()
    posterior = convolutional.infer(images)
    noise = torch.randn(5, *posterior.mean.shape).double()
    at_once = convolutional.sample(posterior, noise, shape)
    for number in range(5):
        alone = convolutional.sample(posterior, noise[number : number + 1], shape)
        for ours, theirs in (
            (at_once.latents, alone.latents), (at_once.kl, alone.kl), (at_once.log_ratio, alone.log_ratio),
            (at_once.log_likelihood(images), alone.log_likelihood(images)),
        ):  # fmt: skip
            torch.testing.assert_close(ours[number], theirs[0])
        means = at_once.likelihood.mean.unflatten(0, (5, 3))[number]
        torch.testing.assert_close(means, alone.likelihood.mean)


def test_images_of_another_size_are_encoded_and_decoded(convolutional: VAE) -> None:
    images = torch.rand(2, 1, 12, 20).double()
    posterior = convolutional.infer(images)
    assert posterior.mean.shape == (2, 4 * 3 * 5) and convolutional.latent_dim == 4 * 7 * 7
    torch.testing.assert_close(posterior.mean, convolutional.encoder(images)[:, :4].reshape(2, 60))
    expected = convolutional.decoder(posterior.mean.view(2, 4, 3, 5)).sigmoid()
    torch.testing.assert_close(convolutional.decode(posterior.mean, (1, 12, 20)).mean, expected)
    inference = convolutional(images, torch.zeros(1, 2, 60).double())
    torch.testing.assert_close(inference.likelihood.mean, expected)


def other_module(name: str, module: nn.Module) -> Callable[[VAE], None]:
    def change(vae: VAE) -> None:
        setattr(vae, name, module.double())

    return change


class OfOneNumber(StandardNormal):
    """A prior whose log-density has one dimension too many."""

    def log_ratio(self, *given: Any) -> Tensor:
        return super().log_ratio(*given).unsqueeze(2)


WRONG: dict[str, tuple[Callable[[VAE], None] | None, Callable[[VAE], object], str]] = {
    "noise without draws": (None, lambda vae: vae(zeros(7), zeros(7, 196)), "noise * (K, 7, 196) * (7, 196)"),
    "noise of other latents": (None, lambda vae: vae(zeros(7), zeros(2, 7, 7)), "noise * (K, 7, 196) * (2, 7, 7)"),
    "noise of other images": (None, lambda vae: vae(zeros(7), zeros(2, 1, 196)), "noise * (K, 7, 196) * (2, 1, 196)"),
    "noise of a prior": (None, lambda vae: vae.prior(zeros(7, 1)), "noise * (7, 196) * (7, 1)"),
    "shaped latents": (None, lambda vae: vae.decode(zeros(7, 4, 7, 7)), "latents * (7, 196) * (7, 4, 7, 7)"),
    "latents of another size": (None, lambda vae: vae.decode(zeros(7, 60)), "latents * (7, 196) * (7, 60)"),
    "an encoder's channels": (
        other_module("encoder", nn.Conv2d(1, 4, 4, stride=4)),
        lambda vae: vae.infer(zeros(7)),
        "encoder * (7, 392) * (7, 196)",
    ),
    "a decoder's size": (
        other_module("decoder", nn.ConvTranspose2d(4, 1, 2, stride=2)),
        lambda vae: vae.decode(zeros(7, 196)),
        "decoder * (7, 1, 28, 28) * (7, 1, 14, 14)",
    ),
    "a prior's density": (
        other_module("p_z", OfOneNumber(196)),
        lambda vae: vae(zeros(7), zeros(2, 7, 196)),
        "prior * (2, 7) * (2, 7, 1)",
    ),
    "other images": (
        None,
        lambda vae: vae(zeros(7), zeros(1, 7, 196)).log_likelihood(zeros(1)),
        "images * (7, 1, 28, 28) * (1, 1, 28, 28)",
    ),
    "flat images": (
        None,
        lambda vae: vae.decode(zeros(7, 196)).log_prob(zeros(7, 784)),
        "images * (7, 1, 28, 28) * (7, 784)",
    ),
    "noise of pixels": (
        None,
        lambda vae: vae.decode(zeros(7, 196)).sample(zeros(1)),
        "noise * (7, 1, 28, 28) * (1, 1, 28, 28)",
    ),
}


def zeros(*shape: int) -> Tensor:
    """Zeros of a shape, or so many images."""
    return torch.zeros(*shape, *((1, 28, 28) if len(shape) == 1 else ())).double()


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_shape_is_named_and_never_broadcasts(what: str, convolutional: VAE) -> None:
    """The message holds both shapes, the expected one first."""
    change, use, message = WRONG[what]
    if change is not None:
        change(convolutional)
    with pytest.raises(ShapeError, match=".*".join(map(re.escape, message.split(" * ")))):
        use(convolutional)


def test_images_that_a_network_can_not_take_are_named(convolutional: VAE) -> None:
    with pytest.raises(ValueError, match="4 must divide 27 and 28"):
        convolutional.infer(torch.zeros(1, 1, 27, 28).double())
    mlp = build_vae(make(), (1, 8, 8))
    with pytest.raises(ValueError, match=r"takes images of \[1, 8, 8\] alone, not \[1, 4, 16\]"):
        mlp.infer(torch.zeros(2, 1, 4, 16))
    with pytest.raises(ValueError, match=r"takes images of \[1, 8, 8\] alone, not \[1, 4, 16\]"):
        mlp.decode(torch.zeros(2, 3), (1, 4, 16))


def test_models_built_in_threads_are_equal_and_change_no_callers_random_state() -> None:
    settings = config.load(["model.hidden_dims=[8]", "seed=3"])
    expected = build_vae(settings, (1, 8, 8)).state_dict()
    state, interval = torch.get_rng_state(), sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as threads:
            made = list(threads.map(lambda _: build_vae(settings, (1, 8, 8)).state_dict(), range(80)))
    finally:
        sys.setswitchinterval(interval)
    assert all(torch.equal(weights[name], expected[name]) for weights in made for name in expected)
    assert torch.equal(torch.get_rng_state(), state)
