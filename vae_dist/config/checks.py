"""Checks of values: impossible for every run, on this machine, or in this precision."""

import json
import math
import re
from collections.abc import Iterable
from dataclasses import asdict
from itertools import pairwise
from typing import Any
from urllib.parse import urlsplit

import psutil

from vae_dist.config import yaml_text
from vae_dist.config.keys import Option, by_key, flatten
from vae_dist.config.paths import PATHS, check_path
from vae_dist.config.schema import Config, TrackingConfig
from vae_dist.config.text import as_text, leaves, require_text, truncate
from vae_dist.errors import UserError

# The smallest and the largest normal number of the two types: anything smaller is flushed to 0.
_FLOAT32 = 2.0**-126, 2.0**128 * (1 - 2.0**-24)
_FLOAT64 = 2.0**-1022, 2.0**1023 * (2 - 2.0**-52)

# The range in which training usually works, and its wording in a message.
_USUAL = {
    "objective.sigma": (0.01, math.inf, "0.01 to 1"),
    "objective.beta": (0.0, 1000.0, "up to 10"),
    "optim.learning_rate": (0.0, 0.02, "0.0001 to 0.003"),
}

_RUN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._{}-]{0,127}")
_WANDB_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


def check(config: Config) -> None:
    """Raise UserError for the first value that is impossible for every run, or on this machine."""
    values = flatten(config)
    for key, option in by_key().items():
        for item in leaves(values[key]):
            _check_value(option, item)
    for key in PATHS:
        check_path(key, values[key] or "")
    if config.data.image_shape is not None and len(config.data.image_shape) != 3:
        raise UserError(f"data.image_shape must be channels, height and width, not {as_text(config.data.image_shape)}")
    if config.data.mirror is not None:
        _check_mirror(config.data.mirror)
    if config.name is not None and not _RUN_NAME.fullmatch(config.name):
        raise UserError(
            f"name={truncate(repr(config.name))} can't be a folder's name: use letters, digits, '.', '_' and '-', "
            "up to 128 of them"
        )
    if config.tracking.id is not None and not _WANDB_ID.fullmatch(config.tracking.id):
        raise UserError(
            f"tracking.id={config.tracking.id!r} can't be the ID of a W&B run: use letters, digits, '_' and '-', up to "
            "64 of them"
        )
    _check_size(config)
    _check_memory(config)


def _check_value(option: Option, item: Any) -> None:
    if isinstance(item, float) and not math.isfinite(item):
        raise UserError(f"{option.key} must be a finite number, not {item}")
    if isinstance(item, str):
        require_text(item, option.key)
    if isinstance(item, int | float):
        if option.at_least is not None and item < option.at_least:
            raise UserError(f"{option.key} must be at least {option.at_least}, not {as_text(item)}")
        if option.above is not None and item <= option.above:
            raise UserError(f"{option.key} must be above {option.above}, not {as_text(item)}")
        if option.at_most is not None and item > option.at_most:
            raise UserError(f"{option.key} must be at most {option.at_most}, not {as_text(item)}")
    if isinstance(item, int) and abs(item) >= 2**63:
        raise UserError(f"{option.key} must be below 2^63, not {as_text(item)}")


def _check_mirror(mirror: str) -> None:
    """Raise UserError for a mirror that is no address or holds a secret. The message does not repeat the mirror."""
    try:
        parts = urlsplit(mirror)
        secret = "@" in parts.netloc or bool(parts.query or parts.fragment)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        secret, good = False, False
    if secret:
        raise UserError("data.mirror must hold no user, password or token: it is saved with the run and sent to W&B")
    if not good or not mirror.isascii() or " " in mirror:
        raise UserError("data.mirror must be like https://host/folder")


def _check_size(config: Config) -> None:
    """Raise UserError for a config that could not be read again once it is saved."""
    nested = asdict(config)
    largest = yaml_text.MAX_BYTES // 2  # YAML takes less than twice the room of JSON
    if _count(nested) > yaml_text.MAX_VALUES or len(json.dumps(nested)) > largest:
        raise UserError(f"the config is too large: {yaml_text.MAX_VALUES} values and {largest} characters are the most")


