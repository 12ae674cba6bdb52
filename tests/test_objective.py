import math

import numpy as np
import pytest
import torch
from torch.distributions import Bernoulli, Independent, Normal, kl_divergence
from vae_dist.models.distributions import DiagonalGaussian

from vae_dist import config
from vae_dist.models import build_vae
from vae_dist.objectives import (
    ElboTerms,
    active_units,
    bits_per_dimension,
    elbo_terms,
    log_weights,
    training_loss,
)
from vae_dist.plan import shard


def test_terms_match_torch_distributions_image_by_image() -> None:
    vae = build_vae(config.load(["model.latent_dim=5", "model.hidden_dims=[16]"]), (1, 6, 6)).double()
    images, noise = torch.randint(0, 2, (9, 1, 6, 6)).double(), torch.randn(9, 5).double()
    terms = elbo_terms(vae(images, noise), images)

    posterior = vae.encode(images)
    scale = (0.5 * posterior.log_variance).exp()
    pixels = Bernoulli(probs=vae.decode(posterior.mean + scale * noise).mean)
    torch.testing.assert_close(terms.reconstruction, -Independent(pixels, 3).log_prob(images))
    torch.testing.assert_close(terms.kl, kl_divergence(Normal(posterior.mean, scale), Normal(0.0, 1.0)).sum(1))
    torch.testing.assert_close(terms.negative_elbo, terms.reconstruction + terms.kl)


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_log_weights_match_torch_distributions(likelihood: str) -> None:
    """Sample by sample and image by image, grey pixels too."""
    settings = config.load(["model.latent_dim=5", "model.hidden_dims=[16]", f"objective.reconstruction={likelihood}"])
    vae = build_vae(settings, (2, 9, 13)).double()  # 234 pixels: neither a multiple nor a divisor of anything
    images, noise = torch.rand(4, 2, 9, 13).double().round(decimals=1), torch.randn(3, 4, 5).double()
    posterior = vae.encode(images)
    computed = log_weights(vae, posterior, images, noise)
    q = Normal(posterior.mean, (0.5 * posterior.log_variance).exp())
    for sample in range(3):
        latents = q.mean + q.stddev * noise[sample]
        mean = vae.decoder(latents)
        bernoulli, gaussian = Bernoulli(logits=mean, validate_args=False), Normal(mean, 1.0)
        pixels = bernoulli.log_prob(images) if likelihood == "bernoulli" else gaussian.log_prob(images)
        joint = pixels.sum((1, 2, 3)) + Normal(0.0, 1.0).log_prob(latents).sum(1)
        torch.testing.assert_close(computed[sample], joint - q.log_prob(latents).sum(1))


@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0, 1e4])
def test_float32_log_weights_equal_float64_to_a_ten_thousandth(scale: float) -> None:
    """The posterior is the prior here, so that p(x|z) is the whole weight."""
    vae = build_vae(config.load(["model.hidden_dims=[]"]), (1, 28, 28))
    next(vae.decoder.parameters()).data.mul_(scale)
    images, noise = torch.randint(0, 2, (50, 1, 28, 28)).float(), torch.randn(1, 50, 40)
    prior = DiagonalGaussian(torch.zeros(50, 40), torch.zeros(50, 40))
    computed = log_weights(vae, prior, images, noise)[0]
    logits = vae.decoder(noise[0]).double()
    expected = Bernoulli(logits=logits).log_prob(images.double()).sum((1, 2, 3))
    torch.testing.assert_close(computed.double(), expected, rtol=2e-7, atol=1e-4)


def test_a_latent_is_active_above_a_variance_of_a_hundredth() -> None:
    deviations = torch.tensor([1.0, 0.101, 0.099, 0.0])  # their squares: 1, 0.0102, 0.0098, 0
    means = 7 + deviations * torch.tensor([1.0, -1.0]).repeat(500).unsqueeze(1)
    assert active_units(means) == int((np.var(means.double().numpy(), axis=0) > 0.01).sum()) == 2


def test_bits_per_dimension_of_a_coin_for_each_pixel_is_one() -> None:
    assert bits_per_dimension(784 * math.log(2), 784) == pytest.approx(1.0)


def test_beta_weighs_the_loss_and_never_the_reported_bound() -> None:
    terms = ElboTerms(reconstruction=torch.tensor([80.0, 90.0]), kl=torch.tensor([20.0, 30.0]))
    assert training_loss(terms, beta=0.5, batch_size=2).item() == pytest.approx(97.5)
    assert terms.negative_elbo.tolist() == [100.0, 120.0]


def test_losses_of_uneven_shards_average_to_the_batch_mean() -> None:
    terms = ElboTerms(torch.rand(100).double(), torch.rand(100).double())
    whole = training_loss(terms, beta=1.0, batch_size=100)
    for world_size in (2, 3, 8):
        rows = [shard(100, rank, world_size) for rank in range(world_size)]
        shards = [ElboTerms(*(term[list(part)] for term in terms)) for part in rows]
        losses = [training_loss(part, 1.0, 100 / world_size) for part in shards]
        torch.testing.assert_close(torch.stack(losses).mean(), whole)


def test_the_objective_stays_in_float32_under_autocast() -> None:
    vae = build_vae(config.load([]), (1, 28, 28))
    images, noise = torch.rand(8, 1, 28, 28), torch.randn(8, 40)
    with torch.autocast("cpu", torch.bfloat16):
        output = vae(images, noise)
        inside = elbo_terms(output, images)
    outside = elbo_terms(output, images)
    for value, expected in zip(inside, outside, strict=True):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-5)
