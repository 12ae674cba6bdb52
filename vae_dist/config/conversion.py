"""OmegaConf's conversions: of text to the type of its key, and of a config to YAML.

OmegaConf takes many times longer for a whole config than for the values that differ from the last ones.
"""

import json
from dataclasses import make_dataclass
from functools import cache, lru_cache
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException


def convert(value: Any, hint: Any) -> Any:
    """Convert None, text or lists of text to the type `hint`. Raises TypeError for a value that does not fit."""
    return _convert(value, hint) if isinstance(value, list) else _convert_once(value, hint)


def _convert(value: Any, hint: Any) -> Any:
    holder = OmegaConf.structured(_holder(hint))
    try:
        OmegaConf.update(holder, "value", value)
    except OmegaConfBaseException as error:
        raise TypeError(f"not {hint}") from error
    return OmegaConf.to_object(holder).value  # type: ignore[union-attr]


_convert_once = lru_cache(maxsize=1024)(_convert)  # a saved config has about 140 values


@cache
def _holder(hint: Any) -> type:
    return make_dataclass("Holder", [("value", hint)])


def to_yaml(values: dict[str, Any]) -> str:
    """The YAML of nested dictionaries of plain values."""
    return _to_yaml(json.dumps(values))


@lru_cache(maxsize=16)  # every checkpoint of a run holds the run's config
def _to_yaml(values: str) -> str:
    return OmegaConf.to_yaml(OmegaConf.create(json.loads(values)))
