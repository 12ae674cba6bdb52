"""Models by name: `model.architecture=conv` is the module `conv` of this folder, whose `build` makes the VAE."""

from collections.abc import Collection, Sequence
from importlib import import_module

from vae_dist.config import Config
from vae_dist.errors import UserError
from vae_dist.models.likelihoods import LIKELIHOODS, likelihood_kind
from vae_dist.models.priors import PRIORS
from vae_dist.models.tensors import seeded
from vae_dist.models.vae import VAE

MOST_CHANNELS = 4  # that a PNG file has


def check_names(config: Config) -> None:
    """Raise UserError for an unknown prior or likelihood, and for a scale or images that the likelihood can't have."""
    named: dict[str, tuple[str, Collection[str]]] = {
        "model.prior": (config.model.prior, PRIORS),
        "objective.reconstruction": (config.objective.reconstruction, LIKELIHOODS),
    }
    for key, (name, known) in named.items():
        if name not in known:
            raise UserError(f"unknown {key} {name!r}; choose from {', '.join(sorted(known))}")
    kind, data = likelihood_kind(config.objective), config.data
    if data.binarization != "none" and not kind.takes_binary:
        cause, remedy = f"data.binarize={data.binarize} leaves", "data.binarize=none, or "
        if data.binarize == "none":
            cause, remedy = f"the images of {data.name} are", ""
        raise UserError(
            f"objective.reconstruction={config.objective.reconstruction} is not for binary images, and {cause} black "
            f"and white: use {remedy}objective.reconstruction=bernoulli"
        )


def build_vae(config: Config, image_shape: Sequence[int]) -> VAE:
    """Build the config's VAE for images `(C, H, W)`, on the CPU; its weights depend on the seed alone.

    A conditional one has the classes of `data.classes`.

    Raises UserError for unknown names, for images that can't be drawn or that the architecture can't encode, and for a
    model that does not fit into memory.
    """
    check_names(config)
    if image_shape[0] > MOST_CHANNELS:
        raise UserError(
            f"images of shape {list(image_shape)} can't be drawn: shapes are channels, height and width, with at most "
            f"{MOST_CHANNELS} channels"
        )
    if config.model.conditional and config.data.classes is None:
        raise UserError("a conditional model needs data.classes, the names of its classes; a training sets it")
    classes = len(config.data.classes or ()) if config.model.conditional else 0
    build = import_module(f"{__name__}.{config.model.architecture}").build
    with seeded(config.seed):
        try:
            vae: VAE = build(config.model, tuple(image_shape), likelihood_kind(config.objective), classes)
            assert vae.latent_dim > 0
        except ValueError as error:
            raise UserError(f"model.architecture={config.model.architecture} can't be built: {error}") from error
        except RuntimeError as error:
            if "memory" not in str(error):
                raise
            raise UserError("the model does not fit this machine's memory; use a smaller model") from error
    return vae
