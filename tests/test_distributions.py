import math

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Bernoulli as TorchBernoulli
from torch.distributions import Independent, Normal, kl_divergence
from torch.distributions import Laplace as TorchLaplace

from vae_dist.config import ObjectiveConfig
from vae_dist.models import pixel_distributions
from vae_dist.models.likelihoods import LIKELIHOODS, likelihood_kind
from vae_dist.models.pixel_distributions import Bernoulli, Gaussian, Laplace
from vae_dist.models.posteriors import LOG_VARIANCE_BOUND, DiagonalGaussian


def test_kl_matches_torch_distributions() -> None:
    mean, log_variance = torch.randn(2, 64, 7, dtype=torch.float64)
    expected = kl_divergence(Normal(mean, (0.5 * log_variance).exp()), Normal(0.0, 1.0))
    torch.testing.assert_close(DiagonalGaussian(mean, log_variance).kl_from_standard_normal(), expected)


def test_kl_is_zero_for_the_prior_and_positive_elsewhere() -> None:
    assert DiagonalGaussian(torch.zeros(1, 3), torch.zeros(1, 3)).kl_from_standard_normal().eq(0).all()
    assert (DiagonalGaussian(torch.randn(100, 3), torch.randn(100, 3)).kl_from_standard_normal() >= 0).all()


