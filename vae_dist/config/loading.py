"""Load one config from files and arguments, and save it to a file.

Later layers win: defaults, YAML files, `key=value` arguments. OmegaConf converts the text of each value to the type of
its key; no interpolation of its own ever reaches it, so none of its resolvers runs.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, replace
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

from vae_dist.config import conversion, shipped, yaml_text
from vae_dist.config.architectures import ARCHITECTURES
from vae_dist.config.arguments import YAML, parse_argument, separate, split_key
from vae_dist.config.checks import check, check_names_in_wandb
from vae_dist.config.differences import READER_KEYS
from vae_dist.config.keys import ARCHITECTURE, by_key, flatten, is_among, options, require_known
from vae_dist.config.paths import PATHS, expand
from vae_dist.config.schema import Config, EncodeConfig, ExportConfig
from vae_dist.config.text import as_text, leaves, require_text, truncate
from vae_dist.errors import UserError
from vae_dist.files import write_atomically

_REFERENCE = re.compile(r"\$\{([a-z_.]+)\}")


class Setting(NamedTuple):
    """A key, the value that a file or an argument gives it (None, text, or lists of these), and its source."""

    key: str
    value: Any
    source: str  # "some.yaml: ", or nothing for an argument: its message names the key


def load(arguments: Sequence[str]) -> Config:
    """The config of `[FILE.yaml ...] [key=value ...]`. Raises UserError for input that can't be used.

    `configs/NAME.yaml` is the package's own if there is no such file.
    """
    paths, arguments = separate(arguments, YAML)
    files = [shipped.find(Path(expand(path))) for path in paths]
    settings = [setting for path in files for setting in _read_settings(path, shipped.advice())]
    settings += _parse_settings(arguments)
    config = _apply(Config(), settings)
    if config.name is None:
        stem = re.sub(r"[^A-Za-z0-9._-]", "_", files[-1].stem).lstrip(".-")[:100] if files else "tutorial"
        config.name = f"{stem or 'run'}-{{time}}"
    if _has_id_of_a_run(settings):
        config.tracking.id = None  # that run reads it from its checkpoints
    config.tracking.owner = None
    check(config)
    check_names_in_wandb(config.tracking)
    return config


def load_reader(config: Config, arguments: Sequence[str]) -> Config:
    """The config of a finished run, changed by the `key=value` arguments of a command that only reads the run.

    Output paths, mirrors, other images, what is exported to where, and tracking.wandb=online come from the caller,
    never from the stored config.
    """
    keys = [split_key(argument)[0] for argument in arguments]
    for key in keys:
        if not is_among(key, READER_KEYS):
            require_known(key)
            allowed = ", ".join(f"{key}*" if key.endswith(".") else key for key in READER_KEYS)
            raise UserError(f"{key} belongs to the training and can't be changed here; these can: {allowed}")
    config = replace(
        config,
        output=None,
        runs_dir=Config().runs_dir,
        data=replace(config.data, mirror=None),
        train=replace(config.train, threads=None),  # this machine may have another number of cores
        evaluate=replace(config.evaluate, folder=None),
        encode=EncodeConfig(),
        export=ExportConfig(),
        tracking=replace(config.tracking, wandb="auto" if config.tracking.wandb == "online" else config.tracking.wandb),
    )
    config = _apply(config, _parse_settings(arguments))
    check(config)
    if any(key.startswith("tracking.") for key in keys):  # otherwise the stored names are not used
        check_names_in_wandb(config.tracking)
    return config


def take(arguments: Sequence[str], key: str) -> tuple[str, list[str]]:
    """The last value that the arguments give to a text key, or its default; and the other arguments."""
    own = [argument for argument in arguments if split_key(argument)[0] == key]
    config = _apply(Config(), _parse_settings(own))
    check(config)
    return flatten(config)[key], [argument for argument in arguments if argument not in own]


def read(path: Path) -> Config:
    """The config that `save` wrote. All values are literal: `${key}` is refused, and `~` is no home."""
    return _saved(_read_settings(path), path)


def parse(content: bytes, path: Path) -> Config:
    """The config in the content of a file that `save` wrote, as `read` returns it."""
    return _saved(_settings(yaml_text.decode(content, path), path), path)


def _saved(settings: Sequence[Setting], path: Path) -> Config:
    if any("${" in text for setting in settings for text in leaves(setting.value) if isinstance(text, str)):
        raise UserError(f"{path} holds an interpolation, which a saved config never does; don't trust it")
    config = _apply(Config(), settings, has_homes=False)
    check(config)
    return config


def save(config: Config, path: Path) -> None:
    write_atomically(path, to_yaml(config).encode())


def to_yaml(config: Config) -> str:
    return conversion.to_yaml(asdict(config))


def _has_id_of_a_run(settings: Sequence[Setting]) -> bool:
    """True if tracking.id comes from a config that a run has saved: no other config states an image shape."""
    sources = [setting.source for setting in settings if setting.key == "tracking.id"]
    saved = {setting.source for setting in settings if setting.key == "data.image_shape" and setting.value} - {""}
    return bool(sources) and sources[-1] in saved


def _parse_settings(arguments: Sequence[str]) -> list[Setting]:
    return [Setting(*parse_argument(argument), "") for argument in arguments]


def _read_settings(path: Path, if_missing: str = "") -> list[Setting]:
    require_text(str(path), "a file's name")
    if path.suffix not in YAML:
        value = f"{str(path).lstrip('-')}=VALUE" if str(path).lstrip("-") in by_key() else "key=value"
        raise UserError(f"can't use {truncate(repr(str(path)))}: give a YAML file, or {value} (--help lists the keys)")
    return _settings(yaml_text.read(path, if_missing), path)


def _settings(values: Any, path: Path) -> list[Setting]:
    """The settings in the values of a file. Raises UserError for unknown keys, and for a key that is given twice."""
    _require_architecture(values, path)  # its name says more than the first of its keys
    settings = list(_flat_settings(values, f"{path}: "))
    if twice := [key for key, count in Counter(setting.key for setting in settings).items() if count > 1]:
        raise UserError(f"{path}: {twice[0]} is given twice")
    return settings


def _require_architecture(values: Any, path: Path) -> None:
    """Raise UserError if a file names an architecture that this process lacks, whose keys are then unknown too."""
    group, _, name = ARCHITECTURE.partition(".")
    model = values.get(group) if isinstance(values, dict) else None
    named = model.get(name) if isinstance(model, dict) else None
    if isinstance(named, str) and "${" not in named and named not in ARCHITECTURES:
        raise UserError(f"{path}: {ARCHITECTURE} must be {by_key()[ARCHITECTURE].type}, not {as_text(named)}")


def _flat_settings(values: Any, source: str, prefix: str = "") -> Iterator[Setting]:
    """The settings in a file's nested `values`. Raises UserError for unknown keys."""
    if values is None:  # an empty file or group
        return
    if not isinstance(values, dict):
        raise UserError(f"{source}{prefix.rstrip('.') or 'it'} must hold keys and values, not {as_text(values)}")
    for name, value in values.items():
        key = prefix + name
        if any(other.startswith(f"{key}.") for other in by_key()):
            yield from _flat_settings(value, source, f"{key}.")
        else:
            require_known(key, source)
            yield Setting(key, value, source)


