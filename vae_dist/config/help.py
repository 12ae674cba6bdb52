"""The text that `--help` prints."""

import textwrap

from vae_dist.config.keys import options
from vae_dist.config.text import as_text


def help_text(usage: str, prefixes: tuple[str, ...] = ("",)) -> str:
    """The usage, then every key under the prefixes with its type, default, meaning and bounds.

    The meaning of a key of one architecture begins with that architecture's name.
    """
    shown = [option for option in options() if option.key.startswith(prefixes)]
    lines = [usage.rstrip(), *(["", "Keys, with their types and defaults:"] if shown else [])]
    for option in shown:
        limits = {"at least": option.at_least, "above": option.above, "at most": option.at_most, "below": option.below}
        bounds = ", ".join(f"{word} {limit}" for word, limit in limits.items() if limit is not None)
        scope = f"{option.architecture}: " if option.architecture else ""
        meaning = scope + option.help + (f" ({bounds})" if bounds else "")
        lines.append(f"  {option.key}={as_text(option.default)}   [{option.type}]")
        lines.extend(textwrap.wrap(meaning, 100, initial_indent=" " * 8, subsequent_indent=" " * 8))
    return "\n".join(lines)
