"""Models by name. A new architecture is a file here and a line in ARCHITECTURES."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn

from vae_dist.config import Config, MLPConfig
from vae_dist.errors import UserError
from vae_dist.models.distributions import LIKELIHOODS
from vae_dist.models.mlp import MLPDecoder, MLPEncoder
from vae_dist.models.vae import VAE

Network = Callable[[Sequence[int], Sequence[int], int], nn.Module]  # (image shape, hidden sizes, latent dimension)

# Name in a config -> encoder and decoder. Tests check the shapes of every entry.
ARCHITECTURES: dict[str, tuple[Network, Network]] = {
    "mlp": (MLPEncoder, MLPDecoder),
}


def check_names(config: Config) -> None:
    """Raise UserError if the config names an unknown architecture or likelihood."""
    if config.model.architecture not in ARCHITECTURES:
        choices = ", ".join(sorted(ARCHITECTURES))
        raise UserError(f"unknown architecture {config.model.architecture!r}; choose from {choices}")
    if config.objective.reconstruction not in LIKELIHOODS:
        choices = ", ".join(sorted(LIKELIHOODS))
        raise UserError(f"unknown reconstruction {config.objective.reconstruction!r}; choose from {choices}")


def build_vae(config: Config, image_shape: Sequence[int]) -> VAE:
    """Build the config's VAE for images `(C, H, W)`, on the CPU; its weights depend on the seed alone.

    Raises UserError for unknown names, and for a model that does not fit into memory.
    """
    check_names(config)
    assert isinstance(config.model, MLPConfig)
    build_encoder, build_decoder = ARCHITECTURES[config.model.architecture]
    sizes = (image_shape, config.model.hidden_dims, config.model.latent_dim)
    build_likelihood = LIKELIHOODS[config.objective.reconstruction]
    likelihood = partial(build_likelihood, config.objective.sigma)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        try:
            return VAE(build_encoder(*sizes), build_decoder(*sizes), likelihood, config.model.latent_dim)
        except RuntimeError as error:
            if "memory" not in str(error):
                raise
            raise UserError("the model does not fit this machine's memory; use smaller model.hidden_dims") from error
