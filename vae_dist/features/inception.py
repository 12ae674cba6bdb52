"""The Inception v3 of FID, from its TensorFlow graph of 2015-12-05 (Heusel et al. 2017). B images, H, W pixels.

It is torchvision's with the pools of that graph, which pytorch-fid, torch-fidelity and torchmetrics have too. Importing
this module takes seconds.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import inception

from vae_dist.models.tensors import ShapeError

FEATURES = 2048
SIDE = 299


class FIDInception(nn.Module):
    """The features of FID. Its weights come from a file: see `vae_dist.features.files`.

    It is always in evaluation mode and computes in float32, whatever autocast says around it. No weight takes a
    gradient.
    """

    def __init__(self) -> None:
        super().__init__()
        blocks = [inception.BasicConv2d, _A, inception.InceptionB, _C, inception.InceptionD, _E, inception.InceptionAux]
        net = inception.Inception3(num_classes=1, aux_logits=False, init_weights=False, inception_blocks=blocks)
        net.Mixed_7c = _LastE(FEATURES)
        net.fc = nn.Identity()
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.num_batches_tracked = None  # which only training uses
        self.net: nn.Module = net
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "FIDInception":
        """Stay in evaluation mode."""
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        """Return the features of colour images `(B, 3, H, W)`, uint8: `(B, 2048)`. Raises ShapeError for others."""
        if images.ndim != 4 or images.shape[1] != 3 or images.dtype != torch.uint8:
            raise ShapeError(f"Inception takes uint8 images (B, 3, H, W), not {images.dtype} {tuple(images.shape)}")
        with torch.autocast(images.device.type, enabled=False):
            features: Tensor = self.net((resized(images.float()) - 128) / 128)
            return features


def resized(images: Tensor) -> Tensor:
    """Resize images `(B, 3, H, W)` to 299x299 as TensorFlow 1 does: bilinear, corner pixels aligned at the top left.

    torch-fidelity does the same. torchmetrics' FID smooths images that it makes smaller; pytorch-fid aligns the centres
    of pixels. Features of the three differ.
    """
    for axis in (2, 3):
        # TensorFlow computes the positions in float32.
        scale = torch.tensor(images.shape[axis], dtype=torch.float32) / SIDE
        position = (torch.arange(SIDE, dtype=torch.float32) * scale).to(images.device)
        low = position.long()
        high = (low + 1).clamp(max=images.shape[axis] - 1)
        weight = (position - low).view(-1, 1) if axis == 2 else position - low
        first, second = images.index_select(axis, low), images.index_select(axis, high)
        images = first + (second - first) * weight
    return images


class _A(inception.InceptionA):
    def _forward(self, x: Tensor) -> list[Tensor]:
        return _with_pool(self, super()._forward(x), _average(x))


class _C(inception.InceptionC):
    def _forward(self, x: Tensor) -> list[Tensor]:
        return _with_pool(self, super()._forward(x), _average(x))


class _E(inception.InceptionE):
    def _forward(self, x: Tensor) -> list[Tensor]:
        return _with_pool(self, super()._forward(x), _average(x))


class _LastE(inception.InceptionE):
    def _forward(self, x: Tensor) -> list[Tensor]:
        return _with_pool(self, super()._forward(x), functional.max_pool2d(x, 3, stride=1, padding=1))


def _average(x: Tensor) -> Tensor:
    """Average 3x3 pixels, at the borders those within the image alone."""
    return functional.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def _with_pool(block: Any, branches: list[Tensor], pooled: Tensor) -> list[Tensor]:
    """Return a block's branches with another pool before its last one."""
    return [*branches[:-1], block.branch_pool(pooled)]
