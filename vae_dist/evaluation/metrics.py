"""Exact figures over a whole set of images, the same on any number of processes.

The images are cut into fixed blocks, dealt to the processes, scored one by one, gathered in index order and averaged in
float64. docs/evaluation.md defines the figures. N images, B a block, K importance samples, L latents, C, H, W image.
"""

import json
import logging
import math
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import vae_dist
from vae_dist import objectives
from vae_dist.config import Config
from vae_dist.data import datasets
from vae_dist.distributed import runtime
from vae_dist.distributed.runtime import World
from vae_dist.errors import UserError
from vae_dist.files import ELSEWHERE, make_folder, write_together, writing
from vae_dist.models.vae import VAE
from vae_dist.plan import FIXED_SEED, Stream, standard_normal, standard_normals
from vae_dist.runs import checkpoint, console, tracking
from vae_dist.runs.console import Figure
from vae_dist.views import pictures

logger = logging.getLogger(__name__)

GLANCE_TURNS = 4  # blocks of each process between two glances

_SCALARS = (
    "negative_elbo", "reconstruction", "kl", "negative_log_likelihood", "importance_samples", "bits_per_dimension",
    "mean_squared_error", "active_units",
)  # fmt: skip


class Scores(NamedTuple):
    """The ELBO terms of every image of a set, in nats."""

    reconstruction: Tensor  # (N,), float64, on the CPU
    kl: Tensor  # (N,)

    def figures(self, prefix: str) -> dict[str, float]:
        """The means over the images; nothing for an empty set."""
        if len(self.kl) == 0:
            return {}
        return {
            f"{prefix}/negative_elbo": (self.reconstruction + self.kl).mean().item(),
            f"{prefix}/reconstruction": self.reconstruction.mean().item(),
            f"{prefix}/kl": self.kl.mean().item(),
        }


