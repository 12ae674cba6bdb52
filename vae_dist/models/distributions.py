"""The distributions of a VAE in closed form: log-densities in nats, one value per image.

Shapes: B batch, L latents, C, H, W image. Everything is computed in float32 at least, whatever the network's precision:
a sum over 784 pixels in bfloat16 is off by half a nat, and autocast on a CPU computes exp, log and sum in bfloat16.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_FACTORS = 112  # of at least 1/2: their product, 2^-112, is not yet denormal in float32
LOG_VARIANCE_BOUND = 10.0  # exp of it and of its negative are finite in float16 too


def at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class DiagonalGaussian(NamedTuple):
    """The posterior q(z|x): independent normal latents."""

    mean: Tensor  # (B, L)
    log_variance: Tensor  # (B, L)

    @classmethod
    def from_network(cls, parameters: Tensor) -> "DiagonalGaussian":
        """Split a network's output `(B, 2 L)` into means and log-variances, the latter softly bounded.

        The bound is a tanh, which is the identity near 0 and, unlike a clamp, has a gradient everywhere.
        """
        mean, raw = at_least_float32(parameters).chunk(2, dim=1)
        return cls(mean, LOG_VARIANCE_BOUND * torch.tanh(raw / LOG_VARIANCE_BOUND))

    def sample(self, noise: Tensor) -> Tensor:
        """Reparameterise (Kingma and Welling 2013): latents `(B, L)` from standard normal noise `(B, L)`."""
        return self.mean + torch.exp(0.5 * self.log_variance) * noise

    def log_prior_ratio(self, noise: Tensor) -> Tensor:
        """log p(z) - log q(z|x) of the latents z that `sample` draws with noise `(..., B, L)`: `(..., B)`, nats.

        The constants of the two densities cancel, and the noise is z's distance from the mean in standard deviations.
        """
        return 0.5 * (self.log_variance + noise.square() - self.sample(noise).square()).sum(-1)

    def kl(self) -> Tensor:
        """KL(q(z|x) || N(0, I)) per latent `(B, L)`, nats, at least 0 (Kingma and Welling 2013, appendix B)."""
        mean, log_variance = at_least_float32(self.mean), at_least_float32(self.log_variance)
        return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)


class _BernoulliLogProb(torch.autograd.Function):
    """log p(x|z) `(B,)` from logits l and pixels x `(B, D)`, for any finite logits.

    log p(x|z) = sum of x l - relu(l) + log max(s, 1 - s), where s is the sigmoid of l. The factors max(s, 1 - s) of
    many pixels are multiplied first, so that one logarithm serves them all. The gradient is x - s. torch's binary
    cross-entropy takes several times as long on a CPU.
    """

    @staticmethod
    def forward(logits: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return log p(x|z), and the sigmoid of the logits for the gradient."""
        sigmoid = logits.sigmoid()
        factors = torch.maximum(sigmoid, 1 - sigmoid)
        products = torch.stack([part.prod(1) for part in factors.split(_FACTORS, dim=1)])
        linear = (images * logits).sub_(logits.relu()).sum(1)
        return linear.add_(products.log_().sum(0)), sigmoid

    @staticmethod
    def setup_context(context: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
        _, images = inputs
        _, sigmoid = output
        context.mark_non_differentiable(sigmoid)
        context.save_for_backward(sigmoid, images)

    @staticmethod
    def backward(context: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, None]:
        sigmoid, images = context.saved_tensors
        return (images - sigmoid) * gradient.unsqueeze(1), None


class Bernoulli(NamedTuple):
    """The likelihood p(x|z) of binary pixels. It accepts grey pixels in [0, 1], but is not their probability."""

    logits: Tensor  # (B, C, H, W)

    def log_prob(self, images: Tensor) -> Tensor:
        """log p(x|z) of images `(B, C, H, W)` in [0, 1]: `(B,)`, nats. Images get no gradient."""
        logits = at_least_float32(self.logits).flatten(1)
        images = images.to(logits.dtype).flatten(1)
        if logits.device.type != "cpu":  # on a GPU logarithms cost less than another pass over the pixels
            return -F.binary_cross_entropy_with_logits(logits, images, reduction="none").sum(1)
        log_prob: Tensor = _BernoulliLogProb.apply(logits, images)[0]
        return log_prob

    @property
    def mean(self) -> Tensor:
        """Mean pixels `(B, C, H, W)` in [0, 1]."""
        return torch.sigmoid(at_least_float32(self.logits))

    def sample(self, noise: Tensor) -> Tensor:
        """Draw binary pixels `(B, C, H, W)` with standard normal noise of that shape: 1 where Phi(noise) < mean."""
        mean = self.mean
        _require_shape(noise, mean)
        return (noise.to(mean.dtype) < torch.special.ndtri(mean)).to(mean.dtype)


class Gaussian(NamedTuple):
    """The likelihood p(x|z) of grey pixels with a fixed standard deviation: squared error, normalised."""

    location: Tensor  # (B, C, H, W)
    sigma: float

    def log_prob(self, images: Tensor) -> Tensor:
        """log p(x|z) of images `(B, C, H, W)`: `(B,)`, nats. It includes the normaliser, so it can be positive."""
        location = at_least_float32(self.location)
        squared = ((images.to(location.dtype) - location) / self.sigma).square().flatten(1)
        return -0.5 * squared.sum(1) - squared.shape[1] * (math.log(self.sigma) + 0.5 * math.log(2 * math.pi))

    @property
    def mean(self) -> Tensor:
        """Mean pixels `(B, C, H, W)` in [0, 1]."""
        return at_least_float32(self.location).clamp(0, 1)

    def sample(self, noise: Tensor) -> Tensor:
        """Draw pixels `(B, C, H, W)` with standard normal noise of that shape. They may lie outside [0, 1]."""
        location = at_least_float32(self.location)
        _require_shape(noise, location)
        return location + self.sigma * noise.to(location.dtype)


def _require_shape(noise: Tensor, pixels: Tensor) -> None:
    if noise.shape != pixels.shape:
        raise ValueError(f"noise has shape {tuple(noise.shape)}, pixels have {tuple(pixels.shape)}")


Likelihood = Bernoulli | Gaussian

# Name in a config -> p(x|z) from sigma and the decoder's output (B, C, H, W).
LIKELIHOODS: dict[str, Callable[[float, Tensor], Likelihood]] = {
    "bernoulli": lambda sigma, output: Bernoulli(output),
    "gaussian": lambda sigma, output: Gaussian(output, sigma),
}
