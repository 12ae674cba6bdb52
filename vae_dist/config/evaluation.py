"""Options of evaluations."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from vae_dist.config.fields import option

MOST_IMAGES, MOST_DRAWS = 500, 2000
MOST_VALUES = 2**21  # of the pixels that are decoded at a time, in float32 by networks that may be wide


@dataclass
class EvaluateConfig:
    batch_size: int | None = option(
        None,
        f"images per batch, the same batches on any number of processes; null: {MOST_IMAGES}, fewer of images with "
        f"more than {MOST_VALUES // MOST_IMAGES} values",
        at_least=1,
    )
    split: Literal["test", "validation"] = option("test", "images to evaluate on: test or validation")
    folder: str | None = option(
        None,
        "your own images to evaluate on instead of the run's: a folder, a packed one or an array; all its images",
    )
    perceptual: str | None = option(
        None,
        "file of LPIPS' weights, as `vae-dist fetch-weights` writes it: adds the LPIPS of reconstructions; null: none",
    )
    inception: str | None = option(
        None,
        "file of the weights of FID's Inception, as `vae-dist fetch-weights` writes it: adds the rFID of "
        "reconstructions; null: none",
    )
    fid_samples: int | None = option(
        None,
        "samples from the prior for their FID to the images, of which papers draw 50000; needs evaluate.inception; "
        "null: none",
        at_least=2,
    )
    importance_samples: int | None = option(
        128, "latents per image for the estimate of the negative log-likelihood; 0 or null: no estimate", at_least=0
    )
    chunk: int | None = option(
        None,
        "images x importance samples decoded at a time, to bound memory; at least one sample of each image in a batch; "
        f"null: {MOST_DRAWS}, fewer of images with more than {MOST_VALUES // MOST_DRAWS} values",
        at_least=1,
    )

    def images_at_once(self, image_shape: Sequence[int]) -> int:
        """Return the images per batch of images `(C, H, W)`."""
        return self.batch_size or _at_most(MOST_IMAGES, image_shape)

    def draws_at_once(self, image_shape: Sequence[int]) -> int:
        """Return how many images `(C, H, W)` are decoded at a time for importance samples."""
        return self.chunk or _at_most(MOST_DRAWS, image_shape)


def _at_most(images: int, image_shape: Sequence[int]) -> int:
    return max(min(images, MOST_VALUES // math.prod(image_shape)), 1)
