import math
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Bernoulli, Distribution, Independent, Normal, kl_divergence

from vae_dist import config
from vae_dist.models import build_vae
from vae_dist.models.posteriors import DiagonalGaussian
from vae_dist.models.vae import VAE
from vae_dist.objectives import (
    OBJECTIVES,
    ElboTerms,
    active_units,
    bits_per_dimension,
    elbo_terms,
    log_weights,
    with_bound,
)


def small_vae(*arguments: str, image_shape: tuple[int, ...] = (1, 6, 6)) -> VAE:
    return build_vae(config.load(["model.latent_dim=5", "model.hidden_dims=[16]", *arguments]), image_shape).double()


def of_each_draw(vae: VAE, images: Tensor, noise: Tensor) -> Mapping[str, Tensor]:
    """The oracle: log p(x|z), log p(z) and log q(z|x) of each draw `(K, B)` by torch.distributions."""
    parameters = vae.infer(images)
    q = Normal(parameters.mean, (0.5 * parameters.log_variance).exp())
    rows: dict[str, list[Tensor]] = {"p(x|z)": [], "p(z)": [], "q(z|x)": []}
    for of_draw in noise:
        latents = q.mean + q.stddev * of_draw
        output = vae.decoder(latents)
        is_gaussian = vae.likelihood.name == "gaussian"
        pixels: Distribution = Normal(output, 1.0) if is_gaussian else Bernoulli(None, output, False)
        rows["p(x|z)"].append(pixels.log_prob(images).sum((1, 2, 3)))
        rows["p(z)"].append(Normal(0.0, 1.0).log_prob(latents).sum(1))
        rows["q(z|x)"].append(q.log_prob(latents).sum(1))
    return {name: torch.stack(values) for name, values in rows.items()}


def test_terms_match_torch_distributions_image_by_image() -> None:
    vae = small_vae()
    images, noise = torch.randint(0, 2, (9, 1, 6, 6)).double(), torch.randn(1, 9, 5).double()
    terms = elbo_terms(vae(images, noise), images)

    posterior = vae.infer(images)
    scale = (0.5 * posterior.log_variance).exp()
    pixels = Bernoulli(probs=vae.decode(posterior.mean + scale * noise[0]).mean)
    torch.testing.assert_close(terms.reconstruction, -Independent(pixels, 3).log_prob(images))
    torch.testing.assert_close(terms.kl, kl_divergence(Normal(posterior.mean, scale), Normal(0.0, 1.0)).sum(1))
    torch.testing.assert_close(terms.negative_elbo, terms.reconstruction + terms.kl)


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_log_weights_match_torch_distributions(likelihood: str) -> None:
    """Sample by sample and image by image, grey pixels too."""
    # 234 pixels: neither a multiple nor a divisor of anything
    vae = small_vae(f"objective.reconstruction={likelihood}", image_shape=(2, 9, 13))
    images, noise = torch.rand(4, 2, 9, 13).double().round(decimals=1), torch.randn(3, 4, 5).double()
    inference = vae.sample(vae.infer(images), noise)
    each = of_each_draw(vae, images, noise)
    torch.testing.assert_close(inference.log_likelihood(images), each["p(x|z)"])
    torch.testing.assert_close(inference.log_ratio, each["p(z)"] - each["q(z|x)"])
    torch.testing.assert_close(log_weights(inference, images), each["p(x|z)"] + each["p(z)"] - each["q(z|x)"])


@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0, 1e4])
def test_float32_log_weights_equal_float64_to_a_ten_thousandth(scale: float) -> None:
    """The posterior is the prior here, so that p(x|z) is the whole weight."""
    vae = build_vae(config.load(["model.hidden_dims=[]"]), (1, 28, 28))
    next(vae.decoder.parameters()).data.mul_(scale)
    images, noise = torch.randint(0, 2, (50, 1, 28, 28)).float(), torch.randn(1, 50, 40)
    prior = DiagonalGaussian(torch.zeros(50, 40), torch.zeros(50, 40))
    computed = log_weights(vae.sample(prior, noise), images)[0]
    logits = vae.decoder(noise[0]).double()
    expected = Bernoulli(logits=logits).log_prob(images.double()).sum((1, 2, 3))
    torch.testing.assert_close(computed.double(), expected, rtol=2e-7, atol=1e-4)


