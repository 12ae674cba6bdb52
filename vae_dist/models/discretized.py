"""The probability of 8-bit pixels: a mixture of discretised logistics (Salimans et al. 2017, "PixelCNN++").

Numbers are in levels from middle grey: 0 is -127.5, 255 is 127.5. N images, C, H, W image, K components.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vae_dist.models.tensors import at_least_float32, require_shape, running_sums

MIDDLE = 127.5
START_SCALE = 40.0  # of an output of 0: all levels alike then cost 8.3 bits, black and white 4.6, middle grey 7.3
LOG_SCALE_BOUND = 6.0  # scales are 0.1 to 16,000 levels; the paper's least one is 0.12
_FAR = 1e30  # levels: the outer edge of black and of white


def outputs_per_component(channels: int) -> int:
    """The numbers of a component per pixel: weight, and of each channel mean, scale, a number per channel before it."""
    return (channels + 1) * (channels + 2) // 2


class DiscretizedLogisticMixture(NamedTuple):
    """A mixture of logistics, cut into the 256 levels of a pixel. Black and white take the tails.

    The component is that of a pixel, for all its channels. The mean of a channel's logistic depends linearly on the
    levels of the channels before it: green on red, blue on both.
    """

    logits: Tensor  # (N, K, H, W), of the components
    location: Tensor  # (N, C, K, H, W)
    log_scale: Tensor  # (N, C, K, H, W)
    coefficients: Tensor  # (N, C (C - 1) / 2, K, H, W), in (-1, 1): of the channels before the second one, the third ..

    @classmethod
    def from_network(cls, output: Tensor, components: int) -> "DiscretizedLogisticMixture":
        """Split a decoder's output `(N, K outputs_per_component(C), H, W)`."""
        parts = at_least_float32(output).unflatten(1, (-1, components))
        channels = (math.isqrt(8 * parts.shape[1] + 1) - 3) // 2
        sizes = [1, channels, channels, channels * (channels - 1) // 2]
        logits, location, log_scale, coefficients = parts.split(sizes, dim=1)
        bounded = LOG_SCALE_BOUND * torch.tanh(log_scale / LOG_SCALE_BOUND)
        return cls(logits[:, 0], MIDDLE * location, math.log(START_SCALE) + bounded, coefficients.tanh())

    def log_prob(self, images: Tensor) -> Tensor:
        """log p(x|z) of images `(N, C, H, W)` in [0, 1], as 8-bit values: `(N,)`, nats. Images get no gradient."""
        require_shape(images, self._image_shape(), "images")
        levels = (images.to(self.logits.dtype) * 255).round().clamp(0, 255) - MIDDLE
        low = torch.where(levels == -MIDDLE, -_FAR, levels - 0.5).unsqueeze(2).unbind(1)
        high = torch.where(levels == MIDDLE, _FAR, levels + 0.5).unsqueeze(2).unbind(1)
        before = levels.unsqueeze(2).unbind(1)
        total = self.logits.log_softmax(1)
        for channel, own_low, own_high in zip(self._channels(), low, high, strict=True):
            total = total + _log_mass(own_low, own_high, channel.location_after(before), channel.log_scale)
        return total.logsumexp(1).flatten(1).sum(1)

    @property
    def mean(self) -> Tensor:
        """The mean of the first channel, and of each other one given the means of those before it."""
        means: list[Tensor] = []  # (N, K, H, W)
        for channel in self._channels():
            means.append(_clipped_mean(channel.location_after(means), channel.log_scale.exp()))
        weights = self.logits.softmax(1)
        mixed = torch.stack([(weights * mean).sum(1) for mean in means], dim=1)
        return ((mixed + MIDDLE) / 255).clamp(0, 1)

    def sample(self, noise: Tensor) -> Tensor:
        """Draw 8-bit pixels. The first channel's noise chooses the component too: its probability has that to spare."""
        require_shape(noise, self._image_shape(), "noise")
        noise, weights = noise.to(self.logits.dtype), self.logits.softmax(1)
        ends, rounding = running_sums(weights, 1), torch.finfo(weights.dtype).eps
        uniform = torch.special.ndtr(noise[:, :1]).clamp(max=1 - rounding) * ends[:, -1:]
        chosen = (uniform >= ends).sum(1, keepdim=True)
        weight = weights.gather(1, chosen)
        rest = (uniform - ends.gather(1, chosen) + weight) / weight  # uniform too
        first = torch.logit(rest, eps=rounding)
        quantiles = [first, *(torch.special.log_ndtr(noise) - torch.special.log_ndtr(-noise)).split(1, dim=1)[1:]]
        parameters = (part.take_along_dim(chosen.unsqueeze(1), 2) for part in self[1:])
        component = DiscretizedLogisticMixture(self.logits, *parameters)
        drawn: list[Tensor] = []  # (N, 1, H, W)
        for channel, quantile in zip(component._channels(), quantiles, strict=True):
            value = channel.location_after(drawn) + channel.log_scale.exp() * quantile
            drawn.append((value + MIDDLE).round().clamp(0, 255) - MIDDLE)
        return (torch.cat(drawn, dim=1) + MIDDLE) / 255

    # A method, and no property: torch 2.10 can't compile a NamedTuple's.
    def _image_shape(self) -> tuple[int, ...]:
        count, channels, _, *size = self.location.shape
        return (count, channels, *size)

    def _channels(self) -> "Iterator[_Channel]":
        # torch.export can't load an unbind of nothing.
        numbers = [self.coefficients[:, number] for number in range(self.coefficients.shape[1])]
        coefficients = (numbers[i * (i - 1) // 2 : i * (i + 1) // 2] for i in range(self.location.shape[1]))
        return map(_Channel, self.location.unbind(1), self.log_scale.unbind(1), coefficients)


class _Channel(NamedTuple):
    """The logistics of a channel, all `(N, K, H, W)`."""

    location: Tensor
    log_scale: Tensor
    coefficients: Sequence[Tensor]  # of the channels before it

    def location_after(self, before: Sequence[Tensor]) -> Tensor:
        """The means given levels `(N, K or 1, H, W)` of the channels before it; levels of later ones don't count."""
        return sum((c * levels for c, levels in zip(self.coefficients, before, strict=False)), self.location)


def _log_mass(low: Tensor, high: Tensor, location: Tensor, log_scale: Tensor) -> Tensor:
    """The logarithm of a logistic's probability between two edges.

    The difference of its distribution function s is s(b) - s(a) = s(b) s(-a) (1 - exp(-w)), where w = b - a is computed
    from the bin's width: no factor cancels at any distance. Here log s(b) = min(b, 0) - log(1 + exp(-|b|)), and
    1 - exp(-w) = 2 t / (1 + t) with t = tanh(w / 2). One logarithm serves all; log1p and expm1 are slow on a CPU.
    """
    inverse = torch.exp(-log_scale)
    b, minus_a, t = (high - location) * inverse, (location - low) * inverse, (0.5 * (high - low) * inverse).tanh()
    zero = b.new_zeros(())
    factors = 2 * t / ((1 + t) * (1 + torch.exp(-b.abs())) * (1 + torch.exp(-minus_a.abs())))
    return torch.minimum(b, zero) + torch.minimum(minus_a, zero) + factors.log()


def _clipped_mean(location: Tensor, scale: Tensor) -> Tensor:
    """The mean of a logistic whose tails beyond black and white are moved there: the integral of its tails.

    It differs from that of the 256 levels by at most half a level, and by 0.01 levels for scales of at least 1.
    """
    distance = location.abs()
    beyond = F.softplus((MIDDLE - distance) / scale) - F.softplus((-MIDDLE - distance) / scale)
    return location.sign() * (MIDDLE - scale * beyond)
