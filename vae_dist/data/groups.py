"""Groups of images that are split together, by the images' names: `data.group`."""

import csv
import re
from collections.abc import Sequence
from io import StringIO
from pathlib import Path

from vae_dist.config import as_text, expand
from vae_dist.errors import UserError
from vae_dist.files import read_bounded, reason

TABLE_BYTES = 2**28
# A config may come from someone else, and Python's expressions can take a time that is exponential in the text's
# length. The bounds keep honest expressions fast; a hostile one still has to be interrupted (Ctrl-C).
LONGEST_EXPRESSION, LONGEST_NAME = 500, 1000
MOST_NAMED = 5  # images or names in a message

_COLUMNS = ("name", "group")


def groups_of(names: Sequence[str], rule: str | None) -> list[str]:
    """Return the group of each image, as texts that two images share if and only if they are in one group.

    `rule` is `data.group`: the path of a CSV file, which ends in .csv, or else a regular expression; an image that it
    does not match is a group of its own, and so is every image without a rule. Raises UserError.
    """
    if rule is None:
        return [f"image {name}" for name in names]
    if rule.endswith(".csv"):
        return _by_table(names, Path(expand(rule, "data.group")))
    return _by_expression(names, rule)


def check_groups(names: Sequence[str], rule: str | None) -> None:
    """Raise UserError for a rule that groups none of these images, which are all that there are."""
    if rule is not None and all(group.startswith("image ") for group in groups_of(names, rule)):
        raise UserError(
            f"data.group={as_text(rule)} matches none of the {len(names)} names, such as {names[0][:200]!a}; change "
            "the expression, or leave data.group out"
        )


def _by_expression(names: Sequence[str], rule: str) -> list[str]:
    if len(rule) > LONGEST_EXPRESSION:
        raise UserError(f"data.group has {len(rule)} characters; {LONGEST_EXPRESSION} are the most")
    try:
        expression = re.compile(rule)
    except (re.error, RecursionError, OverflowError) as error:
        raise UserError(f"data.group={as_text(rule)} is no regular expression ({error}), and no .csv file") from error
    matches = (expression.search(name[:LONGEST_NAME]) for name in names)
    texts = (None if match is None else match[1] if expression.groups else match[0] for match in matches)
    return [f"image {name}" if text is None else f"group {text}" for name, text in zip(names, texts, strict=True)]


def _by_table(names: Sequence[str], path: Path) -> list[str]:
    groups = _read_table(path)
    if missing := [name for name in names if name not in groups]:
        listed = ", ".join(f"{name[:200]!a}" for name in missing[:MOST_NAMED])
        raise UserError(
            f"data.group: {path} lacks {len(missing)} of {len(names)} images ({listed}); give each image a line"
        )
    return [f"group {groups[name]}" for name in names]


def _read_table(path: Path) -> dict[str, str]:
    """Return the group of each name in a CSV file with the columns name and group; other columns are ignored."""
    try:
        text = read_bounded(path, TABLE_BYTES).decode("utf-8-sig")
        lines = list(csv.reader(StringIO(text, newline=""), strict=True))
    except OSError as error:
        raise UserError(f"data.group={path} can't be read ({reason(error)}); give the path of a CSV file") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"data.group={path} is no CSV file in UTF-8 ({error}); save it again as one") from error
    header, *rows = lines or [[]]
    if any(header.count(column) != 1 for column in _COLUMNS):
        raise UserError(f"data.group={path} must begin with the line name,group, not {as_text(','.join(header))!a}")
    places = [header.index(column) for column in _COLUMNS]
    groups: dict[str, str] = {}
    for number, row in enumerate(rows, start=2):
        if not row:
            continue
        if len(row) != len(header):
            raise UserError(f"data.group={path}: row {number} has {len(row)} values, not {len(header)}; mend it")
        name, group = (row[place] for place in places)
        if name in groups:
            raise UserError(f"data.group={path} has {name[:200]!a} twice; leave one of its lines")
        groups[name] = group
    return groups
