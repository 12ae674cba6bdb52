"""Values as text for people."""

from typing import Any

from vae_dist.config.text import large_number
from vae_dist.runs.metrics import is_number


def format_number(value: float) -> str:
    """A number with two decimals; with three significant digits below 1, and without decimals from 1000 up.

    From LARGEST up it is short: with an exponent.
    """
    if large := large_number(value):
        return large
    if value == 0 or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.2f}" if abs(value) >= 1 else f"{value:.3g}"


def format_percent(value: float, places: int = 2) -> str:
    return f"{value:.{places}f}%"


def format_value(value: Any) -> str:
    """A value of any type from a JSON file, as words."""
    if isinstance(value, list):
        return ", ".join("..." if isinstance(item, list) else format_value(item) for item in value[:100])
    if is_number(value):
        return f"{value:,}"
    return "not stated" if value is None else "..." if isinstance(value, dict) else str(value)


def count(number: int, noun: str, plural: str) -> str:
    return f"{number:,} {noun if number == 1 else plural}"


def printable(text: str) -> str:
    """The text with U+FFFD for each character that is invisible, or that would reorder the text around it."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() or char in "\n\t" else "\ufffd" for char in text)
