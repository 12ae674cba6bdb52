"""The deviation of images from their mean image."""

import torch

from vae_dist.data.source import Source, read

MOST_IMAGES = 1024
_MOST_NUMBERS = 2**28  # pixel values that are read
_AT_ONCE = 2**22  # pixel values in float64


def deviation(source: Source, order: int) -> float:
    """Return (mean |x - m|^order)^(1/order) over pixel values x in [0, 1], where m is the mean image.

    Order 2 gives the root mean square, 1 the mean absolute deviation. The images are the first 1,024 of the source, or
    fewer if they are large; it has at least one.
    """
    numbers = torch.Size(source.info.image_shape).numel()
    count = min(source.info.count, MOST_IMAGES, max(_MOST_NUMBERS // numbers, 1))
    pixels = read(source, range(count)).flatten(1)
    chunks = pixels.split(max(_AT_ONCE // count, 1), dim=1)  # of pixel values: each chunk has all images
    total = 0.0
    for chunk in chunks:
        values = chunk.double() / 255
        total += (values - values.mean(0)).abs().pow(order).sum().item()
    return float((total / pixels.numel()) ** (1 / order))
