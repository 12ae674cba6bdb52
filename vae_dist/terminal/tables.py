"""Results as tables on stdout."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from vae_dist.config.text import large_number
from vae_dist.errors import plain
from vae_dist.terminal.streams import results

UNLIMITED = 10_000  # columns of a console


def table(title: str, rows: Mapping[str, object]) -> None:
    """Print named results."""
    result = Table(title=plain(title), title_justify="left", show_header=False)
    for _ in range(2):
        result.add_column(overflow="fold")  # a number that is cut in a narrow console would be another one
    for name, value in rows.items():
        result.add_row(plain(name), plain(format_number(value)))
    results.print(result)


class MetricRow(NamedTuple):
    """One metric of an evaluation."""

    name: str
    value: float
    standard_error: float | None = None
    remark: str = ""


def metrics(title: str, rows: Sequence[MetricRow], *protocol: str, warning: str | None = None) -> None:
    """Print metrics with standard errors, then the lines of the protocol and any warning."""
    result = Table(title=plain(title), title_justify="left", show_header=False)
    for justify in ("left", "right", "left", "left"):
        result.add_column(justify=justify, overflow="fold")
    for row in rows:
        error = "" if row.standard_error is None else f"± {_two_digits(row.standard_error)}"
        result.add_row(plain(row.name), format_number(row.value), error, plain(row.remark))
    results.print(result)
    for line in protocol:
        results.print(plain(line))
    if warning is not None:
        results.print(Text(plain(warning), style="bold yellow"))


def columns(title: str, names: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str] = ()) -> None:
    """Print results in columns, then notes about them.

    If the table is too wide for the console, rows and columns change places, in as many tables as that takes.
    """
    result = Table(title_justify="left")
    for name in names:
        result.add_column(plain(name).replace(" ", "\n"), justify="right", overflow="fold")
    for row in rows:
        result.add_row(*map(plain, row))
    parts = [result] if _width(result) <= results.width else _turned(names, rows)
    parts[0].title = plain(title)
    for part in parts:
        results.print(part)
    for note in notes:
        results.print(Text(plain(note), style="bold yellow"))


def _turned(names: Sequence[str], rows: Sequence[Sequence[str]]) -> list[Table]:
    """Tables with a column for each row, as many columns in each as fit into the console."""
    parts: list[list[Sequence[str]]] = [[]]
    for row in rows:
        if parts[-1] and _width(_with_columns(names, [*parts[-1], row])) > results.width:
            parts.append([])
        parts[-1].append(row)
    return [_with_columns(names, part) for part in parts]


def _with_columns(names: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table with a column for the names, and one for each row."""
    result = Table(title_justify="left", show_header=False)
    result.add_column(overflow="fold")
    for _ in rows:
        result.add_column(justify="right", overflow="fold")
    for name, *values in zip(names, *rows, strict=True):
        result.add_row(plain(name), *map(plain, values))
    return result


def _width(table: Table) -> int:
    """The columns of the console that a table takes if nothing in it is folded."""
    return Measurement.get(results, results.options.update(width=UNLIMITED), table).maximum


def _two_digits(error: float) -> str:
    """A standard error of two digits, or without decimals."""
    return f"{error:.0f}" if 99.5 <= error < 1e6 else f"{error:.2g}"


def format_number(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    return large_number(value) or (f"{value:.4f}" if abs(value) >= 1 else f"{value:.4g}")