@pytest.mark.parametrize("draws", [1, 5])
def test_the_elbo_is_the_mean_over_the_draws(draws: int) -> None:
    """`iwae` reports the same terms."""
    vae = small_vae()
    images, noise = torch.rand(4, 1, 6, 6).double(), torch.randn(draws, 4, 5).double()
    inference, each = vae(images, noise), of_each_draw(vae, images, noise)
    q = Normal(inference.posterior.mean, (0.5 * inference.posterior.log_variance).exp())
    kl = kl_divergence(q, Normal(0.0, 1.0)).sum(1)
    expected = {"loss": -each["p(x|z)"].mean(0) + 0.7 * kl, "reconstruction": -each["p(x|z)"].mean(0), "kl": kl}
    values = OBJECTIVES["elbo"](inference, images, torch.tensor(0.7))
    assert list(values) == list(expected)
    torch.testing.assert_close(values, expected)
    importance_weighted = OBJECTIVES["iwae"](inference, images, torch.tensor(1.0))
    assert importance_weighted.keys() == values.keys()
    for name in ("reconstruction", "kl"):
        assert torch.equal(importance_weighted[name], values[name])


def test_the_importance_weighted_bound_is_the_log_of_the_mean_weight() -> None:
    """Pixels of 36 nats: the weights are in float64's range, and their mean can be taken as it is defined."""
    vae = small_vae()
    images, noise = torch.rand(4, 1, 6, 6).double(), torch.randn(7, 4, 5).double()
    each = of_each_draw(vae, images, noise)
    weights = (each["p(x|z)"] + each["p(z)"] - each["q(z|x)"]).exp()
    values = OBJECTIVES["iwae"](vae(images, noise), images, torch.tensor(1.0))
    torch.testing.assert_close(values["loss"], -weights.mean(0).log())


def test_with_one_draw_the_importance_weighted_bound_is_the_elbos_estimate() -> None:
    vae = small_vae()
    images, noise = torch.rand(4, 1, 6, 6).double(), torch.randn(1, 4, 5).double()
    each = of_each_draw(vae, images, noise)
    values = OBJECTIVES["iwae"](vae(images, noise), images, torch.tensor(1.0))
    torch.testing.assert_close(values["loss"], -(each["p(x|z)"] + each["p(z)"] - each["q(z|x)"])[0])


def gradients_of(vae: VAE, images: Tensor, noise: Tensor, bound: str) -> dict[str, Tensor]:
    """The gradient of the summed loss by each weight of the model."""
    loss = OBJECTIVES[bound](vae(images, noise), images, torch.tensor(1.0))["loss"].sum()
    weights = dict(vae.named_parameters())
    return dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))


@pytest.mark.parametrize("draws", [1, 4])
@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_the_doubly_reparameterised_gradient_is_the_papers_formula(draws: int, likelihood: str) -> None:
    """Tucker et al. (2019), equation 8: the log-weights depend on the encoder through the draws alone."""
    vae = small_vae(f"objective.reconstruction={likelihood}")
    images, noise = torch.rand(3, 1, 6, 6).double().round(), torch.randn(draws, 3, 5).double()
    posterior = vae.infer(images)
    deviation = (0.5 * posterior.log_variance).exp()
    latents = posterior.mean + deviation * noise
    log_ratio = Normal(0.0, 1.0).log_prob(latents) - Normal(posterior.mean.detach(), deviation.detach()).log_prob(
        latents
    )
    log_likelihood = torch.stack([vae.decode(of_draw).log_prob(images) for of_draw in latents])
    log_weights = log_likelihood + log_ratio.sum(2)
    normalised = log_weights.detach().exp() / log_weights.detach().exp().sum(0)
    losses = {"encoder": -(normalised**2 * log_weights).sum(), "decoder": -(normalised * log_weights).sum()}
    for name, found in gradients_of(vae, images, noise, "iwae_dreg").items():
        loss = losses[name.partition(".")[0]]
        expected = torch.autograd.grad(loss, vae.get_parameter(name), retain_graph=True)[0]
        torch.testing.assert_close(found, expected)


def test_the_doubly_reparameterised_gradient_has_the_values_and_the_decoders_gradient_of_the_plain_one() -> None:
    vae = small_vae()
    images, noise = torch.rand(3, 1, 6, 6).double().round(), torch.randn(4, 3, 5).double()
    values = [OBJECTIVES[bound](vae(images, noise), images, torch.tensor(1.0)) for bound in ("iwae", "iwae_dreg")]
    torch.testing.assert_close(*values)
    plain, doubly = (gradients_of(vae, images, noise, bound) for bound in ("iwae", "iwae_dreg"))
    for name in plain:
        assert torch.allclose(plain[name], doubly[name]) == name.startswith("decoder"), name


