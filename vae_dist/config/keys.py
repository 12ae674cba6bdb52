"""The config as a flat table of keys, such as `model.latent_dim`."""

import dataclasses
import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from operator import attrgetter
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from vae_dist.config.schema import Config
from vae_dist.config.text import truncate
from vae_dist.errors import UserError


@dataclass(frozen=True)
class Option:
    """A key as `--help` shows it."""

    key: str
    type: str
    default: Any
    help: str
    above: float | None
    at_least: float | None
    at_most: float | None
    depth: int  # 0 for a scalar, 1 for a list, 2 for a list of lists


def options(section: Any = Config, prefix: str = "") -> Iterator[Option]:
    """Every option, in the order of the schema."""
    hints = get_type_hints(section)
    for item in dataclasses.fields(section):
        hint = hints[item.name]
        if dataclasses.is_dataclass(hint):
            yield from options(hint, f"{prefix}{item.name}.")
            continue
        has_factory = item.default_factory is not dataclasses.MISSING
        default = item.default_factory() if has_factory else item.default  # type: ignore[operator]
        depth = str(hint).count("list[")
        yield Option(f"{prefix}{item.name}", _type_name(hint), default, depth=depth, **item.metadata)


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


@cache
def by_key() -> dict[str, Option]:
    return {option.key: option for option in options()}


def flatten(config: Config) -> dict[str, Any]:
    """The config as `{"model.latent_dim": 40, ...}`."""
    return {key: attrgetter(key)(config) for key in by_key()}


def require_known(key: str, source: str = "") -> None:
    """Raise UserError for a key that the config lacks; the message suggests others."""
    known = by_key()
    if key in known:
        return
    if inside := [other for other in known if other.startswith(f"{key}.")]:
        raise UserError(f"{key} is a group of keys; set one of them: {', '.join(inside)}")
    last = key.rpartition(".")[2]
    same_last = [other for other in known if other.rpartition(".")[2] == last]
    guesses = same_last or difflib.get_close_matches(key, known, n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join(guesses)}?" if guesses else "--help lists the keys"
    raise UserError(f"{source}unknown key {truncate(repr(key))}; {hint}")
