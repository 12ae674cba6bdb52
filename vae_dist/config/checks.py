"""Checks of values: impossible for every run, or on this machine."""

import json
import math
import re
from collections.abc import Iterable
from dataclasses import asdict
from itertools import pairwise
from typing import Any
from urllib.parse import urlsplit

from PIL import ImageColor

from vae_dist.config import yaml_text
from vae_dist.config.architectures import ARCHITECTURES
from vae_dist.config.data import BINARY_SETS, OWN_IMAGES, DataConfig
from vae_dist.config.keys import Option, flatten, options
from vae_dist.config.memory import require_memory
from vae_dist.config.networks import ModelConfig
from vae_dist.config.optimization import SIGMA_FLOOR, ObjectiveConfig, OptimConfig
from vae_dist.config.paths import PATHS, check_path
from vae_dist.config.schema import Config, TrackingConfig
from vae_dist.config.text import as_text, leaves, require_text, truncate
from vae_dist.errors import UserError

_RUN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._{}-]{0,127}")
_WANDB_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


def check(config: Config) -> None:
    """Raise UserError for the first value that is impossible for every run, or on this machine."""
    if ARCHITECTURES.get(config.model.architecture) is not type(config.model):
        raise UserError(
            f"model.architecture={as_text(config.model.architecture)} does not fit {type(config.model).__name__}: "
            "choose a class of vae_dist.config.architectures.ARCHITECTURES with its own name"
        )
    values = flatten(config)
    for option in options(config):
        for item in leaves(values[option.key]):
            _check_value(option, item)
    for key in PATHS:
        check_path(key, values.get(key) or "")  # an architecture's own may not apply
    if config.data.image_shape is not None and len(config.data.image_shape) != 3:
        raise UserError(f"data.image_shape must be channels, height and width, not {as_text(config.data.image_shape)}")
    _check_own_images(config.data)
    _check_classes(config)
    if config.data.mirror is not None:
        _check_mirror(config.data.mirror)
    if config.name is not None and not _RUN_NAME.fullmatch(config.name):
        raise UserError(
            f"name={truncate(repr(config.name))} can't be a folder's name: use A to Z, a to z, 0 to 9, '_', and after "
            "the first one '.' and '-', up to 128 of them"
        )
    if config.tracking.id is not None and not _WANDB_ID.fullmatch(config.tracking.id):
        raise UserError(
            f"tracking.id={config.tracking.id!r} can't be the ID of a W&B run: use A to Z, a to z, 0 to 9, '_' and "
            "'-', up to 64 of them"
        )
    config.model.check()
    if config.train.freeze == "encoder" and getattr(config.model, "init_from", None) is None:
        raise UserError(
            "train.freeze=encoder needs model.init_from, a folder with the encoder's weights: those of a new model are "
            "random"
        )
    if config.evaluate.fid_samples is not None and config.evaluate.inception is None:
        raise UserError(
            "evaluate.fid_samples needs evaluate.inception, the file of the weights of FID's Inception: name it, or "
            "leave out evaluate.fid_samples"
        )
    _check_checkpointing(config)
    _check_objective(config.objective, config.model)
    _check_optim(config.optim)
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
        if option.below is not None and item >= option.below:
            raise UserError(f"{option.key} must be below {option.below}, not {as_text(item)}")
    if isinstance(item, int) and abs(item) >= 2**63:
        raise UserError(f"{option.key} must be below 2^63, not {as_text(item)}")


def _check_checkpointing(config: Config) -> None:
    if not config.train.checkpointing:
        return
    if not config.model.RECOMPUTES:
        names = [name for name, model in ARCHITECTURES.items() if model.RECOMPUTES]
        raise UserError(
            f"train.checkpointing=true is for model.architecture={', '.join(names[:-1])} or {names[-1]}: "
            f"{config.model.architecture} keeps few activations"
        )
    if config.train.compile:
        raise UserError(
            "train.checkpointing=true does not go with train.compile=true: a compiled step takes gradients in another "
            "way; use one of the two"
        )


