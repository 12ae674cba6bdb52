"""Whole numbers that a caller gives."""

import operator
from typing import Any

from vae_dist.config.text import truncate
from vae_dist.errors import UserError

LIMIT = 2**63  # that of the numbers in a config


def whole_number(name: str, value: Any, least: int = 1) -> int:
    """Return a whole number of Python, numpy or torch. Raises UserError for other values and below `least`."""
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if not least <= number < LIMIT:
        allowed = f"of at least {least}" if number < least else "below 2^63"
        raise UserError(f"{name}={truncate(str(value))}: a whole number {allowed} is needed")
    return number
