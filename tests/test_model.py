import pytest
import torch
from torch import nn
from vae_dist.models.distributions import Bernoulli, Gaussian

from vae_dist import config
from vae_dist.config import Config
from vae_dist.errors import UserError
from vae_dist.models import ARCHITECTURES, build_vae
from vae_dist.models.mlp import TRANSPOSED_ROWS, Layers

SHAPES = [(1, 28, 28), (3, 32, 32), (2, 5, 7)]


def make(*arguments: str) -> Config:
    return config.load(["model.hidden_dims=[16,8]", "model.latent_dim=3", *arguments])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_architecture_keeps_the_contract_of_shapes(architecture: str, shape: tuple[int, ...]) -> None:
    vae = build_vae(make(f"model.architecture={architecture}"), shape)
    images, noise = torch.rand(4, *shape), torch.randn(4, 3)
    output = vae(images, noise)
    assert output.posterior.mean.shape == output.posterior.log_variance.shape == (4, 3)
    assert output.likelihood.mean.shape == images.shape
    (output.posterior.kl().sum() - output.likelihood.log_prob(images).sum()).backward()
    for name, parameter in vae.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
        assert name.startswith(("encoder.", "decoder."))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_image_does_not_see_the_others_of_its_batch(architecture: str) -> None:
    vae = build_vae(make(f"model.architecture={architecture}"), (1, 28, 28)).double()
    images, noise = torch.rand(6, 1, 28, 28).double(), torch.randn(6, 3).double()
    together = vae(images, noise).likelihood.mean
    torch.testing.assert_close(together[2:3], vae(images[2:3], noise[2:3]).likelihood.mean)
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in vae.modules())


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


def test_the_likelihood_is_the_configs() -> None:
    assert isinstance(build_vae(make(), (1, 4, 4)).decode(torch.zeros(1, 3)), Bernoulli)
    gaussian = build_vae(make("objective.reconstruction=gaussian", "objective.sigma=0.5"), (1, 4, 4))
    likelihood = gaussian.decode(torch.zeros(1, 3))
    assert isinstance(likelihood, Gaussian) and likelihood.sigma == 0.5


def test_unknown_names_list_the_choices() -> None:
    with pytest.raises(UserError, match="unknown reconstruction 'bernouli'; choose from bernoulli, gaussian"):
        build_vae(make("objective.reconstruction=bernouli"), (1, 4, 4))
