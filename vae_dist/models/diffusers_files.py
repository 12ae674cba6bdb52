"""The files of a diffusers AutoencoderKL: `config.json` and `diffusion_pytorch_model.safetensors`.

diffusers loads without strictness: a weight that a file lacks is drawn at random, and one that the model lacks is left
out. So names and shapes are compared in both directions, here and in `diffusers_start.py`.
"""

import inspect
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any, NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor

from vae_dist.errors import RunError, UserError
from vae_dist.models.autoencoder_kl import (
    AutoencoderKLVAE,
    diffusers_state,
    make_network,
    network_class,
    network_options,
)
from vae_dist.models.vae import VAE

CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
CLASS = "AutoencoderKL"


class Scaling(NamedTuple):
    """How a diffusion model's pipeline standardises latents z: (z - shift) x factor, or (z - mean) / std by channel.

    The autoencoder itself applies none of it. What is null is unknown: pipelines then refuse, instead of taking the
    factor of Stable Diffusion.
    """

    factor: float | None = None
    shift: float | None = None
    mean: Sequence[float] | None = None  # of each latent channel
    std: Sequence[float] | None = None


def diffusers_files(vae: VAE, scaling: Scaling | None = None) -> dict[str, bytes]:
    """Return the content of the two files of a model, in its own precision.

    Raises UserError for a model of another architecture, and for a scaling that diffusers would apply twice.
    """
    if not isinstance(vae, AutoencoderKLVAE):
        raise UserError("diffusers has no such model: only model.architecture=autoencoder_kl can be exported to it")
    scaling = scaling or Scaling()
    _check_scaling(scaling, vae.options.latent_channels)
    options = {
        **network_options(vae.options, vae.image_shape[0]),
        "act_fn": "silu",
        "sample_size": max(vae.image_shape[1:]),
        "force_upcast": True,  # float16, whose range activations can leave, is not tried
        "scaling_factor": 1.0 if scaling.std is not None else scaling.factor,
        "shift_factor": scaling.shift,
        "latents_mean": None if scaling.mean is None else list(scaling.mean),
        "latents_std": None if scaling.std is None else list(scaling.std),
    }
    values = {"_class_name": CLASS, "_diffusers_version": version("diffusers"), **dict(sorted(options.items()))}
    state = {name: tensor.detach().to("cpu").contiguous() for name, tensor in diffusers_state(vae).items()}
    _check(options, state)
    return {
        CONFIG: (json.dumps(values, indent=2) + "\n").encode(),
        WEIGHTS: save(state, metadata={"format": "pt"}),
    }


def defaults() -> dict[str, Any]:
    """Return diffusers' options of AutoencoderKL with their defaults, which a `config.json` may leave out."""
    parameters = inspect.signature(network_class().__init__).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters if parameter.name != "self"}


def shapes_of(options: Mapping[str, Any]) -> dict[str, torch.Size]:
    """Return the shapes of the weights of diffusers' network with these options, by name."""
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in make_network(dict(options)).state_dict().items()}


def _check_scaling(scaling: Scaling, channels: int) -> None:
    if (scaling.mean is None) != (scaling.std is None):
        raise UserError("latents_mean and latents_std are given together, or not at all")
    if scaling.std is not None and (scaling.factor is not None or scaling.shift is not None):
        raise UserError(
            "diffusers would scale latents twice: give scaling_factor and shift_factor, or latents_mean and latents_std"
        )
    for numbers in (scaling.mean, scaling.std):
        if numbers is not None and len(numbers) != channels:
            raise UserError(f"latents_mean and latents_std need a number for each of the {channels} latent channels")


def _check(options: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """Raise RunError unless this version of diffusers has exactly these options and weights."""
    expected, own = shapes_of(options), {name: tensor.shape for name, tensor in state.items()}
    differing = [*(options.keys() ^ defaults().keys())]
    differing += [name for name in expected.keys() | own.keys() if expected.get(name) != own.get(name)]
    if differing:
        raise RunError(
            f"diffusers {version('diffusers')} has another AutoencoderKL than the one that this version of vae_dist "
            f"exports: {', '.join(sorted(differing)[:3])} differ; install diffusers 0.42"
        )
