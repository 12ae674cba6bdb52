"""Layers of convolutional networks: residual blocks, normalisation, initial weights.

B batch, c channels, h, w height and width at a resolution.
"""

from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vae_dist.models.norms import group_norm
from vae_dist.models.tensors import traced_on_gpu

FIRST_CONVOLUTION = 2  # of a residual block, among its layers
OUTPUT_SCALE = 0.1  # of the last layers' initial weights

Layer = TypeVar("Layer", bound=nn.Module)


class Network(nn.Sequential):
    """Layers in a row, whose residual blocks also take the embedded labels, if any.

    With `recomputes` the backward pass computes the activations inside a residual block, and of the layers between it
    and the block before, a second time instead of keeping them (Chen et al. 2016). Neither output nor gradients change.
    The layers after the last block are computed once, unless the network `is_inner`: of the whole model's last ones the
    backward pass needs the activations first.
    """

    recomputes = False
    is_inner = False

    def forward(self, input: Tensor, embedded: Tensor | None = None) -> Tensor:
        layers: list[nn.Module] = []
        for layer in self:
            layers.append(layer)
            if isinstance(layer, ResidualBlock):
                input = self._segment(layers, input, embedded)
                layers = []
        return self._segment(layers, input, embedded) if self.is_inner else _run(layers, input, embedded)

    def _segment(self, layers: list[nn.Module], input: Tensor, embedded: Tensor | None) -> Tensor:
        run = partial(_run, layers)
        if self.recomputes and torch.is_grad_enabled():  # no layer draws random numbers
            run = partial(checkpoint, run, use_reentrant=False, preserve_rng_state=False)
        output: Tensor = run(input, embedded)
        return output


def _run(layers: list[nn.Module], input: Tensor, embedded: Tensor | None) -> Tensor:
    for layer in layers:
        input = layer(input, embedded) if isinstance(layer, ResidualBlock) else layer(input)
    return input


class ResidualBlock(nn.Module):
    """Adds to its input `(B, c, h, w)` what two convolutions make of it, activated before each (He et al. 2016).

    Where the channels change, a 1x1 convolution maps the input. Embedded labels `(B, label)` are added to the channels
    between the convolutions, as time steps are in Ho et al. (2020).
    """

    def __init__(self, inputs: int, outputs: int, scale: float, label: int = 0) -> None:
        """`scale` is that of the last convolution's initial weights."""
        super().__init__()
        self.branch = nn.Sequential(
            group_norm(inputs), nn.SiLU(), convolution(inputs, outputs),
            group_norm(outputs), nn.SiLU(), scaled(convolution(outputs, outputs), scale),
        )  # fmt: skip
        self.label = nn.Linear(label, outputs) if label else None
        self.shortcut = nn.Conv2d(inputs, outputs, kernel_size=1) if inputs != outputs else None

    def forward(self, x: Tensor, embedded: Tensor | None = None) -> Tensor:
        branch = x
        for index, layer in enumerate(self.branch):
            branch = layer(branch)
            if index == FIRST_CONVOLUTION and self.label is not None:
                branch = branch + self.label(embedded)[:, :, None, None]
        return (x if self.shortcut is None else self.shortcut(x)) + branch


def residual_blocks(channels: int, count: int, scale: float, label: int) -> list[nn.Module]:
    """Return the residual blocks of one resolution, whose channels do not change."""
    return [ResidualBlock(channels, channels, scale, label) for _ in range(count)]


def branch_scale(branches: int) -> float:
    """Return the scale of the initial weights of a network's branches, which are added to what they branch from.

    It is one over the root of their number: the variance of their sum does not grow with the depth (Child 2021).
    """
    return float(branches**-0.5)


def output_layers(channels: int, outputs: int) -> list[nn.Module]:
    """Return the last layers, whose output starts near 0: a posterior near the prior, pixels near grey."""
    return [group_norm(channels), nn.SiLU(), scaled(convolution(channels, outputs), OUTPUT_SCALE)]


class Upsample(nn.Module):
    """Repeats each pixel in a square: `(B, c, h, w)` to `(B, c, 2 h, 2 w)`."""

    def forward(self, x: Tensor) -> Tensor:
        return repeated(x) if traced_on_gpu(x) else nn.functional.interpolate(x, scale_factor=2.0, mode="nearest")


def repeated(x: Tensor) -> Tensor:
    """Repeat each pixel by a broadcast, whose backward pass is a sum.

    A compiler makes of interpolate's one an addition by indices, which took 30% of a step of kl-f8.
    """
    count, channels, height, width = x.shape
    rows = x.permute(0, 2, 3, 1)[:, :, None, :, None].expand(-1, -1, 2, -1, 2, -1)
    return rows.reshape(count, 2 * height, 2 * width, channels).permute(0, 3, 1, 2)


def convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel_size=3, stride=stride, padding=1)


@torch.no_grad()
def scaled(layer: Layer, scale: float) -> Layer:
    """Multiply a layer's weights and biases in place."""
    for parameter in layer.parameters():
        parameter.mul_(scale)
    return layer
