"""The one scale of a likelihood's pixel values, by `objective.sigma_kind`: fixed, learned, or each batch's optimum."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from vae_dist.config import SIGMA_FLOOR, ObjectiveConfig
from vae_dist.models.pixel_distributions import Number


class Scale(nn.Module, ABC):
    """A positive number in the unit of pixels, which lie in [0, 1]."""

    is_fitted: bool = True  # by the training, as opposed to chosen
    words: str = "sigma"

    @abstractmethod
    def forward(self, numbers: int) -> Number:
        """The scale `()` of images with that many pixel values."""

    @property
    def description(self) -> str:
        """The kind and the value, as an evaluation states them. Reads a tensor's value, which waits for its device."""
        return f"{self.words} {float(self(1)):.3g}"


class FixedScale(Scale):
    """`objective.sigma`."""

    is_fitted = False

    def __init__(self, config: ObjectiveConfig) -> None:
        super().__init__()
        self._sigma = _start(config)

    def forward(self, numbers: int) -> float:
        return self._sigma

    @property
    def description(self) -> str:
        return f"{self.words} {self._sigma}"


class LearnedScale(Scale):
    """sigma = floor + (start - floor) exp(rate parameter), where `objective.sigma` is the start.

    The parameter is learned with the networks. Adam's updates are about as long as the learning rate, whatever the size
    of a gradient: the logarithm of sigma moves `objective.sigma_rate` times as far in a step as a weight does.
    """

    words = "learned sigma"

    def __init__(self, config: ObjectiveConfig) -> None:
        super().__init__()
        self._span = _start(config) - SIGMA_FLOOR
        self._rate = config.sigma_rate
        self.parameter = nn.Parameter(torch.zeros(()))

    def forward(self, numbers: int) -> Tensor:
        # The gradient by log sigma sums over all pixel values of an image. Multiplied by the rate it would dominate
        # the norm over all gradients, and clipping would then shorten every update of the networks. Adam does not
        # depend on its size: this part of the parameter makes it a mean over the pixel values.
        part = self.parameter / (self._rate * numbers)
        parameter = part + (self.parameter - part).detach()
        return SIGMA_FLOOR + self._span * (self._rate * parameter).exp()

    @staticmethod
    def of_a_mean(sigma: Tensor, numbers: int) -> Tensor:
        """The same sigma for a loss that is a mean over that many pixel values: `forward` is for their sum."""
        return sigma.detach() + numbers * (sigma - sigma.detach())


class OptimalScale(Scale):
    """In training the most likely sigma of each batch, given its reconstructions; elsewhere a moving average of it.

    Of Rybkin, Daniilidis and Levine (2021), section 4. `sigma` holds the average, which the training updates.
    """

    words = "optimal sigma"
    sigma: Tensor

    def __init__(self, config: ObjectiveConfig) -> None:
        super().__init__()
        self.register_buffer("sigma", torch.tensor(_start(config)))

    def forward(self, numbers: int) -> Tensor:
        return self.sigma


# objective.sigma_kind -> the scale with the config's options.
SCALES: dict[str, type[FixedScale] | type[LearnedScale] | type[OptimalScale]] = {
    "fixed": FixedScale,
    "learned": LearnedScale,
    "optimal": OptimalScale,
}


def _start(config: ObjectiveConfig) -> float:
    return 1.0 if config.sigma is None else config.sigma
