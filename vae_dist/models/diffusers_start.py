"""A run that starts from a folder of diffusers: its sizes become the model's, its weights the first ones.

The folder may be untrusted: `config.json` is read within bounds and runs no code, and pickled weights are refused.
"""

import hashlib
import logging
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor

from vae_dist import config as configs
from vae_dist.config import AutoencoderKLConfig, Config
from vae_dist.data.source import DataInfo
from vae_dist.errors import UserError
from vae_dist.files import parse_object, read_bounded, reason
from vae_dist.models import build_vae
from vae_dist.models.autoencoder_kl import (
    ATTENDING_DOWN,
    ATTENDING_UP,
    DOWN,
    UP,
    AutoencoderKLVAE,
    load_diffusers_state,
    network_options,
)
from vae_dist.models.diffusers_files import CLASS, CONFIG, WEIGHTS, defaults, shapes_of
from vae_dist.models.vae import VAE

logger = logging.getLogger(__name__)

MOST_BYTES = 2**20  # of config.json
HEADER_BYTES = 2**24  # of the weights' file, at most

# The attention's names in files of old versions of diffusers -> today's.
_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def resolve_start(config: Config, image_shape: Sequence[int]) -> Config:
    """Return the config of a new run with the sizes of `model.init_from`, and the sha256 of its weights.

    Raises UserError for a folder that can't be used, and for options that contradict it.
    """
    model = config.model
    if not isinstance(model, AutoencoderKLConfig) or model.init_from is None:
        return config
    folder = Path(model.init_from)
    stored = _stored_options(folder, image_shape[0])
    usual = AutoencoderKLConfig()
    for name, value in stored.items():
        given = getattr(model, name)
        if given not in (value, getattr(usual, name)):
            raise UserError(
                f"model.{name}={configs.as_text(given)} contradicts {folder / CONFIG}, which has "
                f"{configs.as_text(value)}: leave it out"
            )
    model = replace(model, **stored)
    configs.check(replace(config, model=model))
    digest, _ = _read_weights(folder, model, image_shape[0])
    if model.init_sha256 not in (None, digest):
        raise _other_weights(folder)
    sizes = ", ".join(f"model.{name}={configs.as_text(value)}" for name, value in stored.items())
    logger.info("the weights start from %s: %s", folder, sizes)
    return replace(config, model=replace(model, init_sha256=digest))


def start_vae(config: Config, info: DataInfo, resumed_from: object | None = None) -> VAE:
    """Build the VAE of a resolved config, as `build_vae` does; a new run's with the weights of `model.init_from`.

    Every process calls this. Raises UserError if the file is missing or another one than `resolve_start` has read.
    """
    image_shape = info.image_shape
    vae = build_vae(config, image_shape)
    if resumed_from is not None or not isinstance(vae, AutoencoderKLVAE) or vae.options.init_from is None:
        return vae
    folder = Path(vae.options.init_from)
    digest, state = _read_weights(folder, vae.options, image_shape[0])
    if digest != vae.options.init_sha256:
        raise _other_weights(folder)
    load_diffusers_state(vae, state)
    return vae


def _other_weights(folder: Path) -> UserError:
    return UserError(
        f"{folder / WEIGHTS} is another file than model.init_sha256 says: put that file back, or leave out "
        "model.init_sha256"
    )


def _stored_options(folder: Path, channels: int) -> dict[str, Any]:
    """Return the folder's sizes as options of the model, by name. `channels` are those of the images."""
    path = folder / CONFIG
    values = {**defaults(), **_read_config(path)}
    unknown = sorted(key for key in values.keys() - defaults().keys() if not key.startswith("_"))
    if values.get("_class_name", CLASS) != CLASS or unknown:
        what = f"the option {unknown[0]}" if unknown else f"a {values['_class_name']}"
        raise UserError(f"{path} describes {what[:200]}, which model.architecture=autoencoder_kl does not have")
    try:
        sizes = [_whole(size) for size in _listed(values["block_out_channels"])]
        options = AutoencoderKLConfig(
            channels=sizes,
            blocks=_whole(values["layers_per_block"]),
            latent_channels=_whole(values["latent_channels"]),
            norm_groups=_whole(values["norm_num_groups"]),
            attention=_attending(values["down_block_types"], len(sizes)),
            mid_attention=_truth(values["mid_block_add_attention"]),
            quant_conv=_truth(values["use_quant_conv"]),
        )
    except TypeError as error:
        raise UserError(f"{path} has {error}") from error
    try:
        options.check()
    except UserError as error:
        raise UserError(f"{path} can't be used: {error}") from error
    expected = {**network_options(options, channels), "act_fn": "silu"}
    for key, value in expected.items():
        found = tuple(values[key]) if isinstance(values[key], list) else values[key]
        if found != value:
            raise UserError(f"{path} has {key}={str(values[key])[:200]}, {_remedy(key, value)}")
    return {name: getattr(options, name) for name in options.SIZES}