def _apply(config: Config, settings: Sequence[Setting], *, has_homes: bool = True) -> Config:
    """`config` with `settings`, later ones winning. Raises UserError for a value that does not fit its key.

    `~` at the start of a path is a home, unless `has_homes` is false.
    """
    config = _with_architecture(config, settings)
    for setting in settings:
        require_known(setting.key, setting.source, config)
    known = {option.key: option for option in options(config)}
    final = _final(config, settings)
    result = deepcopy(config)
    for key, value, source in settings:
        value = _interpolate(value, final, f"{source}{key}", config)
        try:
            if value is not None and not _fits(value, known[key].depth):
                raise TypeError
            if has_homes and key in PATHS and isinstance(value, str):
                value = expand(value, f"{source}{key}")
            group, _, name = key.rpartition(".")
            setattr(attrgetter(group)(result) if group else result, name, conversion.convert(value, known[key].hint))
        except TypeError as error:
            raise UserError(f"{source}{key} must be {known[key].type}, not {as_text(value)}") from error
    return result


def _with_architecture(config: Config, settings: Sequence[Setting]) -> Config:
    """`config` with the architecture that the last setting of it names; another than before has its own defaults."""
    given = [setting for setting in settings if setting.key == ARCHITECTURE]
    if not given:
        return config
    key, value, source = given[-1]
    name = _interpolate(value, _final(config, settings), f"{source}{key}", config)
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise UserError(f"{source}{key} must be {by_key()[key].type}, not {as_text(name)}")
    model = ARCHITECTURES[name]
    return config if type(config.model) is model else replace(config, model=model(architecture=name))


def _final(config: Config, settings: Sequence[Setting]) -> dict[str, Any]:
    """The values by key, those of later settings winning."""
    return {**flatten(config), **{setting.key: setting.value for setting in settings}}


def _fits(value: Any, depth: int) -> bool:
    """True for text in `depth` lists. OmegaConf would take a list for text, and `???` for a missing value."""
    if isinstance(value, list):
        return depth > 0 and all(_fits(item, depth - 1) for item in value)
    return depth == 0 and isinstance(value, str) and value != "???"


def _interpolate(value: Any, values: Mapping[str, Any], where: str, config: Config) -> Any:
    """`value` with each `${key}` in its text replaced by that key's value in `values`, once.

    Raises UserError for a key that `config` lacks.
    """
    if isinstance(value, list):
        return [_interpolate(item, values, where, config) for item in value]
    if not isinstance(value, str):
        return value

    def referenced(match: re.Match[str]) -> str:
        require_known(match[1], f"{where}: ", config)
        other = values[match[1]]
        if other is None or isinstance(other, list | dict):
            raise UserError(f"{where}: {match[0]} must stand for a text or number, but {match[1]} is {as_text(other)}")
        return other if isinstance(other, str) else as_text(other)

    require_text(value, where)
    filled = _REFERENCE.sub(referenced, value)
    require_text(filled, where)
    if "${" in filled:
        raise UserError(f"{where}: ${{...}} takes a key whose value has no ${{...}} itself: {truncate(value)}")
    return filled
