"""Likelihoods p(x|z) by name: what each is, and how a decoder's output parameterises it.

A new one is a distribution as in pixel_distributions.py, its kind as below, and a line in LIKELIHOODS. N images,
C, H, W image.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Protocol

from torch import Tensor, nn

from vae_dist.config import ObjectiveConfig
from vae_dist.errors import UserError
from vae_dist.models.discretized import DiscretizedLogisticMixture, outputs_per_component
from vae_dist.models.pixel_distributions import Bernoulli, Gaussian, Laplace, Number
from vae_dist.models.scales import SCALES
from vae_dist.models.tensors import Shape


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
    has_scale: bool = False  # whether it depends on objective.sigma
    takes_binary: bool = True  # whether images may be binarised

    @property
    def description(self) -> str:
        """The name with the options, as an evaluation states them."""
        return self.name

    def output_shape(self, image_shape: Shape) -> Shape:
        """The shape of a decoder's output for one image `(C, H, W)`."""
        return image_shape

    @abstractmethod
    def forward(self, output: Tensor) -> Likelihood:
        """The likelihood of N images from a decoder's output `(N, *output_shape)`."""

    @abstractmethod
    def is_probability(self, binarization: str) -> bool:
        """Return whether images get a probability, as opposed to a density or a loss: `DataConfig.binarization`."""

    @abstractmethod
    def caution(self, binarization: str, dataset: str) -> str | None:
        """Return why values on a data set can't be compared with published likelihoods; None if they can."""


class BernoulliPixels(LikelihoodKind):
    """A Bernoulli of each pixel. It accepts grey pixels in [0, 1], but is not their probability."""

    name = "bernoulli"

    def __init__(self, config: ObjectiveConfig) -> None:
        super().__init__()

    def forward(self, output: Tensor) -> Bernoulli:
        return Bernoulli(output)

    def is_probability(self, binarization: str) -> bool:
        return binarization != "none"

    def caution(self, binarization: str, dataset: str) -> str | None:
        if binarization != "none":
            return None
        return (
            "a Bernoulli of pixels that are not binary is not a likelihood: compare these numbers with others on the "
            f"same pixels of {dataset}, not with papers on binarised images (for those, train on grey images with "
            "data.binarize=dynamic)"
        )


class LocationScaleKind(LikelihoodKind):
    """Independent pixel values of a location-scale family: the decoder gives locations, and all share one scale.

    The scale is fixed, learned, or the optimum of each batch: `objective.sigma_kind`.
    """

    has_scale = True
    error_order: int | None = None  # the optimal scale is this root of the mean error; None without closed form

    def __init__(self, config: ObjectiveConfig) -> None:
        super().__init__()
        self.scale = SCALES[config.sigma_kind](config)

    @abstractmethod
    def distribution(self, location: Tensor, sigma: Number) -> Likelihood:
        """The likelihood of N images from locations `(N, C, H, W)` and the scale."""

    @property
    def description(self) -> str:
        return f"{self.name}, {self.scale.description}"

    def forward(self, output: Tensor) -> Likelihood:
        return self.distribution(output, self.scale(math.prod(output.shape[1:])))

    def is_probability(self, binarization: str) -> bool:
        return False

    def caution(self, binarization: str, dataset: str) -> str | None:
        size, others = "of which sigma decides the size", "the same sigma"
        if self.scale.is_fitted:
            size, others = "whose sigma was fitted", "a fitted sigma"
        return (
            f"a {self.name.capitalize()} of pixels is a density, {size}: compare these numbers with others of "
            f"{others} on the same pixels, not with probabilities of images"
        )


class GaussianPixels(LocationScaleKind):
    """A Gaussian of each pixel with the standard deviation `objective.sigma`."""

    name = "gaussian"
    error_order = 2

    def distribution(self, location: Tensor, sigma: Number) -> Gaussian:
        return Gaussian(location, sigma)


class LaplacePixels(LocationScaleKind):
    """A Laplace distribution of each pixel with the scale `objective.sigma`."""

    name = "laplace"
    error_order = 1

    def distribution(self, location: Tensor, sigma: Number) -> Laplace:
        return Laplace(location, sigma)


class DiscretizedLogisticMixturePixels(LikelihoodKind):
    """A mixture of `objective.mixtures` discretised logistics of each pixel: the probability of its 8-bit values."""

    name = "discretized_logistic_mixture"
    takes_binary = False

    def __init__(self, config: ObjectiveConfig) -> None:
        super().__init__()
        self._components = config.mixtures

    @property
    def description(self) -> str:
        return f"{self.name}, {self._components} components"

    def output_shape(self, image_shape: Shape) -> Shape:
        channels, *size = image_shape
        return (self._components * outputs_per_component(channels), *size)

    def forward(self, output: Tensor) -> DiscretizedLogisticMixture:
        return DiscretizedLogisticMixture.from_network(output, self._components)

    def is_probability(self, binarization: str) -> bool:
        return binarization == "none"

    def caution(self, binarization: str, dataset: str) -> str | None:
        return None


# Name in a config -> the kind of p(x|z) with the config's options.
LIKELIHOODS: dict[str, Callable[[ObjectiveConfig], LikelihoodKind]] = {
    "bernoulli": BernoulliPixels,
    "gaussian": GaussianPixels,
    "laplace": LaplacePixels,
    DiscretizedLogisticMixturePixels.name: DiscretizedLogisticMixturePixels,
}


def likelihood_kind(config: ObjectiveConfig) -> LikelihoodKind:
    """Return the kind of likelihood that a config names (`objective.reconstruction`). It must be a known one.

    Raises UserError if it has no scale that `objective.sigma_kind` could fit.
    """
    kind = LIKELIHOODS[config.reconstruction](config)
    wish = f"objective.sigma_kind={config.sigma_kind}"
    if config.sigma_kind != "fixed" and not isinstance(kind, LocationScaleKind):
        raise UserError(
            f"{wish} needs a likelihood with a scale to fit, and {config.reconstruction} has none: use "
            "objective.reconstruction=gaussian or laplace, or leave out objective.sigma_kind"
        )
    if config.sigma_kind == "optimal" and getattr(kind, "error_order", None) is None:
        raise UserError(
            f"{wish} needs a closed form that {config.reconstruction} lacks: use objective.sigma_kind=learned"
        )
    return kind