def _remedy(key: str, value: Any) -> str:
    if key in ("in_channels", "out_channels"):
        return f"but the images have {value}: use data.channels, or another autoencoder"
    if key == "down_block_types":
        return f"but only {DOWN} and {ATTENDING_DOWN} are known here, one for each of block_out_channels"
    if key == "up_block_types":
        return (
            f"but only {UP} and, at the resolutions where down_block_types has {ATTENDING_DOWN}, {ATTENDING_UP} are "
            f"known here: that would be {', '.join(value)}"
        )
    return f"but only {value} is known here"


def _listed(value: Any) -> Sequence[Any]:
    if not isinstance(value, list | tuple) or not 1 <= len(value) <= 16:
        raise TypeError(f"block_out_channels={str(value)[:200]}, which must be a list of 1 to 16 numbers")
    return value


def _attending(blocks: Any, count: int) -> list[int]:
    """Return `model.attention` of a list of blocks; `_stored_options` refuses what else it holds."""
    listed = blocks[:count] if isinstance(blocks, list | tuple) else ()
    return [2**level for level, block in enumerate(listed) if block == ATTENDING_DOWN]


def _whole(value: Any) -> int:
    if type(value) is not int or not 1 <= value <= 2**16:
        raise TypeError(f"{str(value)[:200]} where a whole number from 1 to {2**16} belongs")
    return value


def _truth(value: Any) -> bool:
    if type(value) is not bool:
        raise TypeError(f"{str(value)[:200]} where true or false belongs")
    return value


def _read_config(path: Path) -> dict[str, Any]:
    try:
        return parse_object(read_bounded(path, MOST_BYTES))
    except OSError as error:
        raise UserError(f"model.init_from={path.parent}: can't read {path} ({reason(error)}){_hint(path)}") from error
    except ValueError as error:
        raise UserError(f"{path} can't be used: {error}") from error


def _hint(path: Path) -> str:
    """What to give instead of a folder whose config.json can't be read; empty if nothing is known of it."""
    folder = path.parent
    below = [] if path.exists() else sorted([*folder.glob(f"*/{CONFIG}"), *folder.glob(f"export/*/{CONFIG}")])
    vae = folder / "vae" / CONFIG  # of a pipeline, which has several
    if vae in below or len(below) == 1:
        return f"; use model.init_from={(vae if vae in below else below[0]).parent}"
    own = [name for name in ("config.yaml", "manifest.json", "checkpoints") if (folder / name).exists()]
    if not path.exists() and own:
        return (
            f"; it has {own[0]}, as a run of this program, whose export for diffusers is needed: "
            f"vae-dist export {shlex.quote(str(folder))} 'export.formats=[diffusers]' writes it"
        )
    return ""


def _read_weights(folder: Path, options: AutoencoderKLConfig, channels: int) -> tuple[str, dict[str, Tensor]]:
    """Return the sha256 of the weights' file, and its tensors, which fit the options, under today's names."""
    shapes = shapes_of(network_options(options, channels))
    path = folder / WEIGHTS
    most = HEADER_BYTES + 8 * sum(shape.numel() for shape in shapes.values())
    try:
        content = read_bounded(path, most)
    except OSError as error:
        pickled = path.with_suffix(".bin")
        if pickled.exists() and not path.exists():
            raise UserError(
                f"{folder} has its weights in {pickled.name} alone, a pickle, which can run code when it is read: "
                f"write {WEIGHTS} with diffusers, by AutoencoderKL.from_pretrained and save_pretrained, if you trust it"
            ) from error
        variants = [] if path.exists() else sorted(folder.glob(f"{path.stem}.*{path.suffix}"))
        hint = f"; give {variants[0].name[:200]!a} this name" if variants else ""  # such as .fp16, of half precision
        raise UserError(f"model.init_from={folder}: can't read {path} ({reason(error)}){hint}") from error
    return hashlib.sha256(content).hexdigest(), _state(content, path, shapes)


def _state(content: bytes, path: Path, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    try:
        stored = {_today(name): tensor for name, tensor in load(content).items()}
    except Exception as error:  # an untrusted header can do anything to the parser
        raise UserError(f"{path} can't be read ({str(error).partition(chr(10))[0]})") from error
    if differing := sorted(name for name in stored.keys() ^ shapes.keys()):
        what = "lacks" if differing[0] in shapes else "has, unlike its config.json,"
        raise UserError(f"{path} {what} the weight {differing[0][:200]}, and {len(differing) - 1} others differ")
    for name, tensor in sorted(stored.items()):
        if tensor.shape != shapes[name]:
            raise UserError(f"{path} has {name} of {list(tensor.shape)}, and its config.json of {list(shapes[name])}")
        if not tensor.is_floating_point() or not bool(tensor.float().abs().amax().isfinite()):
            raise UserError(f"{path} has numbers in {name} that are not finite floats")
    return stored


def _today(name: str) -> str:
    """Return a weight's name in today's diffusers."""
    before, attention, after = name.partition(".attentions.")
    parts = after.split(".")  # such as 0, query, weight
    if attention and len(parts) == 3:
        parts[1] = _OLD_NAMES.get(parts[1], parts[1])
    return before + attention + ".".join(parts)
