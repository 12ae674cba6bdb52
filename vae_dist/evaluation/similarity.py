"""How alike a reconstruction and its image look: PSNR, SSIM, LPIPS, features of FID.

All see what a picture file would hold: values rounded to 8 bits. n images, C, H, W image, white is 1.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from vae_dist.features.lpips import LPIPS

MOST_DECIBELS = 100.0  # of an image: without an error its PSNR would be infinite
PSNR_PROTOCOL = f"values rounded to 8 bits, of each image by itself, at most {MOST_DECIBELS:g} dB"
WINDOW = 11  # pixels on a side; smaller images have no SSIM
DEVIATION = 1.5
VALUES_AT_ONCE = 2**20  # of images in one call, to bound memory; part of the protocol's last digits
IMAGES_AT_ONCE = 32  # of 299x299 pixels, whatever size they had
SSIM_PROTOCOL = (
    f"values rounded to 8 bits, {WINDOW}x{WINDOW} Gaussian window of deviation {DEVIATION} inside the image, K1 0.01, "
    "K2 0.03, range 1, mean over channels"
)


def names(image_shape: tuple[int, ...], lpips: LPIPS | None) -> list[str]:
    """Return the metrics of images of a shape (C, H, W): `psnr`, `ssim` unless they are too small, `lpips` if given."""
    return ["psnr", *(["ssim"] if min(image_shape[1:]) >= WINDOW else []), *(["lpips"] if lpips is not None else [])]


def compare(reconstructions: Tensor, images: Tensor, names: Sequence[str], lpips: LPIPS | None) -> Tensor:
    """Return these metrics of each pair of images `(n, C, H, W)`: `(n, len(names))` float64, on the CPU."""
    columns = [psnr(reconstructions, images).unsqueeze(1)]
    if "ssim" in names:
        columns.append(ssim(reconstructions, images).unsqueeze(1))
    if lpips is not None:
        columns.append(perceptual_distance(lpips, reconstructions, images).unsqueeze(1))
    return torch.cat(columns, 1)


def psnr(reconstructions: Tensor, images: Tensor) -> Tensor:
    """Return the PSNR of each pair of images `(n, C, H, W)`: `(n,)` float64, dB, on the CPU."""

    def squares(*pair: Tensor) -> Tensor:
        one, other = pair
        return (one - other).square().flatten(1).sum(1, dtype=torch.int64)  # exact

    errors = _in_parts(squares, reconstructions, images) / (255**2 * images[0].numel())
    return (-10 * errors.log10()).clamp(max=MOST_DECIBELS)


def ssim(reconstructions: Tensor, images: Tensor) -> Tensor:
    """Return the SSIM of each pair of images `(n, C, H, W)`, H and W at least WINDOW: `(n,)` float64, on the CPU.

    As Wang et al. 2004 define it, equation 13, with the window of their section III-C where it lies wholly within the
    image, averaged over positions and channels.
    """
    return _in_parts(_ssim, reconstructions, images)


def perceptual_distance(network: LPIPS, reconstructions: Tensor, images: Tensor) -> Tensor:
    """Return the LPIPS of each pair of images `(n, C, H, W)`, C 1 or 3: `(n,)` float64, on the CPU."""

    def compare(*pair: Tensor) -> Tensor:
        distances: Tensor = network(*(steps.expand(-1, 3, -1, -1).float() / 127.5 - 1 for steps in pair))
        return distances

    return _in_parts(compare, reconstructions, images)


def features(inception: nn.Module, images: Tensor) -> Tensor:
    """Return the features of images `(n, C, H, W)`, C 1 or 3, as 8-bit values: `(n, 2048)` float32, on the CPU."""
    parts = [_rounded(part).to(torch.uint8).expand(-1, 3, -1, -1) for part in images.split(IMAGES_AT_ONCE)]
    return torch.cat([inception(part).cpu() for part in parts])


def _in_parts(compare: Callable[[Tensor, Tensor], Tensor], reconstructions: Tensor, images: Tensor) -> Tensor:
    """Compare pairs of images as 8-bit values, some at a time. The parts depend on the images' shape alone."""
    at_once = max(VALUES_AT_ONCE // images[0].numel(), 1)
    parts = [
        compare(_rounded(one), _rounded(other))
        for one, other in zip(reconstructions.split(at_once), images.split(at_once), strict=True)
    ]
    return torch.cat([part.cpu().double() for part in parts])


def _rounded(values: Tensor) -> Tensor:
    """Round to 8 bits: 0 to 255. Truncation would darken images by half a step, and change values that are exact."""
    return (values.clamp(0, 1) * 255).round()


def _ssim(reconstructions: Tensor, images: Tensor) -> Tensor:
    if images.device.type == "mps":  # which has no float64
        reconstructions, images = reconstructions.cpu(), images.cpu()
    x, y = reconstructions.double() / 255, images.double() / 255
    mean_x, mean_y = _averages(x), _averages(y)
    variance_x, variance_y = _averages(x * x) - mean_x * mean_x, _averages(y * y) - mean_y * mean_y
    covariance = _averages(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x * mean_x + mean_y * mean_y + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return (luminance * structure).mean((1, 2, 3))


def _averages(values: Tensor) -> Tensor:
    """Return the weighted average of every window in `(n, C, H, W)`: `(n, C, H - WINDOW + 1, W - WINDOW + 1)`."""
    weights = [math.exp(-((offset - WINDOW // 2) ** 2) / (2 * DEVIATION**2)) for offset in range(WINDOW)]
    for axis in (2, 3):
        count = values.shape[axis] - WINDOW + 1
        averages = torch.zeros_like(values.narrow(axis, 0, count))
        for offset, weight in enumerate(weights):
            averages.add_(values.narrow(axis, offset, count), alpha=weight / sum(weights))
        values = averages
    return values
