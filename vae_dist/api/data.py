"""The images of a run as tensors. N images, C, H, W image."""

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from vae_dist.api.numbers import whole_number
from vae_dist.config import DataConfig
from vae_dist.data.chosen import of_split
from vae_dist.data.source import read
from vae_dist.errors import UserError
from vae_dist.models.tensors import to_unit

Split = Literal["train", "validation", "test"]


class Images(NamedTuple):
    """Images of a split, in its order."""

    images: Tensor  # (N, C, H, W) float32 in [0, 1]
    labels: Tensor | None  # (N,) int64; None without labels
    names: Sequence[str] | None  # of their files, for example; None without names


def load_images(data: DataConfig, split: str, count: int | None, device: torch.device) -> Images:
    """Return the first `count` images of a split, by default all. Raises UserError as `Run.images` does."""
    count = None if count is None else whole_number("count", count)
    if split not in get_args(Split):
        raise UserError(f"there is no split {split!r}: give train, validation or test")
    source = of_split(data, split, "give another split")
    chosen = torch.arange(source.info.count if count is None else min(count, source.info.count))
    labels = source.labels(chosen)
    return Images(
        to_unit(read(source, chosen).to(device)),
        None if labels is None else labels.to(device, copy=True),
        source.names(chosen),
    )
