"""Text in Markdown. A run may be untrusted: its text is shown as it is, and never as markup."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from vae_dist.config.text import large_number, text_of, truncate
from vae_dist.runs.metrics import is_finite

MOST_CHARACTERS = 1000  # of a value; a warning has 300

_MARKUP = re.compile(r"([\\`*_{}\[\]<>#|~&@:!$^]|(?<=www)\.)", re.IGNORECASE)  # inside a line; @ : and www. make links


def escape(value: Any) -> str:
    """Return a value as Markdown of one line that shows its text."""
    shown = truncate(text_of(value), MOST_CHARACTERS)
    text = "".join(character if character.isprintable() else " " for character in shown)
    return _MARKUP.sub(r"\\\1", " ".join(text.split()))


def number(value: Any) -> str:
    """Return a number with four decimals at most; empty if a file holds anything else in its place."""
    if is_finite(value) and (large := large_number(value)):
        return large
    return f"{value:,}" if type(value) is int else f"{value:,.4f}" if is_finite(value) else ""


def code(text: str, language: str = "") -> str:
    """Return a block of code. The text can't end it."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], right: int | None = None) -> str:
    """Return a table of Markdown cells. The column `right` is aligned to the right."""
    rule = ["---:" if index == right else "---" for index in range(len(header))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows))


def facts(values: Mapping[str, Any]) -> str:
    """Return a table of names and values, whose text is escaped."""
    return table(["", ""], [[name, escape(value)] for name, value in values.items()])
