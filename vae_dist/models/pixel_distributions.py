"""Distributions of pixels: p(x|z) with its parameters.

Log-densities are in nats, one value per image. N images, C, H, W image, D pixel values of an image.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vae_dist.models.tensors import at_least_float32, require_shape, traced_on_gpu

Number = float | Tensor  # a tensor `()`

# torch 2.10 can't compile an autograd.Function inside torch.func.
TRACES_FUNCTIONS = torch.__version__ >= "2.11"

_FACTORS = 112  # of at least 1/2: their product, 2^-112, is not yet denormal in float32


class _BernoulliLogProb(torch.autograd.Function):
    """log p(x|z) `(N,)` from logits l and pixels x `(N, D)`, for any finite logits.

    log p(x|z) = sum of x l - relu(l) + log max(s, 1 - s), where s is the sigmoid of l. The factors max(s, 1 - s) of
    many pixels are multiplied first, so that one logarithm serves them all; a program for a GPU, where another pass
    over the pixels would cost more than logarithms, takes one of each. The gradient is x - s. torch's binary
    cross-entropy takes several times as long on a CPU, and a compiled one computes twice as many exponentials.
    """

    @staticmethod
    def forward(logits: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return log p(x|z), and the sigmoid of the logits for the gradient."""
        sigmoid = logits.sigmoid()
        factors = torch.maximum(sigmoid, 1 - sigmoid)
        if traced_on_gpu(logits):
            return (images * logits - logits.relu() + factors.log()).sum(1), sigmoid
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
    """Independent binary pixels."""

    logits: Tensor  # (N, C, H, W)

    def log_prob(self, images: Tensor) -> Tensor:
        """log p(x|z) of images `(N, C, H, W)` in [0, 1]: `(N,)`, nats. Images get no gradient."""
        require_shape(images, self.logits.shape, "images")
        logits = at_least_float32(self.logits).flatten(1)
        images = images.to(logits.dtype).flatten(1)
        has_own_gradient = logits.is_cpu or traced_on_gpu(logits)
        if not has_own_gradient or (torch.compiler.is_compiling() and not TRACES_FUNCTIONS):
            return -F.binary_cross_entropy_with_logits(logits, images, reduction="none").sum(1)
        log_prob: Tensor = _BernoulliLogProb.apply(logits, images)[0]
        return log_prob

    @property
    def mean(self) -> Tensor:
        return torch.sigmoid(at_least_float32(self.logits))

    def sample(self, noise: Tensor) -> Tensor:
        """Draw pixels of 0 and 1: 1 where the noise is below the quantile of the mean."""
        require_shape(noise, self.logits.shape, "noise")
        mean = self.mean
        return (noise.to(mean.dtype) < torch.special.ndtri(mean)).to(mean.dtype)


class Gaussian(NamedTuple):
    """Independent normal pixels with one standard deviation: squared error, normalised."""

    location: Tensor  # (N, C, H, W)
    sigma: Number  # the standard deviation

    def log_prob(self, images: Tensor) -> Tensor:
        """log p(x|z) of images `(N, C, H, W)`: `(N,)`, nats. It includes the normaliser, so it can be positive."""
        squared = (_distance(images, self.location) / self.sigma).square().flatten(1)
        return -0.5 * squared.sum(1) - squared.shape[1] * (_log(self.sigma) + 0.5 * math.log(2 * math.pi))

    @property
    def mean(self) -> Tensor:
        return at_least_float32(self.location).clamp(0, 1)

    def sample(self, noise: Tensor) -> Tensor:
        """Draw pixels, which can lie outside [0, 1]."""
        require_shape(noise, self.location.shape, "noise")
        location = at_least_float32(self.location)
        return location + self.sigma * noise.to(location.dtype)

    def error(self, images: Tensor) -> Tensor:
        """The squared error of images `(N, C, H, W)`, averaged over an image's pixel values: `(N,)`.

        Its mean over images is the square of the sigma that makes them most likely.
        """
        return _distance(images, self.location).square().flatten(1).mean(1)


class Laplace(NamedTuple):
    """Independent pixels of a Laplace distribution with one scale: absolute error, normalised."""

    location: Tensor  # (N, C, H, W)
    sigma: Number  # the scale b: the mean absolute deviation

    def log_prob(self, images: Tensor) -> Tensor:
        """log p(x|z) of images `(N, C, H, W)`: `(N,)`, nats. It includes the normaliser, so it can be positive."""
        absolute = (_distance(images, self.location).abs() / self.sigma).flatten(1)
        return -absolute.sum(1) - absolute.shape[1] * (_log(self.sigma) + math.log(2))

    @property
    def mean(self) -> Tensor:
        return at_least_float32(self.location).clamp(0, 1)

    def sample(self, noise: Tensor) -> Tensor:
        """Draw pixels, which can lie outside [0, 1]: the quantiles of the noise's probabilities."""
        require_shape(noise, self.location.shape, "noise")
        location = at_least_float32(self.location)
        noise = noise.to(location.dtype)
        # The logarithm of the smaller tail is exact where a probability near 1 would round to 1.
        distance = -torch.special.log_ndtr(-noise.abs()) - math.log(2)
        return location + self.sigma * noise.sign() * distance

    def error(self, images: Tensor) -> Tensor:
        """The absolute error of images `(N, C, H, W)`, averaged over an image's pixel values: `(N,)`.

        Its mean over images is the sigma that makes them most likely.
        """
        return _distance(images, self.location).abs().flatten(1).mean(1)


def _distance(images: Tensor, location: Tensor) -> Tensor:
    require_shape(images, location.shape, "images")
    location = at_least_float32(location)
    return images.to(location.dtype) - location


def _log(sigma: Number) -> Number:
    return sigma.log() if isinstance(sigma, Tensor) else math.log(sigma)
