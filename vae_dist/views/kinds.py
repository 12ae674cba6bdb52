"""The views that `sample.kind` can name. A new one is a function and a line here."""

from collections.abc import Callable

from vae_dist.views.from_codes import codes, manifold, neighbours, prior, traversal
from vae_dist.views.from_images import interpolation, reconstruction, scatter
from vae_dist.views.latents import TrainedVAE
from vae_dist.views.view import View

# sample.kind -> the function that makes it, and the keys of `sample` that it reads.
KINDS: dict[str, tuple[Callable[[TrainedVAE], View], set[str]]] = {
    "prior": (prior, {"count", "labels", "seed", "sampler", "mixture_components", "pixels", "files"}),
    "codes": (codes, {"codes", "labels", "pixels", "seed", "files"}),
    "neighbours": (neighbours, {"codes", "images", "labels", "rows", "steps", "radius", "seed", "files"}),
    "interpolation": (interpolation, {"images", "steps", "files"}),
    "traversal": (traversal, {"codes", "images", "labels", "rows", "steps", "files"}),
    "manifold": (manifold, {"labels", "steps", "files"}),
    "reconstruction": (reconstruction, {"images", "steps", "seed", "pixels", "files"}),
    "scatter": (scatter, set()),
}
