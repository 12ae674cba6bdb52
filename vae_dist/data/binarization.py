"""Binary images from grey ones: drawn once with a fixed seed, or cut at a threshold."""

from functools import partial

import torch
from torch import Tensor

from vae_dist.data.source import Source, process
from vae_dist.plan import FIXED_SEED, bernoulli_pixels

VALIDATION_STEP, TEST_STEP, TRAINING_STEP = range(3)  # of the draws of each part's images, the same in all runs


def binarize_once(source: Source, binarization: str, step: int) -> Source:
    """Binarise grey images that are read with a model of such images (`DataConfig.binarization`).

    Draws have a fixed seed: every run reads the same ones.
    """
    if binarization in ("dynamic", "fixed"):
        words = f"binary: 1 with the grey level's probability, drawn once with seed {FIXED_SEED}"
        return process(source, partial(_draw, step=step), words, f"step {step}")
    return cut(source) if binarization == "threshold" else source


def _draw(pixels: Tensor, indices: Tensor, step: int) -> Tensor:
    """Draw binary images from grey ones `(n, C, H, W)`: an image's random numbers belong to its index."""
    runs = indices.tensor_split((indices.diff() != 1).nonzero().flatten() + 1) if len(indices) else []
    drawn, start = torch.empty_like(pixels), 0
    for run in runs:  # of consecutive indices
        part = slice(start, start + len(run))
        first = int(run[0])
        drawn[part] = bernoulli_pixels(pixels[part], FIXED_SEED, step, range(first, first + len(run)))
        start += len(run)
    return drawn


def cut(source: Source) -> Source:
    """Return the source with pixels that `cut_pixels` has cut."""
    return process(source, lambda pixels, _: cut_pixels(pixels), "binary: 1 from grey 128 of 255 up")


def cut_pixels(pixels: Tensor) -> Tensor:
    """Return uint8 pixels that are 255 from 128 up, and 0 below."""
    return (pixels >= 128).to(torch.uint8) * 255
