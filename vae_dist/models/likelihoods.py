"""Likelihoods p(x|z) by name. A new one is two classes here, the distribution and its kind, and a line in LIKELIHOODS.

Log-densities are in nats, one value per image. N images, C, H, W image, D pixel values of an image.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vae_dist.config import ObjectiveConfig
from vae_dist.models.tensors import Shape, at_least_float32, require_shape

_FACTORS = 112  # of at least 1/2: their product, 2^-112, is not yet denormal in float32


class Likelihood(Protocol):
    """The distribution of N images given their latents."""

    def log_prob(self, images: Tensor) -> Tensor:
        """log p(x|z) of images `(N, C, H, W)` in [0, 1]: `(N,)`, nats. Raises ShapeError for images of other shapes."""

    @property
    def mean(self) -> Tensor:
        """Mean pixels `(N, C, H, W)` in [0, 1], as they are shown."""

    def sample(self, noise: Tensor) -> Tensor:
        """Draw images `(N, C, H, W)` from standard normal noise of this shape."""


class LikelihoodKind(nn.Module, ABC):
    """A kind of likelihood: what it is, and how a decoder's output parameterises it.

    Its parameters, if it has any, are learned with the networks.
    """

    name: str
    description: str  # with its options, as an evaluation states it

    def output_shape(self, image_shape: Shape) -> Shape:
        """The shape of a decoder's output for one image `(C, H, W)`."""
        return image_shape

    @abstractmethod
    def forward(self, output: Tensor) -> Likelihood:
        """The likelihood of N images from a decoder's output `(N, *output_shape)`."""

    @abstractmethod
    def is_probability(self, binarize: str) -> bool:
        """Return whether images binarised so (`data.binarize`) get a probability, as opposed to a density or a loss."""

    @abstractmethod
    def caution(self, binarize: str, dataset: str) -> str | None:
        """Return why values on a data set can't be compared with published likelihoods; None if they can."""


class _BernoulliLogProb(torch.autograd.Function):
    """log p(x|z) `(N,)` from logits l and pixels x `(N, D)`, for any finite logits.

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
    """Independent binary pixels."""

    logits: Tensor  # (N, C, H, W)

    def log_prob(self, images: Tensor) -> Tensor:
        """log p(x|z) of images `(N, C, H, W)` in [0, 1]: `(N,)`, nats. Images get no gradient."""
        require_shape(images, self.logits.shape, "images")
        logits = at_least_float32(self.logits).flatten(1)
        images = images.to(logits.dtype).flatten(1)
        if logits.device.type != "cpu":  # on a GPU logarithms cost less than another pass over the pixels
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


class BernoulliPixels(LikelihoodKind):
    """A Bernoulli of each pixel. It accepts grey pixels in [0, 1], but is not their probability."""

    name = description = "bernoulli"

    def __init__(self, config: ObjectiveConfig) -> None:
        super().__init__()

    def forward(self, output: Tensor) -> Bernoulli:
        return Bernoulli(output)

    def is_probability(self, binarize: str) -> bool:
        return binarize != "none"

    def caution(self, binarize: str, dataset: str) -> str | None:
        if binarize != "none":
            return None
        return (
            f"grey pixels under a Bernoulli are not a likelihood: compare these figures with others on grey {dataset}, "
            "not with papers on binarised images (train with data.binarize=dynamic for that)"
        )


class Gaussian(NamedTuple):
    """Independent normal pixels with one standard deviation: squared error, normalised."""

    location: Tensor  # (N, C, H, W)
    sigma: float

    def log_prob(self, images: Tensor) -> Tensor:
        """log p(x|z) of images `(N, C, H, W)`: `(N,)`, nats. It includes the normaliser, so it can be positive."""
        require_shape(images, self.location.shape, "images")
        location = at_least_float32(self.location)
        squared = ((images.to(location.dtype) - location) / self.sigma).square().flatten(1)
        return -0.5 * squared.sum(1) - squared.shape[1] * (math.log(self.sigma) + 0.5 * math.log(2 * math.pi))

    @property
    def mean(self) -> Tensor:
        return at_least_float32(self.location).clamp(0, 1)

    def sample(self, noise: Tensor) -> Tensor:
        """Draw pixels, which can lie outside [0, 1]."""
        require_shape(noise, self.location.shape, "noise")
        location = at_least_float32(self.location)
        return location + self.sigma * noise.to(location.dtype)


class GaussianPixels(LikelihoodKind):
    """A Gaussian of each pixel with the fixed standard deviation `objective.sigma`."""

    name = "gaussian"

    def __init__(self, config: ObjectiveConfig) -> None:
        super().__init__()
        self.sigma = config.sigma
        self.description = f"gaussian, sigma {config.sigma}"

    def forward(self, output: Tensor) -> Gaussian:
        return Gaussian(output, self.sigma)

    def is_probability(self, binarize: str) -> bool:
        return False

    def caution(self, binarize: str, dataset: str) -> str | None:
        return (
            "a Gaussian of pixels is a density, of which sigma decides the size: compare these figures with others of "
            "the same sigma on the same pixels, not with probabilities of images"
        )


# Name in a config -> the kind of p(x|z) with the config's options.
LIKELIHOODS: dict[str, Callable[[ObjectiveConfig], LikelihoodKind]] = {
    "bernoulli": BernoulliPixels,
    "gaussian": GaussianPixels,
}


def likelihood_kind(config: ObjectiveConfig) -> LikelihoodKind:
    """Return the kind of likelihood that a config names (`objective.reconstruction`). It must be a known one."""
    return LIKELIHOODS[config.reconstruction](config)
