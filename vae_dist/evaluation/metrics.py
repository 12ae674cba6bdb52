"""Metrics over a whole set of images, bitwise the same on any number of processes.

The images are cut into fixed chunks, dealt to the processes, gathered in index order and averaged in float64.
docs/evaluation.md defines the metrics. N images, K importance samples, L latents, C, H, W image.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vae_dist import objectives
from vae_dist.compute.moments import joined
from vae_dist.config import Config
from vae_dist.data.source import Source
from vae_dist.distributed.world import World
from vae_dist.errors import UserError
from vae_dist.evaluation import constants, fid, similarity
from vae_dist.evaluation.networks import NO_NETWORKS, Networks
from vae_dist.models.inputs import Inputs, one_draw, read_inputs
from vae_dist.models.tensors import sizes
from vae_dist.models.vae import VAE
from vae_dist.objectives import ElboTerms
from vae_dist.plan import FIXED_SEED, Draws, Stream, every_chunk, standard_normals
from vae_dist.terminal.progress import progress

STOP_CHECK_CHUNKS = 4  # chunks of each process between two checks


def score(
    vae: VAE, source: Source, world: World, config: Config, check_stop: Callable[[], None] = lambda: None
) -> ElboTerms:
    """Return the ELBO terms of the images of a source with one posterior sample each: float64, on the CPU.

    Every process calls this. `check_stop` is called every few chunks, equally often on every process; an exception
    from it ends the scoring.
    """
    if source.info.count == 0:
        return ElboTerms(torch.empty(0), torch.empty(0))
    at_once = config.evaluate.images_at_once(vae.image_shape)
    chunks = world.chunks(source.info.count, at_once)
    values = []
    with torch.inference_mode():
        for turn in range(-(-source.info.count // (at_once * world.size))):
            if turn % STOP_CHECK_CHUNKS == 0:
                check_stop()
            for chunk in chunks[turn : turn + 1]:  # the last turn may have none for this process
                inputs = read_inputs(vae, source, chunk)
                terms = objectives.elbo_terms(one_draw(vae, inputs, chunk), inputs.images)
                values.append(torch.stack(terms, dim=1).cpu())
    return ElboTerms(*world.gather_rows(chunks, values, source.info.count).double().unbind(1))


class Encodings(NamedTuple):
    """The costs of every image of a set, and statistics of its latents. All float64, on the CPU."""

    terms: ElboTerms  # (N,) each, as `score` returns them
    squared_error: Tensor  # (N,), of the image decoded from the mean, averaged over its pixel values; white is 1
    kl: Tensor  # (G,), nats, by group of latents, averaged over the images
    variance: Tensor  # (L,), of the posterior's mean over the images
    similarity: dict[str, Tensor]  # (N,) each, of the image decoded from the mean, as `similarity.names` lists them
    features: Tensor | None  # (N, 2, F) float32 for rFID: of the image, and of the one decoded from the mean


def encode(vae: VAE, source: Source, world: World, config: Config, networks: Networks = NO_NETWORKS) -> Encodings:
    """Return the encodings of the images of a source, N at least 1. Every process calls this.

    Reconstructions are compared by the networks that are given. A chunk's latents are summed up before chunks are
    gathered: those of all images may not fit into memory.
    """
    at_once = config.evaluate.images_at_once(vae.image_shape)
    chunks = world.chunks(source.info.count, at_once)
    names = similarity.names(source.info.image_shape, networks.lpips)
    values, features, kl_sums, moments = [], [], [], []
    with torch.inference_mode():
        for chunk in chunks:
            images, labels = inputs = read_inputs(vae, source, chunk)
            inference = one_draw(vae, inputs, chunk)
            terms = torch.stack(objectives.elbo_terms(inference, images), dim=1)
            means = inference.posterior.mean
            decoded = vae.decode(means, labels=labels).mean
            squared_error = (decoded - images).square().flatten(1).mean(1, keepdim=True)
            alike = similarity.compare(decoded, images, names, networks.lpips)
            values.append(torch.cat([torch.cat([terms, squared_error], 1).cpu().double(), alike], 1))
            if (inception := networks.inception) is not None:
                both = [similarity.features(inception, pictures) for pictures in (images, decoded)]
                features.append(torch.stack(both, dim=1))
            kl_sums.append(inference.kl[0].double().sum(0, keepdim=True))
            moments.append(torch.stack(torch.var_mean(means.double(), 0, correction=0)).unsqueeze(0))
    columns = world.gather_rows(chunks, values, source.info.count).unbind(1)
    terms_of_all, error = ElboTerms(*columns[:2]), columns[2]
    numbers = [range(number, number + 1) for number in (chunk.start // at_once for chunk in chunks)]
    count = -(-source.info.count // at_once)
    kl = world.gather_rows(numbers, kl_sums, count).sum(0) / source.info.count
    sizes = [len(chunk) for chunk in every_chunk(source.info.count, at_once)]
    variance, _ = joined(sizes, world.gather_rows(numbers, moments, count))
    alike_of_all = dict(zip(names, columns[3:], strict=True))
    features_of_all = None if networks.inception is None else world.gather_rows(chunks, features, source.info.count)
    return Encodings(terms_of_all, error, kl, variance, alike_of_all, features_of_all)


def negative_log_likelihood(vae: VAE, source: Source, world: World, config: Config) -> Tensor:
    """Estimate -log p(x) of the images of a source, N at least 1: `(N,)`, nats, float64, on the CPU.

    Of a conditional model it is -log p(x|y), y the image's label.

    The estimate is -log of the mean importance weight of K >= 1 latents from each image's posterior: on average an
    upper bound, exact for K to infinity (Burda et al. 2016). The noise belongs to the image's index and the sample's
    number, so a larger K adds samples to the same first ones. A weight that is not finite makes its image's estimate
    NaN. Every process calls this.
    """
    count = config.evaluate.importance_samples or 0
    chunks = world.chunks(source.info.count, config.evaluate.images_at_once(vae.image_shape))
    at_once = config.evaluate.draws_at_once(vae.image_shape)
    values = []
    latents = count * sum(map(len, chunks))
    with torch.inference_mode(), progress("negative log-likelihood", latents, is_main=world.is_main) as advance:
        for chunk in chunks:
            inputs = read_inputs(vae, source, chunk)
            values.append(importance_estimate(vae, inputs, chunk, count, at_once, advance))
    return world.gather_rows(chunks, values, source.info.count)


def importance_estimate(
    vae: VAE, inputs: Inputs, indices: range, count: int, at_once: int, advance: Callable[[int], None] = lambda _: None
) -> Tensor:
    """Estimate -log p(x) of n images with these indices as `negative_log_likelihood` does: `(n,)`, float64, on the CPU.

    `count` latents are drawn for each image, about `at_once` latents of all images at a time. `advance` is called with
    the number of latents that are done.
    """
    images, labels = inputs
    posterior = vae.infer(images, labels)
    total = torch.full((len(indices),), -math.inf, dtype=torch.float64)
    samples_at_once = max(at_once // len(indices), 1)
    for start in range(0, count, samples_at_once):
        samples = range(start, min(start + samples_at_once, count))
        noise = standard_normals(Draws(FIXED_SEED, Stream.IMPORTANCE, samples, indices, posterior.mean.shape[1]))
        drawn = vae.sample(posterior, noise.to(vae.device, vae.dtype), tuple(images.shape[1:]), labels)
        weights = objectives.log_weights(drawn, images).cpu().double()
        # The sum would hide a weight of 0, and an infinite weight would look like a good estimate.
        weights.masked_fill_(~weights.isfinite(), math.nan)
        total = torch.logaddexp(total, weights.logsumexp(0))
        advance(len(samples) * len(indices))
    return math.log(count) - total


class Measured(NamedTuple):
    """The metrics of a set of images, by their names in `evaluation.json`."""

    metrics: dict[str, Any]
    by_image: dict[str, Tensor]  # (N,) each, float64, of the metrics that are averages over the images


def measure(vae: VAE, source: Source, world: World, config: Config, networks: Networks = NO_NETWORKS) -> Measured:
    """Return all metrics of a set of images, with those of the networks. Every process calls this.

    Raises UserError if a metric is not finite.
    """
    encodings = encode(vae, source, world, config, networks)
    by_image = {
        "negative_elbo": encodings.terms.negative_elbo,
        "reconstruction": encodings.terms.reconstruction,
        "kl": encodings.terms.kl,
        "mean_squared_error": encodings.squared_error,
        **encodings.similarity,
    }
    constant = constants.measure(vae, world, config)
    _require_finite(by_image | constant)  # before the likelihood, which may take hours
    distances: dict[str, float | int | None] = {}
    if networks.inception is not None and (features := encodings.features) is not None:
        distances["rfid"] = fid.rfid(features, world)
        if (count := config.evaluate.fid_samples) is not None:
            distances["fid"] = fid.fid(vae, networks.inception, features[:, 0], world, config)
            distances["fid_samples"] = count
    if config.evaluate.importance_samples:
        by_image["negative_log_likelihood"] = negative_log_likelihood(vae, source, world, config)
        _require_finite(by_image)
    means = {name: values.mean().item() for name, values in by_image.items()}
    bound = means.get("negative_log_likelihood", means["negative_elbo"])
    bits = objectives.bits_per_dimension(bound, math.prod(source.info.image_shape))
    metrics = {
        **{name: means[name] for name in ("negative_elbo", "reconstruction", "kl")},
        "negative_log_likelihood": means.get("negative_log_likelihood"),
        "importance_samples": config.evaluate.importance_samples or 0,
        "bits_per_dimension": bits if vae.likelihood.is_probability(config.data.binarization) else None,
        "mean_squared_error": means["mean_squared_error"],
        "psnr": means["psnr"],
        "ssim": means.get("ssim"),
        **means,  # those that are not named here too
        **distances,
        **{name: values.mean().item() for name, values in constant.items()},
        # One image has no variance.
        "active_units": objectives.active_units(encodings.variance) if source.info.count > 1 else None,
        "latents": vae.latent_dim,
        # Of a prior whose density does not factorise into latents, the KL is known by group alone.
        "kl_per_latent" if len(encodings.kl) == vae.latent_dim else "kl_per_group": encodings.kl.tolist(),
        **_kl_per_level(vae, encodings.kl),
        "standard_errors": {name: _standard_error(values) for name, values in by_image.items()},
    }
    return Measured(metrics, by_image)


def _kl_per_level(vae: VAE, kl: Tensor) -> dict[str, list[float]]:
    """Return the KL of each level of latents; nothing for a model of one level, or without a KL of each latent."""
    shapes = vae.latent_shapes(vae.image_shape)
    if len(shapes) == 1 or len(kl) != vae.latent_dim:
        return {}
    return {"kl_per_level": [part.sum().item() for part in kl.split(sizes(shapes))]}


def _standard_error(values: Tensor) -> float | None:
    """Return the standard error of the mean over images `(N,)`; None for one image."""
    return values.std().item() / math.sqrt(len(values)) if len(values) > 1 else None


def _require_finite(by_image: Mapping[str, Tensor]) -> None:
    """Raise UserError if any image's value is not finite."""
    for name, values in by_image.items():
        if len(bad := (~values.isfinite()).nonzero()) > 0:
            raise UserError(
                f"{name} is not finite for {len(bad)} of {len(values)} images (the first: image {bad[0].item()}); "
                "the model has diverged: evaluate an earlier checkpoint"
            )
