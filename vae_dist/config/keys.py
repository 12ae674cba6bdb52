"""The config as a flat table of keys, such as `model.latent_dim`."""

import dataclasses
import difflib
import textwrap
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from operator import attrgetter
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from vae_dist.config.architectures import ARCHITECTURES
from vae_dist.config.networks import ModelConfig
from vae_dist.config.schema import Config
from vae_dist.config.text import as_text, truncate
from vae_dist.errors import UserError

ARCHITECTURE = "model.architecture"  # the key that decides which other keys of the model there are

# Names that other programs give to an option, with the end of its key here. No distance of letters finds these.
_OTHER_NAMES = {
    "lr": "learning_rate", "wd": "weight_decay", "clip": "max_grad_norm", "grad_clip": "max_grad_norm",
    "batch": "batch_size", "bs": "batch_size", "epoch": "epochs", "latent": "latent_dim", "latent_size": "latent_dim",
    "z_dim": "latent_dim", "zdim": "latent_dim", "hidden": "hidden_dims", "hidden_size": "hidden_dims",
    "dataset": "data.name", "data_dir": "data.root", "likelihood": "objective.reconstruction", "arch": "architecture",
}  # fmt: skip


@dataclass(frozen=True)
class Option:
    """A key as `--help` shows it."""

    key: str
    type: str
    hint: Any  # the type itself
    default: Any
    help: str
    above: float | None
    at_least: float | None
    at_most: float | None
    below: float | None
    depth: int  # 0 for a scalar, 1 for a list, 2 for a list of lists
    architecture: str | None  # whose option it is; None if all have it


def options(config: Config | None = None) -> tuple[Option, ...]:
    """Return the options of a config in the order of the schema, or by default those of all architectures.

    A key of several architectures then comes once for each.
    """
    return _options(tuple(ARCHITECTURES.values()) if config is None else (type(config.model),))


@cache
def _options(models: tuple[type[ModelConfig], ...]) -> tuple[Option, ...]:
    return tuple(_section(Config, "", models))


def _section(
    section: Any, prefix: str, models: Sequence[type[ModelConfig]] = (), without: Collection[str] = ()
) -> Iterator[Option]:
    """The options of a dataclass and of those in it. After those of ModelConfig come those of each of `models`."""
    hints = get_type_hints(section)
    for item in dataclasses.fields(section):
        key, hint = f"{prefix}{item.name}", hints[item.name]
        if item.name in without:
            continue
        if not dataclasses.is_dataclass(hint):
            yield _option(item, hint, key)
            continue
        yield from _section(hint, f"{key}.")
        for model in models if hint is ModelConfig else ():
            shared = [field.name for field in dataclasses.fields(ModelConfig)]
            for option in _section(model, f"{key}.", without=shared):
                yield dataclasses.replace(option, architecture=model.architecture)


def _option(item: "dataclasses.Field[Any]", hint: Any, key: str) -> Option:
    has_factory = item.default_factory is not dataclasses.MISSING
    default = item.default_factory() if has_factory else item.default  # type: ignore[operator]
    name = f"one of {', '.join(ARCHITECTURES)}" if key == ARCHITECTURE else _type_name(hint)
    depth = str(hint).count("list[")
    return Option(key, name, hint, default, depth=depth, architecture=None, **item.metadata)


def _type_name(hint: Any) -> str:
    """The type as a user reads it: `int or null`, `one of none, threshold, dynamic`, `list of lists of float`."""
    kind, inner = get_origin(hint), get_args(hint)
    if kind is Literal:
        return f"one of {', '.join(inner)}"
    if kind is UnionType:
        return f"{_type_name(inner[0])} or null"
    if kind is list:
        return f"list of {_type_name(inner[0]).replace('list', 'lists')}"
    return "text" if hint is str else str(hint.__name__)


def by_key() -> dict[str, Option]:
    """Return the options of all architectures by key, those of ARCHITECTURES at the time of the call."""
    return _by_key(tuple(ARCHITECTURES.values()))


@cache
def _by_key(models: tuple[type[ModelConfig], ...]) -> dict[str, Option]:
    return {option.key: option for option in _options(models)}


def flatten(config: Config) -> dict[str, Any]:
    """Return the config as `{"model.latent_dim": 40, ...}`, with the keys of its architecture alone."""
    return {option.key: attrgetter(option.key)(config) for option in options(config)}


def require_known(key: str, source: str = "", config: Config | None = None) -> None:
    """Raise UserError for a key that every config lacks, or that `config` lacks; the message suggests others."""
    known = by_key()
    if key in known:
        if config is not None and key not in (own := [option.key for option in options(config)]):
            architecture = config.model.architecture
            its_own = [name for name in own if known[name].architecture is not None]
            raise UserError(
                f"{source}{key} does not apply to {ARCHITECTURE}={architecture}, which has {', '.join(its_own)}"
            )
        return
    if inside := [other for other in known if other.startswith(f"{key}.")]:
        raise UserError(f"{key} is a group of keys; set one of them: {', '.join(inside)}")
    last = key.rpartition(".")[2].replace("-", "_")
    end = "." + _OTHER_NAMES.get(last, last)
    same_last = [other for other in known if f".{other}".endswith(end)]
    guesses = same_last or difflib.get_close_matches(key, known, n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join(guesses)}?" if guesses else "--help lists the keys"
    raise UserError(f"{source}unknown key {truncate(repr(key))}; {hint}")


def is_among(key: str, names: Collection[str]) -> bool:
    """Return whether a key is one of these, or in a section among them: "train." for one, "" for all."""
    return any(key == name or (key.startswith(name) and name[-1:] in ("", ".")) for name in names)


def help_text(usage: str, names: Collection[str] = ("",)) -> str:
    """The text of `--help`: the usage, then every key among `names`, with its type, default, meaning and bounds.

    The meaning of a key of one architecture begins with that architecture's name.
    """
    shown = [option for option in options() if is_among(option.key, names)]
    lines = [usage.rstrip(), *(["", "Keys, with their types and defaults:"] if shown else [])]
    for option in shown:
        limits = {"at least": option.at_least, "above": option.above, "at most": option.at_most, "below": option.below}
        bounds = ", ".join(f"{word} {limit}" for word, limit in limits.items() if limit is not None)
        scope = f"{option.architecture}: " if option.architecture else ""
        meaning = scope + option.help + (f" ({bounds})" if bounds else "")
        lines.append(f"  {option.key}={as_text(option.default)}   [{option.type}]")
        lines.extend(textwrap.wrap(meaning, 100, initial_indent=" " * 8, subsequent_indent=" " * 8))
    return "\n".join(lines)
