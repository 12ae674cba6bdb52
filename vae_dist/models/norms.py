"""GroupNorm of 16-bit activations with statistics in fp32."""

from typing import Any

import torch
from torch import Tensor, nn

from vae_dist.models.blocks import norm_groups


class GroupNorm(nn.GroupNorm):
    """torch's GroupNorm of activations `(B, c, h, w)`, which keeps 16-bit ones in their type on a GPU too.

    On a GPU autocast computes it in fp32 and returns fp32, so that its input and its output are kept for the backward
    pass in four bytes a number. torch's own kernel for 16 bits rounds mean and deviation to 16 bits for the backward
    pass, and needs weights of 16 bits. On a CPU autocast leaves the activations in 16 bits, and the kernel computes in
    fp32.
    """

    def forward(self, input: Tensor) -> Tensor:
        if input.dtype not in (torch.bfloat16, torch.float16) or input.device.type == "cpu":
            return super().forward(input)
        output: Tensor = Keep16Bits.apply(input, self.weight, self.bias, self.num_groups, self.eps)[0]
        return output


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
