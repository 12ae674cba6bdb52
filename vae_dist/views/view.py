"""A view of a trained VAE: the result of each function in `from_codes` and `from_images`."""

from collections.abc import Callable
from typing import NamedTuple

from PIL import Image
from torch import Tensor

from vae_dist.errors import UserError


def label_tensors(labels: Tensor | None) -> dict[str, Tensor]:
    """Return the labels `(N,)` of decoded images by their name in a view's file; nothing without labels."""
    return {} if labels is None else {"labels": labels}


class View(NamedTuple):
    """A view. Every process has it, and the main one draws it."""

    description: str  # in the caption
    tensors: dict[str, Tensor]  # `latents` (N, L), their `images` (N, C, H, W) except in a scatter, and the kind's own
    draw: Callable[[], Image.Image]


def require_plane(kind: str, latent_dim: int) -> None:
    """Raise UserError for a model of one latent."""
    if latent_dim < 2:
        raise UserError(f"{kind} shows a plane, but this model has 1 latent; use sample.kind=traversal")
