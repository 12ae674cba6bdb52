"""The declaration of an option: a dataclass field with its meaning and its bounds."""

from dataclasses import field
from typing import Any


def option(
    default: Any,
    help: str,
    *,
    above: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> Any:
    """A dataclass field with its meaning and its bounds; the bounds of a list hold for each item."""
    metadata = {"help": help, "above": above, "at_least": at_least, "at_most": at_most, "below": below}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)
