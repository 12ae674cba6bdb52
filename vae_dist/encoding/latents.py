"""The latents of some images, as a file holds them."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from vae_dist.config import Config
from vae_dist.data.source import Source, as_indices
from vae_dist.encoding.request import Request
from vae_dist.errors import UserError
from vae_dist.models.inputs import read_inputs
from vae_dist.models.posteriors import DiagonalGaussian
from vae_dist.models.vae import VAE
from vae_dist.plan import Stream, standard_normal


def with_latents(config: Config, vae: VAE, source: Source) -> Config:
    """Settle `encode.latents=auto` by the posterior of one image.

    Raises UserError for `posterior` if it is not means and variances alone.
    """
    with torch.inference_mode():
        is_gaussian = type(vae.infer(*read_inputs(vae, source, range(1)))) is DiagonalGaussian
    latents = config.encode.latents
    if latents == "posterior" and not is_gaussian:
        raise UserError("this model's posteriors are not means and variances alone: use encode.latents=draws")
    if latents == "auto":
        latents = "posterior" if is_gaussian else "draws"
    return replace(config, encode=replace(config.encode, latents=latents))


def encode_images(
    vae: VAE, source: Source, config: Config, request: Request, shard: range, advance: Callable[[int], None]
) -> dict[str, Tensor]:
    """Encode the images of a shard: the tensors of `Request.tensors`, on the CPU.

    `advance` is called with the number of images that were just encoded. Raises UserError for numbers that are not
    finite, or that `encode.dtype` can't hold.
    """
    tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in request.tensors(len(shard)).items()}
    for batch in request.batches(shard):
        part = slice(batch.start - shard.start, batch.stop - shard.start)
        for name, values in _encode_batch(vae, source, config, batch).items():
            stored = values.unflatten(1, request.latent_shape).to(request.dtype)
            _require_finite(values, stored, batch, config)
            tensors[name][part] = stored
        if request.has_labels:
            labels = source.labels(as_indices(batch))
            assert labels is not None
            tensors["labels"][part] = labels
        advance(len(batch))
    return tensors


def _encode_batch(vae: VAE, source: Source, config: Config, batch: range) -> dict[str, Tensor]:
    """The latents of a batch, flat `(n, L)`, by the names of their tensors."""
    with torch.inference_mode():
        posterior = vae.infer(*read_inputs(vae, source, batch))
        if config.encode.latents == "posterior":
            assert isinstance(posterior, DiagonalGaussian)
            return {"mean": posterior.mean.cpu(), "log_variance": posterior.log_variance.cpu()}
        # The noise belongs to an image's index.
        noise = standard_normal(config.encode.seed, Stream.ENCODING, 0, batch, vae.latent_dim)
        return {"latents": posterior.sample(noise.to(posterior.mean.device, posterior.mean.dtype)).cpu()}


def _require_finite(values: Tensor, stored: Tensor, batch: range, config: Config) -> None:
    if stored.isfinite().all():
        return
    if values.isfinite().all():
        raise UserError(
            f"latents of up to {values.abs().max():.3g} don't fit encode.dtype={config.encode.dtype}: use bf16 or fp32"
        )
    first = batch[int((~values.isfinite()).any(1).nonzero()[0])]
    raise UserError(
        f"the latents of image {first} are not finite; the model has diverged: encode an earlier checkpoint"
    )
