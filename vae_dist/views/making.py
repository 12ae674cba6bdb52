"""Making the view that a config's `sample` options select, with its name and its caption."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from vae_dist.config import Config
from vae_dist.config.memory import require_memory
from vae_dist.errors import UserError
from vae_dist.views.from_codes import codes, manifold, neighbours, prior, traversal
from vae_dist.views.from_images import interpolation, levels, reconstruction, scatter
from vae_dist.views.latents import TrainedVAE, require_finite
from vae_dist.views.pictures import require_drawable
from vae_dist.views.view import View

# sample.kind -> the function that makes the view, and the keys of `sample` that it reads.
KINDS: dict[str, tuple[Callable[[TrainedVAE], View], set[str]]] = {
    "prior": (prior, {"count", "labels", "seed", "sampler", "mixture_components", "pixels", "files"}),
    "codes": (codes, {"codes", "labels", "pixels", "seed", "files"}),
    "neighbours": (neighbours, {"codes", "images", "labels", "rows", "steps", "radius", "seed", "files"}),
    "interpolation": (interpolation, {"images", "steps", "files"}),
    "traversal": (traversal, {"codes", "images", "labels", "rows", "steps", "files"}),
    "manifold": (manifold, {"labels", "steps", "files"}),
    "reconstruction": (reconstruction, {"images", "steps", "seed", "pixels", "files"}),
    "levels": (levels, {"images", "files"}),
    "scatter": (scatter, set()),
}


class Made(NamedTuple):
    """A view that has been computed, and not yet drawn."""

    name: str  # of the kind, or of the prior's sampler
    folder: str  # that name, and the options that change the view
    view: View
    caption: str


def make_view(trained: TrainedVAE, arguments: Sequence[str], step: int, *, averaged: bool) -> Made:
    """Make the view that the config selects; `averaged` tells whether the run has a moving average of the weights.

    Raises UserError for an option among the arguments, `key=value`, that the kind ignores, and for codes or images that
    are not finite.
    """
    config = trained.config
    kind = _kind(config, arguments)
    make, keys = KINDS[kind]
    name = folder = config.sample.sampler if kind == "prior" else kind
    _check_size(trained, kind)
    view = make(trained)
    for tensor in view.tensors.values():
        require_finite(tensor)
    caption = f"{config.name} (trained on {config.data.title}), step {step}; {view.description}"
    if averaged:
        caption += f"; {'moving average of the' if config.weights == 'ema' else 'raw'} weights"
        folder += "_raw" if config.weights == "raw" else ""
    draws = "pixels" in keys and config.sample.pixels == "draw"
    if "images" in view.tensors:
        density = "p(x|z,y)" if config.model.conditional else "p(x|z)"
        caption += f"; {'pixels drawn from' if draws else 'means of'} {density}"
    if draws:
        folder += "_draw"
    if draws or ("seed" in keys and kind != "codes"):
        folder += f"_seed_{config.sample.seed}"
        caption += f"; seed {config.sample.seed}"
    return Made(name, folder, view, caption)


def _check_size(trained: TrainedVAE, kind: str) -> None:
    """Raise UserError for more images than memory or a picture holds, before they are computed."""
    options, shape = trained.config.sample, trained.vae.image_shape
    if kind == "prior":
        require_memory("the images of sample.count", 4 * options.count * math.prod(shape))
    require_drawable(options.images_at_least(trained.vae.latent_dim), shape)


def _kind(config: Config, arguments: Sequence[str]) -> str:
    """Return the kind that the config selects. Raises UserError for an unknown one, and for a key that it ignores."""
    kind = config.sample.kind or ("prior" if config.sample.codes is None else "codes")
    if kind not in KINDS:
        raise UserError(f"unknown sample.kind {kind!r}; choose from {', '.join(KINDS)}")
    # Only this command's own options are checked: the training's config may hold some for another kind.
    for given in (argument.removeprefix("--").partition("=")[0] for argument in arguments):
        section, _, key = given.partition(".")
        if section == "sample" and key not in KINDS[kind][1] | {"kind"}:
            others = ", ".join(name for name, (_, keys) in KINDS.items() if key in keys)
            raise UserError(f"{given} does not apply to sample.kind={kind}; it is for {others}")
    return kind
