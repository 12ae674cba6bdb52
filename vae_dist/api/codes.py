"""A caller's latents, and its options of pictures, as the package takes them. N codes, L latents."""

import json
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from vae_dist.config import text_of
from vae_dist.config.text import truncate
from vae_dist.errors import UserError
from vae_dist.models.posteriors import DiagonalGaussian
from vae_dist.models.vae import VAE


def to_codes(latents: Any, vae: VAE, image_shape: tuple[int, ...]) -> Tensor:
    """Convert the latents of images of a shape to `(N, L)` on the model's device.

    They are one code or N, flat or in the shape of the network's latents. Raises UserError for others, and for numbers
    that are not finite.
    """
    codes = as_tensor(latents).detach().to(vae.device, vae.dtype)
    try:
        shapes = vae.latent_shapes(image_shape)
    except ValueError as error:
        raise UserError(f"these latents can't be decoded: {error}") from error
    size = sum(torch.Size(shape).numel() for shape in shapes)
    allowed = [(size,), *shapes] if len(shapes) == 1 else [(size,)]
    if tuple(codes.shape) in allowed:
        codes = codes.unsqueeze(0)
    if tuple(codes.shape[1:]) not in allowed or len(codes) == 0:
        named = " or ".join(str(("N", *shape)).replace("'", "") for shape in dict.fromkeys(allowed))
        raise UserError(f"latents must be {named}, not {tuple(codes.shape)}")
    if not codes.isfinite().all():
        raise UserError("the latents have numbers that are not finite")
    return codes.flatten(1)


def as_tensor(latents: Any) -> Tensor:
    """Convert latents, also a list of tensors, to one tensor. Raises UserError for posteriors and complex numbers."""
    if isinstance(latents, DiagonalGaussian):
        raise UserError("these are posteriors, not latents: give their mean, as codes.mean")
    try:
        if isinstance(latents, list | tuple) and latents and all(isinstance(code, Tensor) for code in latents):
            codes = torch.stack([code.detach() for code in latents])
        else:
            codes = torch.as_tensor(latents)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"these latents can't be decoded: {error}") from error
    if codes.is_complex():
        raise UserError("these latents can't be decoded: they are complex numbers")
    return codes


def option_text(key: str, value: Any) -> str:
    """Return the value of the option `sample.<key>` as an argument has it. Raises UserError if it can't have it."""
    if key == "labels":
        given = value.tolist() if hasattr(value, "tolist") else value  # of numpy or torch, a single number too
        labels = given if isinstance(given, Iterable) and not isinstance(given, str) else [given]
        return json.dumps([str(label.tolist() if isinstance(label, Tensor) else label) for label in labels])
    if isinstance(value, str | bool | int | float):
        return text_of(value)
    try:
        return json.dumps(torch.as_tensor(value).tolist())
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{key}={truncate(repr(value))} can't be used: {error}") from error
