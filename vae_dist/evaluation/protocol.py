"""The protocol of an evaluation: the conditions of its metrics, and their comparability."""

import platform
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

import vae_dist
from vae_dist.config import Config
from vae_dist.data.source import DataInfo
from vae_dist.distributed import precision
from vae_dist.distributed.world import World
from vae_dist.evaluation import fid, similarity
from vae_dist.evaluation.networks import NO_NETWORKS, Networks
from vae_dist.models.likelihoods import likelihood_kind
from vae_dist.plan import FIXED_SEED

# Conditions of metrics that latents don't depend on.
_OF_METRICS = (
    "likelihood", "posterior_samples", "importance_samples", "noise_seed", "chunk", "psnr", "ssim", "lpips",
    "lpips_sha256", "rfid", "rfid_sha256", "fid", "fid_samples",
)  # fmt: skip


def describe(
    config: Config,
    info: DataInfo,
    world: World,
    *,
    dataset: str,
    split: str,
    likelihood: str,
    weights: str,
    networks: Networks = NO_NETWORKS,
    constants: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Any]:
    """Return the conditions that two comparable evaluations share, and those that move only the last digits.

    `likelihood` is the description of the model's, `weights` are `ema`, the moving average, or `raw`, and `networks`
    are those that compare images. `constants` are the conditions of images of one colour.
    """
    return {
        "dataset": dataset,
        "split": split,
        "images": info.count,
        "image_shape": list(info.image_shape),
        "pixels": info.processing,
        "likelihood": likelihood,
        **({"conditional": True} if config.model.conditional else {}),
        "weights": weights,
        "posterior_samples": 1,
        "importance_samples": config.evaluate.importance_samples or 0,
        "noise_seed": FIXED_SEED,
        "psnr": similarity.PSNR_PROTOCOL,
        **({"ssim": similarity.SSIM_PROTOCOL} if "ssim" in similarity.names(info.image_shape, None) else {}),
        **networks.protocol(),
        **(fid.protocol(config, info) if networks.inception is not None else {}),
        **constants,
        "precision": "fp64" if precision.param_dtype(config.train.precision) == torch.float64 else "fp32",
        "training_precision": config.train.precision,
        "device": world.device.type,
        "threads": torch.get_num_threads(),
        "batch_size": config.evaluate.images_at_once(info.image_shape),
        "chunk": config.evaluate.draws_at_once(info.image_shape),
        "versions": {
            "vae_dist": vae_dist.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
    }


def of_latents(
    config: Config, info: DataInfo, world: World, *, dataset: str, split: str, weights: str
) -> dict[str, Any]:
    """Return the conditions on which latents depend; the arguments are those of `describe`."""
    described = describe(config, info, world, dataset=dataset, split=split, likelihood="", weights=weights)
    others = _OF_METRICS if world.device.type == "cpu" else (*_OF_METRICS, "threads")
    return {name: value for name, value in described.items() if name not in others}


def comparison_warning(config: Config, dataset: str) -> str | None:
    """Return why the metrics on a data set can't be compared with published likelihoods; None if they can."""
    cautions = [_caution_of_pixels(config, dataset)]
    if config.model.conditional:
        cautions.append(
            "this model is told each image's label: its numbers are of p(x|y), not of p(x), and compare with those of "
            "other models that are told it"
        )
    return "; ".join(filter(None, cautions)) or None


def _caution_of_pixels(config: Config, dataset: str) -> str | None:
    caution = likelihood_kind(config.objective).caution(config.data.binarization, dataset)
    if caution is None and config.data.binarize == "threshold":
        return (
            f"these pixels were cut at half of white: compare these numbers with others on {dataset} cut so, not with "
            "papers, which draw binary pixels at random (train with data.binarize=dynamic for that)"
        )
    return caution
