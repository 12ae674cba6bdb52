"""The grammar of a command's arguments: paths and `key=value`."""

import json
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vae_dist.config import yaml_text
from vae_dist.config.keys import by_key, flatten, is_among, options, require_known
from vae_dist.config.paths import PATHS, expand, is_path
from vae_dist.config.schema import Config
from vae_dist.config.text import require_text, text_of, truncate
from vae_dist.errors import UserError

YAML = (".yaml", ".yml")
_OF_ONE_RUN = ("name", "runs_dir", "output", "data.image_shape", "tracking.")  # another run may have other values


def separate(arguments: Sequence[str], suffixes: tuple[str, ...] = ("",)) -> tuple[list[str], list[str]]:
    """Split arguments into paths with one of the suffixes and `key=value`."""
    paths = [text for text in arguments if "=" not in text or (text.endswith(suffixes) and is_path(text))]
    return paths, [argument for argument in arguments if argument not in paths]


def split_run(arguments: Sequence[str]) -> tuple[Path | None, list[str]]:
    """Split `[RUN] [key=value ...]` into the run's path, None if it is left out, and the rest."""
    paths, rest = split_runs(arguments)
    if len(paths) > 1:
        raise UserError(f"give one run, not {truncate(', '.join(map(str, paths)))}")
    return paths[0] if paths else None, rest


def split_runs(arguments: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Split `[RUN ...] [key=value ...]` into the runs' paths and the rest. An existing path may have a `=` in it."""
    paths, rest = separate(arguments)
    for path in paths:
        require_text(path, "a run's path")
        if path.startswith("hf://"):
            raise UserError(
                f"commands don't download {truncate(path)}: get it by `hf download USER/NAME --local-dir FOLDER`, and "
                "give FOLDER (in Python vae_dist.load takes hf://USER/NAME)"
            )
        if path.startswith("-") and not is_path(path):
            raise UserError(
                f"unknown option {truncate(path)}; give a run's directory and key=value (--help lists them)"
            )
    return [Path(expand(path)) for path in paths], rest


def split_key(argument: str) -> tuple[str, str]:
    """Split `key=value` into key and text; dashes before the key are dropped."""
    require_text(argument, "an argument", limit=None)
    key, separator, text = argument.partition("=")
    if not separator:
        raise UserError(f"can't use {truncate(repr(argument))}: give key=value (--help lists the keys)")
    return key.removeprefix("--"), text


def parse_argument(argument: str) -> tuple[str, Any]:
    """Parse `a.b=value` into key and value. The inverse of `argument`.

    Without brackets or quotes a value is text, whatever it looks like: `name=a: b`, `name=#1`. So is a value in
    brackets for a key of text, and a path that exists.
    """
    key, text = split_key(argument)
    require_known(key)
    holds_path, holds_text = key in PATHS, by_key()[key].type.startswith("text")
    is_yaml = text in ("null", "") or (text == "~" and not holds_path) or text[:1] in ('"', "'")
    if (not holds_text and text[:1] in ("[", "{")) or (is_yaml and not (holds_path and os.path.lexists(text))):
        return key, yaml_text.parse(text, key)
    return key, text


def argument(key: str, value: Any) -> str:
    """Return `key=value` as a user types it to give the key this value."""
    is_parsed = isinstance(value, list) or (
        isinstance(value, str) and (value[:1] in tuple("[{\"'~") or value in ("null", ""))
    )
    return f"{key}={json.dumps(value, ensure_ascii=False) if is_parsed else text_of(value)}"  # JSON is YAML


def training_command(config: Config, start: Sequence[str]) -> str:
    """Return the command that trains a run again, under another name. `start` are the words before its arguments."""
    values = flatten(config)
    arguments = [
        argument(option.key, values[option.key])
        for option in options(config)
        if values[option.key] != option.default and not is_among(option.key, _OF_ONE_RUN)
    ]
    return shlex.join([*start, *arguments, f"name={str(config.name)[:100]}-again"])  # a name has up to 128 characters
