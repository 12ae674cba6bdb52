"""Values as text, for messages and files, and the text that a config may hold."""

from collections.abc import Iterator
from typing import Any

from vae_dist.errors import UNPRINTABLE, UserError

MAX_TEXT = 2048  # bytes of a value
LARGEST = 1e15  # a number from which there is an exponent


def text_of(value: Any) -> str:
    """The value as a file has it."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def as_text(value: Any) -> str:
    """The value as a message shows it: as a user would type it, in one line, truncated."""
    return truncate(text_of(value))


def truncate(text: str, most: int = 200) -> str:
    return text if len(text) <= most else f"{text[:most]}..."


def large_number(value: float) -> str:
    """A number from LARGEST up in few characters, with an exponent; nothing for a smaller one."""
    return f"{value:.4g}" if abs(value) >= LARGEST else ""


def leaves(value: Any) -> Iterator[Any]:
    """The scalars of a value, in lists or not."""
    if isinstance(value, list | dict):
        for item in value:
            yield from leaves(item)
    else:
        yield value


def require_text(text: str, subject: str, limit: int | None = MAX_TEXT) -> None:
    """Raise UserError for text that can be neither a path nor a name. The message calls it `subject`."""
    if unprintable := UNPRINTABLE.search(text):
        raise UserError(f"{subject} has the character {unprintable[0]!a}; remove it: {truncate(ascii(text))}")
    if limit is not None and len(text.encode()) > limit:
        raise UserError(f"{subject} has {len(text.encode())} bytes; {limit} are the most: {truncate(text)}")