def _check_objective(objective: ObjectiveConfig, model: ModelConfig) -> None:
    if objective.is_importance_weighted and (objective.beta != 1 or objective.beta_warmup_steps):
        raise UserError(
            f"objective.bound={objective.bound} has no KL term to weigh: use objective.beta=1 and "
            "objective.beta_warmup_steps=0, or objective.bound=elbo"
        )
    if objective.bound == "iwae_dreg" and model.HIERARCHICAL:
        raise UserError(
            f"objective.bound=iwae_dreg is for one level of latents, and model.architecture={model.architecture} has "
            "several: use objective.bound=iwae"
        )
    if objective.sigma_kind == "optimal" and objective.is_importance_weighted:
        raise UserError(
            "objective.sigma_kind=optimal is the optimum of the ELBO: use objective.sigma_kind=learned with "
            f"objective.bound={objective.bound}"
        )
    if objective.sigma_kind != "fixed" and objective.sigma is not None and objective.sigma <= SIGMA_FLOOR:
        raise UserError(
            f"objective.sigma_kind={objective.sigma_kind} can't start from objective.sigma={objective.sigma:g}: use "
            f"more than {SIGMA_FLOOR:.2g}, the standard deviation of the rounding of pixels to 8 bits"
        )


def _check_optim(optim: OptimConfig) -> None:
    if len(optim.betas) != 2:
        raise UserError(f"optim.betas must be two numbers, such as [0.9,0.999], not {as_text(optim.betas)}")
    if optim.stages is None:
        return
    if not optim.stages or any(len(stage) != 2 for stage in optim.stages):
        raise UserError(
            f"optim.stages must be pairs [[step, rate], ...], such as [[0,0.001],[1000,0.0001]], not "
            f"{as_text(optim.stages)}"
        )
    steps, rates = zip(*optim.stages, strict=True)
    if steps[0] != 0 or any(step != int(step) for step in steps) or any(a >= b for a, b in pairwise(steps)):
        raise UserError(f"the steps of optim.stages must be whole numbers that rise from 0, not {as_text(list(steps))}")
    if min(rates) <= 0:
        raise UserError(f"the rates of optim.stages must be above 0, not {as_text(min(rates))}")


def _check_own_images(data: DataConfig) -> None:
    if data.name in OWN_IMAGES and data.path is None:
        raise UserError(f"data.name={data.name} needs data.path, the path of your images")
    if data.path is not None and data.name not in OWN_IMAGES:
        raise UserError(f"data.path is for data.name={' or '.join(OWN_IMAGES)}, not for data.name={data.name}")
    if data.name in BINARY_SETS and data.binarize != "none":
        raise UserError(
            f"data.binarize={data.binarize} is for grey images, and those of {data.name} are black and white already: "
            "use data.binarize=none, or data.name=mnist"
        )
    if data.channels == 2:
        raise UserError("data.channels must be 1 (grey) or 3 (colour), not 2")
    if data.binarize != "none" and data.channels != 1 and data.name in OWN_IMAGES:
        raise UserError(f"data.binarize={data.binarize} is for grey images: use data.channels=1, or data.binarize=none")
    try:
        ImageColor.getrgb(data.background)
    except ValueError as error:
        raise UserError(
            f"data.background={truncate(data.background)} is no colour: use a name such as white, or #rrggbb"
        ) from error


def _check_classes(config: Config) -> None:
    classes = config.data.classes
    for key, given in (("data.classes", classes), ("sample.labels", config.sample.labels)):
        if given is not None and not config.model.conditional:
            raise UserError(f"{key} is for a conditional model, which is trained with model.conditional=true")
        if given is not None and not given:
            raise UserError(f"{key} must name at least one class")
    if classes is not None and len(set(classes)) < len(classes):
        raise UserError(f"data.classes has the same name twice: {truncate(', '.join(classes))}")


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
        raise UserError(
            f"the config is too large: {yaml_text.MAX_VALUES} values and {largest} characters are the most; shorten "
            "its lists"
        )


def _count(value: Any) -> int:
    """The number of values, as `yaml_text` counts them."""
    inside: Iterable[Any] = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + sum(_count(item) for item in inside)


def _check_memory(config: Config) -> None:
    """Raise UserError for sizes whose numbers alone would not fit into this machine's memory."""
    shape = config.data.image_shape or [1, 1, 1]
    values = flatten(config)
    sizes = [one.key for one in options(config) if one.architecture and type(values[one.key]) in (int, list)]
    latents = config.model.latents(shape)
    bytes_of = {
        f"the model's weights ({', '.join(sizes)})": 4 * config.model.weights_at_least(shape),
        "the latents of sample.count images": 4 * config.sample.count * latents,
        "the images of sample.rows and sample.steps": 4 * config.sample.images_at_least(latents) * math.prod(shape),
        "the latents of objective.samples samples of an image": 4 * config.objective.samples * latents,
    }
    for subject, needed in bytes_of.items():
        require_memory(subject, needed)


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
