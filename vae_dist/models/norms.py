"""GroupNorm of 16-bit activations with statistics in fp32."""

from typing import Any

import torch
from torch import Tensor, nn

from vae_dist.models.tensors import at_least_float32, in_gpu_order, traced_on_gpu

MOST_GROUPS = 8
LEAST_CHANNELS = 4  # of a group: alone, a channel would lose its mean


class GroupNorm(nn.GroupNorm):
    """torch's GroupNorm of activations `(B, c, ...)`, which keeps 16-bit ones in their type on a GPU too.

    On a GPU autocast computes it in fp32 and returns fp32, so that its input and its output are kept for the backward
    pass in four bytes a number. torch's own kernel for 16 bits rounds mean and deviation to 16 bits for the backward
    pass, and needs weights of 16 bits. On a CPU autocast leaves the activations in 16 bits, and the kernel computes in
    fp32.
    """

    def forward(self, input: Tensor) -> Tensor:
        if traced_on_gpu(input):
            return traced(input, self.weight, self.bias, self.num_groups, self.eps)
        if input.dtype not in (torch.bfloat16, torch.float16) or input.device.type == "cpu":
            # nn.GroupNorm refuses one image whose groups have one value each, but not several: this has no such check.
            return torch.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)
        output: Tensor = Keep16Bits.apply(input, self.weight, self.bias, self.num_groups, self.eps)[0]
        return output


def traced(input: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    """GroupNorm of activations `(B, c, ...)` in single operations, which a compiler fuses with their neighbours.

    Moments are of each channel first, whose values lie in rows in either order of memory, and then of a group, by the
    rule for the variance of a union (Chan, Golub and LeVeque 1983). They are in float32 at least.
    """
    values, pixels = at_least_float32(input), tuple(range(2, input.ndim))
    variances, means = torch.var_mean(values, pixels, correction=0)
    means_of_group, variances_of_channel = means.unflatten(1, (groups, -1)), variances.unflatten(1, (groups, -1))
    each = *input.shape[:2], *(1 for _ in pixels)
    mean = means_of_group.mean(2, keepdim=True)
    variance = (variances_of_channel + (means_of_group - mean).square()).mean(2, keepdim=True)
    reciprocal = torch.rsqrt(variance + eps)
    slope = reciprocal * weight.unflatten(0, (groups, -1))
    offset = bias.unflatten(0, (groups, -1)) - mean * slope
    output = values * slope.view(each) + offset.view(each)
    return in_gpu_order(output.to(input.dtype))


class Keep16Bits(torch.autograd.Function):
    """GroupNorm of a 16-bit tensor, computed in fp32: keeps the input in 16 bits, and mean and deviation in fp32."""

    @staticmethod
    def forward(input: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        output, mean, reciprocal = torch.native_group_norm(
            input.float().contiguous(), weight, bias, *_sizes(input), groups, eps
        )
        return output.to(input.dtype), mean, reciprocal

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        input, weight, _, ctx.groups, _ = inputs
        _, mean, reciprocal = output
        ctx.mark_non_differentiable(mean, reciprocal)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, weight, mean, reciprocal)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        gradient = gradients[0]
        input, weight, mean, reciprocal = ctx.saved_tensors
        assert gradient is not None
        of_input, of_weight, of_bias = torch.ops.aten.native_group_norm_backward(
            gradient.float().contiguous(), input.float().contiguous(), mean, reciprocal, weight, *_sizes(input),
            ctx.groups, [True] * 3,
        )  # fmt: skip
        return of_input.to(input.dtype), of_weight, of_bias, None, None


def _sizes(input: Tensor) -> tuple[int, int, int]:
    """Return the numbers of images, of channels and of pixels."""
    images, channels = input.shape[:2]
    return images, channels, input.shape[2:].numel()


def group_norm(channels: int) -> GroupNorm:
    """Return GroupNorm (Wu and He 2018), which normalises each image for itself."""
    return GroupNorm(norm_groups(channels), channels)


def norm_groups(channels: int) -> int:
    """Return the number of groups: the largest divisor of the channels within the limits above."""
    most = min(MOST_GROUPS, max(channels // LEAST_CHANNELS, 1))
    return max(groups for groups in range(1, most + 1) if channels % groups == 0)


def with_own_norms(network: nn.Module) -> nn.Module:
    """Replace each of torch's GroupNorms in a network, in place, by the one above with the same weights."""
    for module in network.modules():
        for name, norm in module.named_children():
            if type(norm) is nn.GroupNorm:
                own = GroupNorm(norm.num_groups, norm.num_channels, norm.eps, device="meta")
                own.weight, own.bias = norm.weight, norm.bias
                setattr(module, name, own)
    return network
