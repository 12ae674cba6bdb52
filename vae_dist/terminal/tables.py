"""Results as tables on stdout."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from rich.table import Table
from rich.text import Text

from vae_dist.terminal.streams import plain, results


def table(title: str, rows: Mapping[str, object]) -> None:
    """Print named results."""
    result = Table(title=plain(title), title_justify="left", show_header=False)
    for name, value in rows.items():
        result.add_row(plain(name), plain(format_number(value)))
    results.print(result)


class Metric(NamedTuple):
    """One metric of an evaluation. It is not printed if it has no value."""

    name: str
    value: float | None
    standard_error: float | None = None
    remark: str = ""


def metrics(title: str, rows: Sequence[Metric], protocol: str, warning: str | None = None) -> None:
    """Print metrics with standard errors, then the protocol and any warning."""
    result = Table(title=plain(title), title_justify="left", show_header=False)
    for justify in ("left", "right", "left", "left"):
        result.add_column(justify=justify)
    for row in rows:
        if row.value is not None:
            error = "" if row.standard_error is None else f"± {row.standard_error:.2g}"
            result.add_row(plain(row.name), format_number(row.value), error, plain(row.remark))
    results.print(result)
    results.print(plain(protocol))
    if warning is not None:
        results.print(Text(plain(warning), style="bold yellow"))


def columns(title: str, names: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str] = ()) -> None:
    """Print results in columns, then notes about them."""
    result = Table(title=plain(title), title_justify="left")
    for name in names:
        result.add_column(plain(name).replace(" ", "\n"), justify="right", overflow="fold")
    for row in rows:
        result.add_row(*map(plain, row))
    results.print(result)
    for note in notes:
        results.print(Text(plain(note), style="bold yellow"))


def format_number(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.4f}" if abs(value) >= 1 else f"{value:.4g}"