def test_the_doubly_reparameterised_gradient_is_on_average_the_plain_one_with_less_variance() -> None:
    vae = small_vae()
    image = torch.rand(1, 1, 6, 6).double().round()
    noise = torch.randn(3, 20_000, 5, generator=torch.Generator().manual_seed(0)).double()
    means: list[Tensor] = []
    variances: list[Tensor] = []
    for bound in ("iwae", "iwae_dreg"):
        mean = vae.infer(image).mean.detach().expand(20_000, -1).requires_grad_()
        posterior = DiagonalGaussian(mean, vae.infer(image).log_variance.detach().expand(20_000, -1))
        inference = vae.sample(posterior, noise)
        loss = OBJECTIVES[bound](inference, image.expand(20_000, -1, -1, -1), torch.tensor(1.0))["loss"]
        gradients = torch.autograd.grad(loss.sum(), mean)[0]  # of each draw of K by itself
        means.append(gradients.mean(0))
        variances.append(gradients.var(0))
    standard_error = (torch.stack(variances).sum(0) / 20_000).sqrt()
    assert ((means[0] - means[1]).abs() < 4 * standard_error).all()
    assert (means[0].abs() > 4 * standard_error).any()  # something is there to agree on
    assert (variances[1] < variances[0]).all()


def test_with_the_exact_posterior_the_doubly_reparameterised_gradient_of_the_encoder_is_zero() -> None:
    """Of a linear Gaussian model: every importance weight is then p(x), whatever is drawn."""
    linear = ["model.latent_dim=2", "model.hidden_dims=[]", "objective.reconstruction=gaussian"]
    vae = build_vae(config.load(linear), (1, 3, 3)).double()
    decoder, bias = (parameter.detach() for parameter in vae.decoder.parameters())
    images, noise = torch.rand(4, 1, 3, 3).double(), torch.randn(5, 4, 2).double()
    directions, lengths, _ = torch.linalg.svd(decoder.T, full_matrices=False)
    decoder.copy_((directions.T @ decoder.T).T)  # its columns are orthogonal now, and so the posterior is diagonal
    precision = decoder.square().sum(0) + 1
    torch.testing.assert_close(precision, lengths**2 + 1)
    mean = ((images.flatten(1) - bias) @ decoder / precision).requires_grad_()
    log_variance = -precision.log().expand(4, 2).clone().requires_grad_()
    gradients = {}
    for bound in ("iwae", "iwae_dreg"):
        inference = vae.sample(DiagonalGaussian(mean, log_variance), noise)
        loss = OBJECTIVES[bound](inference, images, torch.tensor(1.0))["loss"].sum()
        gradients[bound] = torch.cat(torch.autograd.grad(loss, [mean, log_variance]))
    assert gradients["iwae_dreg"].abs().max() < 1e-12 < 1e-3 < gradients["iwae"].abs().max()


def test_a_latent_is_active_above_a_variance_of_a_hundredth() -> None:
    deviations = torch.tensor([1.0, 0.101, 0.099, 0.0])  # their squares: 1, 0.0102, 0.0098, 0
    means = 7 + deviations * torch.tensor([1.0, -1.0]).repeat(500).unsqueeze(1)
    variance = np.var(means.double().numpy(), axis=0)
    assert active_units(torch.from_numpy(variance)) == int((variance > 0.01).sum()) == 2


def test_bits_per_dimension_of_a_coin_for_each_pixel_is_one() -> None:
    assert bits_per_dimension(784 * math.log(2), 784) == pytest.approx(1.0)


def test_beta_weighs_the_loss_and_never_the_reported_bound() -> None:
    vae = small_vae()
    images, noise = torch.rand(4, 1, 6, 6).double(), torch.randn(1, 4, 5).double()
    inference = vae(images, noise)
    half, whole = (OBJECTIVES["elbo"](inference, images, torch.tensor(beta)) for beta in (0.5, 1.0))
    torch.testing.assert_close(half["loss"], half["reconstruction"] + 0.5 * half["kl"])
    torch.testing.assert_close(whole["loss"], elbo_terms(inference, images).negative_elbo)
    for name in ("reconstruction", "kl"):
        assert torch.equal(half[name], whole[name])
    terms = ElboTerms(reconstruction=torch.tensor([80.0, 90.0]), kl=torch.tensor([20.0, 30.0]))
    assert terms.negative_elbo.tolist() == [100.0, 120.0]
    reported = with_bound({"loss": 95.0, "reconstruction": 85.0, "kl": 25.0, "grad_norm": 3.0})
    assert reported == {"loss": 95.0, "negative_elbo": 110.0, "reconstruction": 85.0, "kl": 25.0, "grad_norm": 3.0}
    assert with_bound({"loss": 1.0, "adversarial": 2.0}) == {"loss": 1.0, "adversarial": 2.0}  # of another recipe


@pytest.mark.parametrize("bound", OBJECTIVES)
def test_the_objective_stays_in_float32_under_autocast(bound: str) -> None:
    vae = build_vae(config.load([]), (1, 28, 28))
    images, noise = torch.rand(8, 1, 28, 28), torch.randn(2, 8, 40)
    with torch.autocast("cpu", torch.bfloat16):
        output = vae(images, noise)
        inside = OBJECTIVES[bound](output, images, torch.tensor(0.5))
    outside = OBJECTIVES[bound](output, images, torch.tensor(0.5))
    for name, value in inside.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, outside[name], rtol=1e-6, atol=1e-5)