def score(vae: VAE, pixels: Tensor, world: World, config: Config, glance: Callable[[], None] = lambda: None) -> Scores:
    """The ELBO terms of images `(N, C, H, W)` uint8, with one posterior sample each. Every process calls this.

    The noise belongs to the image's index, not to the run: the same images meet the same noise whatever is scored.
    `glance` is called every few blocks, as often on every process; what it raises ends the scoring.
    """
    if len(pixels) == 0:
        return Scores(torch.empty(0), torch.empty(0))
    parameter = next(vae.parameters())
    blocks = world.chunks(len(pixels), config.evaluate.batch_size)
    values = []
    with torch.inference_mode():
        for turn in range(-(-len(pixels) // (config.evaluate.batch_size * world.size))):
            if turn % GLANCE_TURNS == 0:
                glance()
            for block in blocks[turn : turn + 1]:
                batch = datasets.to_unit(pixels[block.start : block.stop].to(parameter.device), parameter.dtype)
                noise = standard_normal(FIXED_SEED, Stream.EVALUATION, 0, block, vae.latent_dim)
                terms = objectives.elbo_terms(vae(batch, noise.to(parameter.device, parameter.dtype)), batch)
                values.append(torch.stack(terms, dim=1).cpu())
    reconstruction, kl = world.gather_rows(blocks, values, len(pixels)).double().unbind(1)
    return Scores(reconstruction, kl)


class Codes(NamedTuple):
    """What the encoder makes of every image of a set, and what the decoder makes of that. All float64, on the CPU."""

    mean: Tensor  # (N, L), of the posterior
    kl: Tensor  # (N, L), KL(q(z|x) || p(z)) of each latent, nats
    squared_error: Tensor  # (N,), of the image decoded from the mean: the average over its pixel values, white being 1


def encode(vae: VAE, pixels: Tensor, world: World, config: Config) -> Codes:
    """The codes of images `(N, C, H, W)` uint8, N at least 1. Every process calls this."""
    parameter = next(vae.parameters())
    blocks = world.chunks(len(pixels), config.evaluate.batch_size)
    values = []
    with torch.inference_mode():
        for block in blocks:
            batch = datasets.to_unit(pixels[block.start : block.stop].to(parameter.device), parameter.dtype)
            posterior = vae.encode(batch)
            squared_error = (vae.decode(posterior.mean).mean - batch).square().flatten(1).mean(1, keepdim=True)
            values.append(torch.cat([posterior.mean, posterior.kl(), squared_error], 1).cpu())
    rows = world.gather_rows(blocks, values, len(pixels)).double()
    mean, kl, error = rows.split([vae.latent_dim, vae.latent_dim, 1], dim=1)
    return Codes(mean, kl, error.squeeze(1))


def negative_log_likelihood(vae: VAE, pixels: Tensor, world: World, config: Config) -> Tensor:
    """-log p(x) of images `(N, C, H, W)` uint8, N at least 1, on average from above: `(N,)`, nats, float64, on the CPU.

    It is estimated by the mean importance weight of K latents from each image's posterior, K at least 1, and exact for
    K to infinity (Burda et al. 2016). The noise belongs to the image's index and to the sample's number, so that more
    samples begin with the same ones. A weight that is not finite makes its image's figure NaN. All processes call this.
    """
    parameter = next(vae.parameters())
    count = config.evaluate.importance_samples or 0
    blocks = world.chunks(len(pixels), config.evaluate.batch_size)
    values = []
    latents = count * sum(map(len, blocks))
    with torch.inference_mode(), console.progress("negative log-likelihood", latents, is_main=world.is_main) as advance:
        for block in blocks:
            batch = datasets.to_unit(pixels[block.start : block.stop].to(parameter.device), parameter.dtype)
            posterior = vae.encode(batch)
            total = torch.full((len(block),), -math.inf, dtype=torch.float64)
            at_once = max(config.evaluate.chunk // len(block), 1)
            for start in range(0, count, at_once):
                samples = range(start, min(start + at_once, count))
                noise = standard_normals(FIXED_SEED, Stream.IMPORTANCE, samples, block, vae.latent_dim)
                noise = noise.to(parameter.device, parameter.dtype)
                weights = objectives.log_weights(vae, posterior, batch, noise).cpu().double()
                # A weight of 0 would pass unseen, and one of infinity for a good figure.
                weights.masked_fill_(~weights.isfinite(), math.nan)
                total = torch.logaddexp(total, weights.logsumexp(0))
                advance(len(samples) * len(block))
            values.append(math.log(count) - total)
    return world.gather_rows(blocks, values, len(pixels))


def evaluate(run: Path | None, arguments: Sequence[str] = ()) -> dict[str, Any]:
    """Evaluate a run's newest checkpoint, or the checkpoint that `run` is; the newest run by default.

    Returns what it writes to `evaluation.json`. Raises UserError where there is nothing to evaluate or no data, and for
    a model whose figures are not finite.
    """
    with checkpoint.open_for_reading(run, arguments) as opened, runtime.join(opened.config) as world:
        console.start(world)
        folder, config, step, output, live = world.on_main(lambda: opened)
        world.on_main(lambda: tracking.check_online(config.tracking))
        kept = output / "evaluations"
        world.on_main(lambda: make_folder(kept, ELSEWHERE))
        vae = checkpoint.load_vae(folder, config, world.device)
        pixels = world.main_first(lambda: _pixels(config))
        warning = _warning(config)
        result = {
            "run": config.name,
            "dataset": config.data.name,
            "split": config.evaluate.split,
            "binarize": config.data.binarize,
            "likelihood": config.objective.reconstruction,
            "images": len(pixels),
            "step": step,
            **_figures(vae, pixels, world, config),
            "comparable": warning is None,
            "warning": warning,
            "protocol": _protocol(config, pixels, world),
        }
        subject = f"{config.data.name}, {config.evaluate.split} images, step {step}"
        tracked = tracking.for_reading(config, folder, arguments)

        def keep() -> None:
            with tracking.track(tracked, output, is_main=world.is_main, live=live, kind="evaluation") as tracker:
                tracker.scalars(step, _scalars(result))
                tracker.pictures(step, lambda: {config.evaluate.split: pictures.reconstructions(vae, pixels, subject)})
                _write(output, result)

        try:
            world.on_main(keep)
        finally:  # where they can't be written too: they may have taken hours
            if world.is_main:
                _show(result)
        if world.is_main:
            logger.info("written to %s", output / "evaluation.json")
    return result


def _pixels(config: Config) -> Tensor:
    """The images to evaluate on, `(N, C, H, W)` uint8."""
    if config.evaluate.split == "test":
        return datasets.load_test(config.data).pixels
    pixels = datasets.load_training(config.data)[1].pixels
    if len(pixels) == 0:
        raise UserError("this run held no validation images out (data.validation_images=0); use evaluate.split=test")
    return pixels


def _figures(vae: VAE, pixels: Tensor, world: World, config: Config) -> dict[str, Any]:
    """All figures of a set of images, by their names in `evaluation.json`."""
    scores, codes = score(vae, pixels, world, config), encode(vae, pixels, world, config)
    by_image = {
        "negative_elbo": scores.reconstruction + scores.kl,
        "reconstruction": scores.reconstruction,
        "kl": scores.kl,
        "mean_squared_error": codes.squared_error,
    }
    _require_finite(by_image)
    if config.evaluate.importance_samples:
        by_image["negative_log_likelihood"] = negative_log_likelihood(vae, pixels, world, config)
        _require_finite(by_image)
    means = {name: values.mean().item() for name, values in by_image.items()}
    bound = means.get("negative_log_likelihood", means["negative_elbo"])
    bits = objectives.bits_per_dimension(bound, pixels[0].numel())
    return {
        **{name: means[name] for name in ("negative_elbo", "reconstruction", "kl")},
        "negative_log_likelihood": means.get("negative_log_likelihood"),
        "importance_samples": config.evaluate.importance_samples or 0,
        "bits_per_dimension": bits if _is_probability(config) else None,
        "mean_squared_error": means["mean_squared_error"],
        "active_units": objectives.active_units(codes.mean),
        "kl_per_latent": codes.kl.mean(0).tolist(),
        "standard_errors": {name: _standard_error(values) for name, values in by_image.items()},
    }


def _standard_error(values: Tensor) -> float | None:
    """Of the mean over the images `(N,)`; one image has none."""
    return values.std().item() / math.sqrt(len(values)) if len(values) > 1 else None


def _require_finite(by_image: Mapping[str, Tensor]) -> None:
    """Raise UserError for figures that a mean would hide, or would be hidden by."""
    for name, values in by_image.items():
        if len(bad := (~values.isfinite()).nonzero()) > 0:
            raise UserError(
                f"{name} is not finite for {len(bad)} of {len(values)} images (the first: image {bad[0].item()}); "
                "the model has gone bad: evaluate an earlier checkpoint"
            )


def _is_probability(config: Config) -> bool:
    """Whether the model gives images a probability, not a density or a loss."""
    return config.objective.reconstruction == "bernoulli" and config.data.binarize != "none"


def _warning(config: Config) -> str | None:
    """Why the figures are not to be put beside published likelihoods; None where they may be."""
    name = config.data.name
    if config.objective.reconstruction == "gaussian":
        return (
            "a Gaussian of pixels is a density, of which sigma decides the size: compare these figures with others of "
            "the same sigma on the same pixels, not with probabilities of images"
        )
    if not _is_probability(config):
        return (
            f"grey pixels under a Bernoulli are not a likelihood: compare these figures with others on grey {name}, "
            "not with papers on binarised images (train with data.binarize=dynamic for that)"
        )
    if config.data.binarize == "threshold":
        return (
            f"these pixels were cut at half of white: compare these figures with others on {name} cut so, not with "
            "papers, which draw binary pixels at random (train with data.binarize=dynamic for that)"
        )
    return None


def _protocol(config: Config, pixels: Tensor, world: World) -> dict[str, Any]:
    """All that has to be the same for two evaluations to be compared, and what their last digits depend on."""
    pixel_values = {
        "none": "grey, 0 to 1",
        "threshold": "binary: 1 from grey 128 of 255 up",
        "dynamic": f"binary: 1 with the grey level's probability, drawn once with seed {FIXED_SEED}",
    }
    likelihood = config.objective.reconstruction
    return {
        "dataset": config.data.name,
        "split": config.evaluate.split,
        "images": len(pixels),
        "image_shape": list(pixels.shape[1:]),
        "pixels": pixel_values[config.data.binarize],
        "likelihood": likelihood if likelihood == "bernoulli" else f"{likelihood}, sigma {config.objective.sigma}",
        "posterior_samples": 1,
        "importance_samples": config.evaluate.importance_samples or 0,
        "noise_seed": FIXED_SEED,
        "precision": "fp64" if runtime.param_dtype(config.train.precision) == torch.float64 else "fp32",
        "training_precision": config.train.precision,
        "device": world.device.type,
        "threads": torch.get_num_threads(),
        "batch_size": config.evaluate.batch_size,
        "chunk": config.evaluate.chunk,
        "versions": {
            "vae_dist": vae_dist.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
    }


def _scalars(result: Mapping[str, Any]) -> dict[str, float]:
    """The figures as a row of the metrics file."""
    return {f"{result['split']}/{name}": result[name] for name in _SCALARS if result[name] is not None}


def _write(output: Path, result: Mapping[str, Any]) -> None:
    """Keep the figures under a name of their own, and as the run's latest."""
    samples = f"_k{result['importance_samples']}" if result["importance_samples"] else ""
    kept = output / "evaluations" / f"step_{result['step']:08d}_{result['split']}{samples}.json"
    content = (json.dumps(result, indent=2) + "\n").encode()
    with writing(output, ELSEWHERE):
        write_together({kept: content, output / "evaluation.json": content})


def _show(result: Mapping[str, Any]) -> None:
    """Print the figures."""
    protocol, errors, samples = result["protocol"], result["standard_errors"], result["importance_samples"]
    rows = {
        "negative_log_likelihood": ("negative log-likelihood", f"nats, at most; {samples} samples"),
        "negative_elbo": ("negative ELBO", "nats"),
        "reconstruction": ("  reconstruction", "nats, the distortion"),
        "kl": ("  KL", "nats, the rate"),
        "bits_per_dimension": ("bits per dimension", f"from the {'log-likelihood' if samples else 'ELBO'}"),
        "mean_squared_error": ("mean squared error", "per pixel"),
        "active_units": ("active units", f"of {len(result['kl_per_latent'])} latents"),
    }
    console.figures(
        f"{result['run']}, step {result['step']}: {result['images']} {result['split']} images of {result['dataset']}",
        [Figure(name, result[key], errors.get(key), remark) for key, (name, remark) in rows.items()],
        "mean over the images ± its standard error\n"
        f"pixels {protocol['pixels']}; {protocol['likelihood']} likelihood\n"
        f"ELBO of 1 posterior sample; noise seed {protocol['noise_seed']}; {protocol['precision']} on "
        f"{protocol['device']}, threads: {protocol['threads']}",
        result["warning"],
    )
