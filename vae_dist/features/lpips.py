"""LPIPS, the distance of two images in the features of VGG16 (Zhang et al. 2018). B images, H, W pixels, C channels."""

import torch
from torch import Tensor, nn

from vae_dist.config import FirstStageConfig
from vae_dist.errors import UserError
from vae_dist.models.tensors import Shape, ShapeError

LEAST_PIXELS = 16  # of height and width, which the network halves four times

_AFTER_RELU = (3, 8, 15, 22, 29)  # of torchvision's layers: relu1_2, relu2_2, relu3_3, relu4_3, relu5_3
_CHANNELS = (64, 128, 256, 512, 512)
_EPSILON = 1e-10  # of squared lengths: inside the root, where a feature of zeros has a finite gradient
_TOLERANCE = 1e-3  # of the range of images


class LPIPS(nn.Module):
    """The published LPIPS on VGG16, version 0.1. Its weights come from a file: see `vae_dist.features.files`.

    It is always in evaluation mode and computes in the type of its weights, float32, whatever autocast says around it.
    No weight takes a gradient. Gradients flow to both images.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        from torchvision.models import vgg16  # takes seconds

        with torch.device("meta"):  # its classifier, which is not needed, has 124 million weights
            layers = vgg16(weights=None, init_weights=False).features[: _AFTER_RELU[-1] + 1]
        self.vgg: nn.Sequential = layers.to_empty(device=torch.empty(0).device)
        self.heads = nn.ParameterList([nn.Parameter(torch.empty(channels)) for channels in _CHANNELS])
        # The mean and deviation of ImageNet's colours, for images in [-1, 1]; made on the CPU under `meta` too.
        for name, values in {"shift": (-0.030, -0.088, -0.188), "scale": (0.458, 0.448, 0.450)}.items():
            self.register_buffer(name, torch.tensor(values, device="cpu").view(3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "LPIPS":
        """Stay in evaluation mode."""
        return super().train(False)

    def forward(self, reconstructions: Tensor, images: Tensor) -> Tensor:
        """Return the LPIPS of each pair of images `(B, 3, H, W)` in [-1, 1], H and W at least 16: `(B,)`.

        The reconstructions are not clamped, as a clamp would take their gradient, and may leave that range. The images
        may not. This is checked on a CPU, outside of compiled code; elsewhere it would stop the device.

        Raises ShapeError for other shapes, types and ranges.
        """
        require_images(reconstructions, images)
        with torch.autocast(images.device.type, enabled=False):
            features = zip(self._features(reconstructions), self._features(images), self.heads, strict=True)
            # The mean over pixels comes before the weighted sum over channels: both are linear.
            distances = [(first - second).square().mean((2, 3)) @ head for first, second, head in features]
            return torch.stack(distances).sum(0)

    def _features(self, images: Tensor) -> list[Tensor]:
        """Return the features `(B, C, h, w)` of five layers, each pixel's divided by its length."""
        values = (images.to(self.shift.dtype) - self.shift) / self.scale
        features = []
        for index, layer in enumerate(self.vgg):
            values = layer(values)
            if index in _AFTER_RELU:
                features.append(values / (values.square().sum(1, keepdim=True) + _EPSILON).sqrt())
        return features


def check_size(options: FirstStageConfig, image_shape: Shape) -> None:
    """Raise UserError for images `(C, H, W)` that the config's LPIPS, if it has one, can't take."""
    if options.perceptual_weight and min(image_shape[1:]) < LEAST_PIXELS:
        raise UserError(
            f"first_stage.perceptual_weight is for images of at least {LEAST_PIXELS} x {LEAST_PIXELS}, and these are "
            f"{image_shape[1]} x {image_shape[2]}: use larger ones, or leave it out"
        )


def require_images(reconstructions: Tensor, images: Tensor) -> None:
    """Raise ShapeError unless these are pairs of images that LPIPS takes."""
    shape = tuple(images.shape)
    if tuple(reconstructions.shape) != shape:
        raise ShapeError(f"LPIPS compares images of one shape, not {tuple(reconstructions.shape)} with {shape}")
    if len(shape) != 4 or shape[1] != 3 or min(shape[2:]) < LEAST_PIXELS:
        raise ShapeError(f"LPIPS takes images (B, 3, H, W) of at least {LEAST_PIXELS}x{LEAST_PIXELS}, not {shape}")
    if not (reconstructions.is_floating_point() and images.is_floating_point()):
        raise ShapeError(f"LPIPS takes floating-point images in [-1, 1], not {images.dtype}")
    if images.device.type == "cpu" and not torch.compiler.is_compiling() and images.numel():
        largest = images.detach().abs().amax().item()
        if largest > 1 + _TOLERANCE:
            raise ShapeError(f"LPIPS takes images in [-1, 1], not with values up to {largest:.3g}")
