"""Studies: one training for each value of a key, `model.latent_dim=2,5,10`."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vae_dist.config.arguments import YAML, separate, split_key
from vae_dist.config.checks import check
from vae_dist.config.differences import READER_KEYS
from vae_dist.config.keys import flatten, is_among
from vae_dist.config.loading import load
from vae_dist.config.paths import PATHS
from vae_dist.config.schema import Config
from vae_dist.config.text import as_text, truncate
from vae_dist.errors import UserError

DEFAULT_STUDY = "model.latent_dim=2,5,10,20,40"


class Study(NamedTuple):
    """Trainings that differ in one key."""

    key: str
    configs: list[Config]
    reading: list[str]  # those of its arguments that apply to reading the finished runs too
    output: Path  # for their comparison


def load_study(arguments: Sequence[str]) -> Study:
    """The study of `[FILE.yaml ...] KEY=V1,V2,... [key=value ...]`; DEFAULT_STUDY if no key has several values.

    Commas inside brackets or quotes separate no values. The runs are named `<name>-<key>-<value>`, without a time, so
    that the same command finds them again. Raises UserError for input that can't be used.
    """
    settings = separate(arguments, YAML)[1]
    several = [argument for argument in settings if len(_alternatives(argument)) > 1]
    rest = [argument for argument in arguments if argument not in several]
    varied = several[0] if several else DEFAULT_STUDY
    key = split_key(varied)[0]
    if len(several) > 1:
        raise UserError(
            f"a study varies one key, not {truncate(' and '.join(several))}; quotes keep a comma in a value"
        )
    if any(argument.removeprefix("--").startswith(f"{key}=") for argument in rest):
        raise UserError(f"a study needs several values of {key} in one argument, such as {DEFAULT_STUDY}")
    if key in ("name", "runs_dir", "output"):
        raise UserError(f"a study can't vary {key}: it names its runs and folders itself")
    if not several and key not in flatten(base := load(rest)):
        raise UserError(
            f"a study of model.architecture={base.model.architecture} needs several values of a key in one argument, "
            "such as optim.learning_rate=0.001,0.0003"
        )
    configs = [load([*rest, f"{key}={value}"]) for value in _alternatives(varied)]
    stem = f"{str(configs[0].name).removesuffix('-{time}')}-{key.rpartition('.')[2]}"
    output = Path(configs[0].output or f"{configs[0].runs_dir}/{stem}")
    for config in configs:
        config.name = f"{stem}-{_as_name(flatten(config)[key])}"
        config.output = None
        config.tracking.group = config.tracking.group or stem
        check(config)
    if "{time}" in stem:
        raise UserError(f"a study finds its runs by their names; leave {{time}} out of {stem}")
    if len({config.name for config in configs}) < len(configs):
        raise UserError(f"two of the values are the same: {truncate(varied)}")
    if configs[0].tracking.id is not None:
        raise UserError("tracking.id is one run's, and a study has several; leave it out")
    keys = {argument: split_key(argument)[0] for argument in settings if argument not in several}
    reading = [
        argument for argument, key in keys.items() if is_among(key, READER_KEYS) and key not in ("output", "runs_dir")
    ]
    return Study(key, configs, reading, output)


def _alternatives(argument: str) -> list[str]:
    """The values of `key=value,value`; a path is one value."""
    key, text = split_key(argument)
    if key in PATHS:
        return [text]
    values, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'" and (depth or not values[-1]):
            quote = character
        else:
            depth += (character in "[{") - (character in "]}")
        if character == "," and not depth and not quote:
            values.append("")
        else:
            values[-1] += character
    return values


def _as_name(value: Any) -> str:
    """The value as part of a folder's name: `[400, 400]` as `400-400`."""
    text = re.sub(r"[\[\] ]", "", as_text(value)).replace(",", "-")
    return re.sub(r"[^A-Za-z0-9._-]", "_", text) or "empty"