@pytest.fixture(params=["a CPU's", "compiled for a GPU", "compiled by torch 2.10"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way in which a Bernoulli's log p(x|z) is computed."""
    monkeypatch.setattr(pixel_distributions, "traced_on_gpu", lambda x: request.param == "compiled for a GPU")
    if request.param == "compiled by torch 2.10":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        monkeypatch.setattr(pixel_distributions, "TRACES_FUNCTIONS", False)
        monkeypatch.delattr(pixel_distributions, "_BernoulliLogProb")


def test_bernoulli_matches_torch_distributions(form: None) -> None:
    logits = 4 * torch.randn(16, 1, 5, 6, dtype=torch.float64)
    images = torch.randint(0, 2, logits.shape).double()
    expected = Independent(TorchBernoulli(logits=logits), 3).log_prob(images)
    torch.testing.assert_close(Bernoulli(logits).log_prob(images), expected)
    torch.testing.assert_close(Bernoulli(logits).mean, TorchBernoulli(logits=logits).mean)


def test_the_bernoullis_gradient_is_that_of_binary_cross_entropy(form: None) -> None:
    ours = (4 * torch.randn(16, 1, 5, 6, dtype=torch.float64)).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    images, weights = torch.rand(16, 1, 5, 6, dtype=torch.float64), torch.randn(16, dtype=torch.float64)
    (Bernoulli(ours).log_prob(images) * weights).sum().backward()
    pixels = F.binary_cross_entropy_with_logits(theirs, images, reduction="none")
    (-pixels.flatten(1).sum(1) * weights).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_bernoulli_accepts_grey_pixels_and_is_linear_in_them() -> None:
    likelihood = Bernoulli(torch.randn(4, 1, 3, 3))
    black, white = torch.zeros(4, 1, 3, 3), torch.ones(4, 1, 3, 3)
    grey = likelihood.log_prob(0.25 * white)
    torch.testing.assert_close(grey, 0.75 * likelihood.log_prob(black) + 0.25 * likelihood.log_prob(white))


def test_bernoulli_is_finite_at_extreme_logits(form: None) -> None:
    logits = torch.tensor([-1e4, 1e4]).view(1, 1, 1, 2).requires_grad_()
    value = Bernoulli(logits).log_prob(torch.tensor([1.0, 0.0]).view(1, 1, 1, 2))
    assert value.item() == pytest.approx(-2e4)
    value.sum().backward()
    assert logits.grad is not None and logits.grad.isfinite().all()


@pytest.mark.parametrize("sigma", [0.1, 1.0, 2.5])
def test_gaussian_counts_its_normaliser(sigma: float) -> None:
    location, images = torch.rand(2, 8, 3, 4, 4, dtype=torch.float64)
    expected = Independent(Normal(location, sigma), 3).log_prob(images)
    for given in (sigma, torch.tensor(sigma).double()):
        torch.testing.assert_close(Gaussian(location, given).log_prob(images), expected)


@pytest.mark.parametrize("sigma", [0.1, 1.0, 2.5])
def test_laplace_matches_torch_distributions(sigma: float) -> None:
    location, images = torch.rand(2, 8, 3, 4, 4, dtype=torch.float64)
    expected = Independent(TorchLaplace(location, sigma), 3).log_prob(images)
    for given in (sigma, torch.tensor(sigma).double()):
        torch.testing.assert_close(Laplace(location, given).log_prob(images), expected)
    assert torch.equal(Laplace(2 * location - 0.5, sigma).mean, (2 * location - 0.5).clamp(0, 1))


@pytest.mark.parametrize(("kind", "order"), [(Gaussian, 2), (Laplace, 1)])
def test_the_mean_error_gives_the_most_likely_scale(kind: type[Gaussian] | type[Laplace], order: int) -> None:
    """The oracle: a search over scales."""
    generator = torch.Generator().manual_seed(0)
    location, images = torch.rand(2, 8, 3, 4, 4, dtype=torch.float64, generator=generator)
    best = kind(location, 1.0).error(images).mean() ** (1 / order)
    candidates = best * torch.linspace(0.9, 1.1, 2001, dtype=torch.float64)
    totals = [kind(location, candidate).log_prob(images).sum() for candidate in candidates]
    assert abs(int(torch.stack(totals).argmax()) - 1000) <= 1
    bf16 = kind(location.bfloat16(), 1.0).error(images.float())
    assert bf16.dtype == torch.float32
    torch.testing.assert_close(bf16, kind(location.bfloat16().float(), 1.0).error(images.float()))


@pytest.mark.parametrize(
    ("name", "description", "probabilities"),
    [
        ("bernoulli", "bernoulli", {"threshold", "dynamic"}),
        ("gaussian", "gaussian, sigma 0.5", set()),
        ("laplace", "laplace, sigma 0.5", set()),
    ],
)
def test_a_likelihood_says_what_it_is(name: str, description: str, probabilities: set[str]) -> None:
    kind = likelihood_kind(ObjectiveConfig(reconstruction=name, sigma=0.5))
    assert (kind.name, kind.description, kind.output_shape((3, 4, 5))) == (name, description, (3, 4, 5))
    for binarize in ("none", "threshold", "dynamic"):
        assert kind.is_probability(binarize) is (binarize in probabilities)
        caution = kind.caution(binarize, "kmnist")
        assert (caution is None) is (binarize in probabilities)  # probabilities of images can be compared
        assert caution is None or ("pixels of kmnist" if name == "bernoulli" else "same sigma") in caution
    assert set(LIKELIHOODS) == {"bernoulli", "gaussian", "laplace", "discretized_logistic_mixture"}


def test_drawn_pixels_have_the_likelihoods_moments() -> None:
    parameters = torch.linspace(-3, 3, 6).view(1, 1, 2, 3)
    noise = torch.randn(50_000, 1, 2, 3, generator=torch.Generator().manual_seed(0))
    drawn = Bernoulli(parameters.expand_as(noise)).sample(noise)
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(drawn.mean(0, keepdim=True), parameters.sigmoid(), rtol=0, atol=0.01)
    drawn = Gaussian(parameters.expand_as(noise), 0.3).sample(noise)
    torch.testing.assert_close(drawn.mean(0, keepdim=True), parameters, rtol=0, atol=0.01)
    torch.testing.assert_close(drawn.std(0), torch.full((1, 2, 3), 0.3), rtol=0.02, atol=0)


def test_samples_have_the_posteriors_moments() -> None:
    mean, log_variance = torch.tensor([[1.0, -2.0]]), torch.tensor([[0.0, math.log(4.0)]])
    latents = DiagonalGaussian(mean, log_variance).sample(torch.randn(200_000, 2))
    torch.testing.assert_close(latents.mean(0), mean[0], atol=0.03, rtol=0)
    torch.testing.assert_close(latents.std(0), torch.tensor([1.0, 2.0]), atol=0.03, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_no_network_output_makes_the_posterior_overflow(dtype: torch.dtype) -> None:
    output = torch.tensor([[0.0, 1e4], [0.0, -1e4]], dtype=dtype).requires_grad_()
    posterior = DiagonalGaussian.from_network(output)
    assert posterior.log_variance.abs().max() <= LOG_VARIANCE_BOUND
    assert posterior.log_variance.exp().to(dtype).isfinite().all()
    (posterior.kl_from_standard_normal().sum() + posterior.sample(torch.ones(2, 1)).sum()).backward()
    assert output.grad is not None and output.grad.isfinite().all()


def test_small_log_variances_are_left_as_they_are() -> None:
    raw = torch.tensor([[0.0, 0.5], [0.0, -0.5]])
    torch.testing.assert_close(DiagonalGaussian.from_network(raw).log_variance, raw[:, 1:], atol=1e-3, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_nothing_is_summed_in_low_precision(dtype: torch.dtype, form: None) -> None:
    logits = torch.randn(4, 1, 28, 28).to(dtype)
    images = torch.rand(4, 1, 28, 28)
    mean, log_variance = torch.randn(2, 4, 40).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        values = {
            "bernoulli": Bernoulli(logits).log_prob(images),
            "gaussian": Gaussian(logits, 1.0).log_prob(images),
            "laplace": Laplace(logits, 1.0).log_prob(images),
            "kl": DiagonalGaussian(mean, log_variance).kl_from_standard_normal(),
        }
    expected = {
        "bernoulli": Bernoulli(logits.float()).log_prob(images),
        "gaussian": Gaussian(logits.float(), 1.0).log_prob(images),
        "laplace": Laplace(logits.float(), 1.0).log_prob(images),
        "kl": DiagonalGaussian(mean.float(), log_variance.float()).kl_from_standard_normal(),
    }
    for name, value in values.items():
        assert value.dtype == torch.float32, name
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-5)


def test_bernoulli_draws_have_the_mean_and_the_variance_of_torchs() -> None:
    logits = torch.tensor([-1e4, -3.0, -0.5, 0.0, 2.0, 1e4]).view(1, 1, 2, 3)
    noise = torch.randn(40_000, 1, 2, 3, generator=torch.Generator().manual_seed(0))
    draws = Bernoulli(logits.expand(40_000, -1, -1, -1)).sample(noise)
    expected = TorchBernoulli(logits=logits)
    assert draws.unique().tolist() == [0, 1]
    torch.testing.assert_close(draws.mean(0, keepdim=True), expected.mean, rtol=0, atol=0.01)
    torch.testing.assert_close(draws.var(0, keepdim=True), expected.variance, rtol=0, atol=0.01)


def test_gaussian_draws_are_the_location_and_noise_of_size_sigma() -> None:
    location = torch.rand(3, 1, 4, 4, dtype=torch.float64)
    noise = torch.randn(3, 1, 4, 4, dtype=torch.float64)
    draws = Gaussian(location, 0.3).sample(noise)
    torch.testing.assert_close(Normal(location, 0.3).cdf(draws), Normal(0.0, 1.0).cdf(noise))


def test_laplace_draws_are_quantiles_of_the_noise_far_into_the_tails() -> None:
    location, noise = torch.full((1, 1, 1, 241), 0.5), torch.linspace(-12, 12, 241).view(1, 1, 1, -1)
    draws = Laplace(location, 0.3).sample(noise)
    # Each tail's logarithm in float64: log P(X < x) = (x - m)/b - log 2 below the location, and its mirror image above.
    tail = -(draws.double() - 0.5).abs() / 0.3 - math.log(2)
    torch.testing.assert_close(tail, torch.special.log_ndtr(-noise.double().abs()), rtol=1e-5, atol=1e-5)
    inner = noise.abs() < 4
    expected = TorchLaplace(0.5, 0.3).icdf(torch.special.ndtr(noise[inner].double()))
    torch.testing.assert_close(draws[inner], expected.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "likelihood",
    [Bernoulli(torch.zeros(2, 1, 3, 3)), Gaussian(torch.zeros(2, 1, 3, 3), 1.0), Laplace(torch.zeros(2, 1, 3, 3), 1.0)],
)
def test_other_shapes_are_refused(likelihood: Bernoulli | Gaussian | Laplace) -> None:
    for compute in (likelihood.log_prob, *([] if isinstance(likelihood, Bernoulli) else [likelihood.error])):
        with pytest.raises(ValueError, match=r"images must have the shape \(2, 1, 3, 3\), not \(2, 3, 3\)"):
            compute(torch.zeros(2, 3, 3))
    with pytest.raises(ValueError, match=r"noise must have the shape \(2, 1, 3, 3\), not \(3, 3\)"):
        likelihood.sample(torch.zeros(3, 3))
