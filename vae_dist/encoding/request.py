"""What an encoding was asked for: everything that decides the content of its files. n images of a shard."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from vae_dist.config import Config
from vae_dist.config.text import as_text
from vae_dist.data.chosen import Chosen
from vae_dist.data.source import DataInfo
from vae_dist.models.tensors import Shape
from vae_dist.models.vae import VAE
from vae_dist.plan import every_chunk
from vae_dist.runs.checkpoint import Checkpoint

FORMAT = 1
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Request:
    """The images, the checkpoint and the options of an encoding.

    The number of processes is no part of it, nor are the device, the threads and the versions of libraries: they move
    the last digits at most, and a killed encoding may continue on another machine.
    """

    values: Mapping[str, Any]  # by the name that a message shows; None, numbers and texts
    images: int
    batch_size: int  # images that are encoded at once
    shard_images: int  # in each file but the last: whole batches
    latent_shape: Shape  # of one image: the network's if it has one, otherwise (L,)
    latents: tuple[str, ...]  # names of the tensors that hold latents
    dtype: torch.dtype  # of these tensors
    has_labels: bool

    @property
    def shards(self) -> list[range]:
        """The images of each file. They don't depend on the number of processes."""
        return every_chunk(self.images, self.shard_images)

    def batches(self, shard: range) -> list[range]:
        """The images of a file in batches; each range counts from the first image of the set."""
        return [shard[part.start : part.stop] for part in every_chunk(len(shard), self.batch_size)]

    def tensors(self, count: int) -> dict[str, tuple[Shape, torch.dtype]]:
        """Return the shapes and types of the tensors of `count` images, by name."""
        latents = dict.fromkeys(self.latents, ((count, *self.latent_shape), self.dtype))
        return latents | ({"labels": ((count,), torch.int64)} if self.has_labels else {})

    def differences(self, other: Mapping[str, Any]) -> str | None:
        """Return how the values of another request differ, for a message; None if they don't."""
        texts = [
            f"{name} (was {as_text(other.get(name))}, now {as_text(self.values.get(name))})"
            for name in sorted(self.values.keys() | other.keys())
            if other.get(name) != self.values.get(name)
        ]
        return ", ".join(texts[:3]) or None


def make_request(config: Config, checkpoint: Checkpoint, vae: VAE, info: DataInfo) -> Request:
    """Return the request of a command for the images that `info` describes."""
    options, batch_size = config.encode, config.evaluate.images_at_once(vae.image_shape)
    shard_images = -(-options.shard_images // batch_size) * batch_size
    is_drawn = options.latents == "draws"
    values = {
        "format": FORMAT,
        "checkpoint": checkpoint.manifest.fingerprint,
        "weights": checkpoint.weights(config),
        "images": info.identity,
        "encode.latents": options.latents,
        "encode.seed": options.seed if is_drawn else None,
        "encode.dtype": options.dtype,
        "encode.shard_images": shard_images,
        "evaluate.batch_size": batch_size,  # other batches round differently
    }
    shapes = vae.latent_shapes(vae.image_shape)
    return Request(
        values=values,
        images=info.count,
        batch_size=batch_size,
        shard_images=shard_images,
        latent_shape=shapes[0] if len(shapes) == 1 else (vae.latent_dim,),
        latents=("latents",) if is_drawn else ("log_variance", "mean"),
        dtype=DTYPES[options.dtype],
        has_labels=info.classes is not None,
    )


def folder_name(config: Config, checkpoint: Checkpoint, images: Chosen) -> str:
    """Return the name of the folder of an encoding, such as `step_00002750_train_draws_seed_0`."""
    options = config.encode
    draws = f"_draws_seed_{options.seed}" if options.latents == "draws" else ""
    dtype = "" if options.dtype == "fp32" else f"_{options.dtype}"
    raw = "_raw" if checkpoint.has_average and config.weights == "raw" else ""
    return f"step_{checkpoint.step:08d}_{images.file}{draws}{dtype}{raw}"