def _count(value: Any) -> int:
    """The number of values, as `yaml_text` counts them."""
    inside: Iterable[Any] = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + sum(_count(item) for item in inside)


def _check_memory(config: Config) -> None:
    """Raise UserError for sizes whose numbers alone would not fit into this machine's memory."""
    memory = psutil.virtual_memory().total
    # A layer between two sizes has at least as many weights as their product; the encoder has it, and the decoder.
    sizes = [math.prod(config.data.image_shape or [1]), *config.model.hidden_dims, config.model.latent_dim]
    bytes_of = {
        "the model's weights (model.hidden_dims, model.latent_dim)": 8 * sum(a * b for a, b in pairwise(sizes)),
        "the latents of sample.count images": 4 * config.sample.count * config.model.latent_dim,
    }
    for subject, needed in bytes_of.items():
        if needed > memory:
            raise UserError(
                f"{subject} would take {needed / 2**30:.3g} GiB, and this machine has {memory / 2**30:.3g}; use less"
            )


def check_names_in_wandb(tracking: TrackingConfig) -> None:
    """Raise UserError for names that W&B's client or server rejects."""
    if tracking.wandb == "disabled":
        return
    for key, name in (("project", tracking.project), ("entity", tracking.entity)):
        if name is None:
            continue
        if any(character in name for character in "/\\#?%:") or not name.strip() or len(name) > 128:
            entity, _, project = name.partition("/")
            is_both = key == "project" and bool(entity and project) and tracking.entity is None
            hint = f"; use tracking.entity={entity} tracking.project={project}" if is_both else ""
            raise UserError(
                f"W&B takes no tracking.{key}={truncate(name)}: use 1 to 128 characters, none of / \\ # ? % :{hint}"
            )
    if bad := [tag for tag in tracking.tags if not 1 <= len(tag) <= 64]:
        raise UserError(f"tracking.tags has {truncate(repr(bad[0]))}, which W&B does not take: use 1 to 64 characters")


def check_numbers(config: Config) -> None:
    """Raise UserError for numbers that would overflow or vanish in a training of this precision, `auto` being fp32."""
    precision = "fp32" if config.train.precision == "auto" else config.train.precision
    smallest, largest = _FLOAT64 if precision == "fp64" else _FLOAT32
    bounds = {
        "optim.learning_rate": _FLOAT32,  # Adam's, in every precision
        "optim.max_grad_norm": (smallest, math.inf),
        # They scale gradients, whose norm is the root of a sum of squares: sigma by its own square's reciprocal.
        "objective.beta": (smallest, largest**0.5),
        "objective.sigma": (largest**-0.25, smallest**-0.5),
    }
    values = flatten(config)
    if config.objective.reconstruction != "gaussian":
        del bounds["objective.sigma"]
    for key, (least, most) in bounds.items():
        if values[key] and not least <= values[key] <= most:
            zero = "0, or " if key == "objective.beta" else ""
            limits = f"at least {least:.2g}" if most == math.inf else f"from {least:.2g} to {most:.2g}"
            raise UserError(
                f"{key}={values[key]:g} can't be used in {precision}: the loss or its gradients would "
                f"overflow or vanish; use {zero}a value {limits}"
            )


def suspects(config: Config) -> list[str]:
    """Return the settings that probably made numbers infinite, the most likely first: `key=value (usual: ...)`."""
    values = flatten(config)
    usual = {key: (low, high) for key, (low, high, _) in _USUAL.items()}
    if config.objective.reconstruction != "gaussian":
        del usual["objective.sigma"]
    distance = {
        key: max(low / values[key] if values[key] else 0.0, values[key] / high) for key, (low, high) in usual.items()
    }
    unusual = sorted((key for key in distance if distance[key] > 1), key=lambda key: -distance[key])
    return [f"{key}={values[key]:g} (usual: {_USUAL[key][2]})" for key in unusual]
