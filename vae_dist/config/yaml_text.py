"""YAML as text: the scalars of a document stay what was typed, and nothing in it is ever constructed or run."""

import re
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import ComposerError

from vae_dist.config.text import truncate
from vae_dist.errors import UNPRINTABLE, UserError
from vae_dist.files import read_bounded

# More than any run needs, and few enough to be read within seconds.
MAX_BYTES = 2**20  # of a file
MAX_VALUES = 20_000  # of a file, of an argument, of a config; a list counts, and each of its items
MAX_DEPTH = 8  # of lists and keys in one another

_NULL = "tag:yaml.org,2002:null"


class _Loader(yaml.BaseLoader):
    """Lists, dicts, text and None. Aliases, anchors, tags and double keys are refused; so is what is too large."""

    _count, _depth = 1, 0  # the document itself counts

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        self._count += index is not None  # an item or a value; a key does not count
        if self._count > MAX_VALUES:
            raise _refused(f"it has more than {MAX_VALUES} values", event)
        if event.anchor is not None:
            raise _refused(
                "'&' and '*' make aliases, which a config can't have; write the value out or quote it", event
            )
        if getattr(event, "tag", None) is not None:
            raise _refused("'!' makes a tag, which a config can't have; quote text that begins with it", event)
        if unprintable := UNPRINTABLE.search(getattr(event, "value", "")):
            raise _refused(f"it has the character {unprintable[0]!a}, which no path or name can have", event)
        if self._depth > MAX_DEPTH:
            raise _refused("it is nested too deeply", event)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        values: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            key = self.construct_object(key_node)
            if not isinstance(key, str):
                raise _refused("a key must be text", key_node)
            if key in values:
                raise _refused(f"{truncate(repr(key))} is given twice", key_node)
            values[key] = self.construct_object(value_node, deep)
        return values


_Loader.add_implicit_resolver(_NULL, re.compile(r"(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Loader.add_constructor(_NULL, lambda loader, node: None)


def _refused(problem: str, place: Any) -> ComposerError:
    """Return the error for YAML that is valid but that no config may hold."""
    return ComposerError(None, None, problem, place.start_mark)


def parse(text: str, source: str) -> Any:
    """The document's value: dicts, lists, text and None. Raises UserError for anything else, naming `source`."""
    try:
        return deepcopy(_load(text))
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # the last two: numbers in escapes and directives
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark and mark.line else ""
        fault = "can't be used" if isinstance(error, ComposerError) else "is not valid YAML"
        parts = [getattr(error, name, None) for name in ("context", "problem", "reason")]
        problem = ", ".join(filter(None, parts)) or "a number in it is too large"
        raise UserError(f"{source}{line} {fault}: {truncate(problem)}") from error


@lru_cache(maxsize=16)  # commands read a run's config more than once
def _load(text: str) -> Any:
    return _Loader(text).get_single_data()


def read(path: Path, if_missing: str = "") -> Any:
    """The value of the YAML file, as `parse` returns it. `if_missing` ends the message if there is no such file."""
    try:
        content = read_bounded(path, MAX_BYTES)
    except OSError as error:
        advice = if_missing if isinstance(error, FileNotFoundError) else ""
        raise UserError(f"can't read the config file {truncate(str(path))}: {error.strerror}{advice}") from error
    return decode(content, path)


def decode(content: bytes, path: Path) -> Any:
    """The value in the content of a YAML file, as `parse` returns it."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"can't read the config file {path}: byte {error.start} is not UTF-8 text") from error
    return parse(text, str(path))
