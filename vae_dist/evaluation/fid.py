"""Frechet distances of images from those that a model makes: rFID of reconstructions, FID of samples from the prior.

N images, M samples, F features.
"""

import math

import torch
from torch import Tensor, nn

from vae_dist.config import Config
from vae_dist.data.source import DataInfo
from vae_dist.distributed.world import World
from vae_dist.errors import UserError
from vae_dist.evaluation import similarity
from vae_dist.models.labels import in_turn
from vae_dist.models.vae import VAE
from vae_dist.plan import FIXED_SEED
from vae_dist.terminal.progress import progress
from vae_dist.views.latents import prior_draws


def rfid(features: Tensor, world: World) -> float | None:
    """Return the Frechet distance of images and their reconstructions by features `(N, 2, F)`; None for one image."""
    return _distance(features[:, 0], features[:, 1], world) if len(features) > 1 else None


def fid(vae: VAE, inception: nn.Module, reference: Tensor, world: World, config: Config) -> float | None:
    """Return the Frechet distance of `evaluate.fid_samples` samples from images of features `(N, F)`.

    None for one image. Every process calls this. Raises UserError if a sample is not finite.
    """
    return _distance(reference, _of_samples(vae, inception, world, config), world) if len(reference) > 1 else None


def protocol(config: Config, info: DataInfo) -> dict[str, str | int]:
    """Return the conditions of an evaluation's `fid`, beside those of its `rfid`; empty if there is none."""
    count = config.evaluate.fid_samples
    if count is None:
        return {}
    density = "p(x|z,y), of the classes in turn" if config.model.conditional else "p(x|z)"
    drawn = f"{count} means of {density}, z from the prior p(z), the same draws in every evaluation"
    return {"fid": f"{drawn}; the reference are the {info.count} images; otherwise as rfid", "fid_samples": count}


def _of_samples(vae: VAE, inception: nn.Module, world: World, config: Config) -> Tensor:
    """Return the features of samples from the prior: `(M, F)` float32, on the CPU.

    A sample's code depends on its index alone. The first are those that `sample.kind=prior` draws by default.
    """
    count = config.evaluate.fid_samples or 0
    chunks = world.chunks(count, config.evaluate.images_at_once(vae.image_shape))
    values = []
    with (
        torch.inference_mode(),
        progress("samples from the prior", sum(map(len, chunks)), is_main=world.is_main) as advance,
    ):
        for chunk in chunks:
            codes = prior_draws(vae, FIXED_SEED, chunk).to(vae.device, vae.dtype)
            decoded = vae.decode(codes, labels=in_turn(vae.classes, chunk, vae.device)).mean
            features = similarity.features(inception, decoded)
            # 8-bit values hide what is not finite, and all processes have to know it.
            features[~decoded.isfinite().flatten(1).all(1).cpu()] = math.nan
            values.append(features)
            advance(len(chunk))
    features = world.gather_rows(chunks, values, count)
    if bad := int((~features.isfinite().all(1)).sum()):
        raise UserError(
            f"{bad} of {count} samples from the prior are not finite; the model has diverged: evaluate an earlier "
            "checkpoint, or leave out evaluate.fid_samples"
        )
    return features


def _distance(first: Tensor, second: Tensor, world: World) -> float:
    return world.on_main(lambda: frechet_distance(first, second), patient=True)


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """Return the Frechet distance of sets of features `(N, F)`, N at least 2 each, taken as Gaussians; in float64.

    |m1 - m2|^2 + tr(C1) + tr(C2) - 2 tr((C1 C2)^(1/2)), with means m and covariances C, which divide by N - 1. With
    A^T A = (N - 1) C, the eigenvalues of C1 C2 are the squared singular values of A1 A2^T up to that factor. So no root
    of a matrix is taken, and nothing is lost where covariances have no full rank.
    """
    means, factors, traces = [], [], []
    for features in (first, second):
        values = features.double()
        means.append(values.mean(0))
        centred = (values - means[-1]) / math.sqrt(len(values) - 1)
        factors.append(torch.linalg.qr(centred, mode="r").R)
        traces.append(centred.square().sum())
    root = torch.linalg.svdvals(factors[0] @ factors[1].T).sum()
    return ((means[0] - means[1]).square().sum() + traces[0] + traces[1] - 2 * root).item()
