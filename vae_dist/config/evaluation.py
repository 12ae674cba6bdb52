"""Options of evaluations."""

from dataclasses import dataclass
from typing import Literal

from vae_dist.config.fields import option


@dataclass
class EvaluateConfig:
    batch_size: int = option(500, "images per batch; the batches are the same on any number of processes", at_least=1)
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
    chunk: int = option(
        2000,
        "images x importance samples decoded at a time, to bound memory; at least one sample of each image in a batch",
        at_least=1,
    )
