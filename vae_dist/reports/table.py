"""The table of a comparison: the settings that differ, the metrics, and whether these are comparable."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from vae_dist.config import Config, text_of
from vae_dist.config.text import large_number
from vae_dist.evaluation import metric_table
from vae_dist.models.likelihoods import likelihood_kind
from vae_dist.reports.labels import held_out_set, labels, names, settings, subject, title_of
from vae_dist.runs.lookup import Opened
from vae_dist.runs.metrics import is_finite

_ARROWS = {"higher": " ↑", "lower": " ↓", None: ""}  # towards better values


class Table(NamedTuple):
    """A row for each run: settings, step, metrics, name."""

    title: str
    header: list[str]
    rows: list[list[str]]
    notes: list[str]
    names_are_redundant: bool  # settings tell the rows apart, and no label of a picture has a name

    def without_redundant_names(self) -> tuple[str, list[str], list[list[str]], list[str]]:
        """Title, header, rows and notes for a console, which is narrow."""
        end = -1 if self.names_are_redundant else len(self.header)
        return self.title, self.header[:end], [row[:end] for row in self.rows], self.notes

    def markdown(self, pictures: Sequence[str]) -> str:
        """A Markdown document of the table and of these pictures, PNG files in its folder."""
        marks = ["---:"] * (len(self.header) - 1) + ["---"]
        lines = [[cell.replace("|", "\\|") for cell in cells] for cells in (self.header, marks, *self.rows)]
        table = [f"| {' | '.join(cells)} |" for cells in lines]
        parts = [f"{self.title}.", "\n".join(table), *self.notes, *(f"![{name}]({name}.png)" for name in pictures)]
        return "\n\n".join(parts) + "\n"


def make_table(opened: Sequence[Opened], keys: Sequence[str], evaluations: Sequence[Mapping[str, Any]]) -> Table:
    """The table of runs that differ in the config keys `keys`."""
    columns = {
        **{title_of(key, opened): [settings(run, keys).get(key, "") for run in opened] for key in keys},
        "step": [str(run.step) for run in opened],
        **_metric_columns(evaluations),
        "run": names(opened),
    }
    rows = [list(row) for row in zip(*columns.values(), strict=True)]
    warning = incomparable(opened)
    labelled_by_name = [name in label.split(", ") for name, label in zip(names(opened), labels(opened), strict=True)]
    return Table(
        title=f"{subject(opened)}, nats per image",
        header=list(columns),
        rows=rows,
        notes=([warning] if warning else _notes(evaluations)) + _several_networks(evaluations),
        names_are_redundant=bool(keys) and not any(labelled_by_name),
    )


def incomparable(opened: Sequence[Opened]) -> str | None:
    """A warning that the metrics of these runs are not comparable, with the reason; None if they are."""
    images = _differing([held_out_set(run.config) for run in opened])
    differing = images + _differing([_likelihood(run.config) for run in opened])
    if not differing:
        return None
    which = "METRICS" if images else "METRICS IN NATS"  # those of pictures depend on no likelihood
    return f"THE {which} OF THESE RUNS ARE NOT COMPARABLE: they differ in {' and '.join(differing)}"


def _differing(facts: Sequence[Mapping[str, object]]) -> list[str]:
    """The keys of which several values are there, with these."""
    keys = dict.fromkeys(key for fact in facts for key in fact)
    values = {key: dict.fromkeys(text_of(fact[key]) for fact in facts if key in fact) for key in keys}
    return [f"{key} ({', '.join(several)})" for key, several in values.items() if len(several) > 1]


def _metric_columns(evaluations: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """The columns of metrics that at least one evaluation has.

    The header states the number of samples that a metric is of; if the evaluations have several, each value does.
    """
    columns = {}
    for metric in metric_table.METRICS:
        if metric.digits is None:
            continue
        column = [_cell(evaluation.get(metric.key), metric.digits) for evaluation in evaluations]
        if not any(column):
            continue
        header = metric.title if metric.unit in ("", "nats") else f"{metric.title} in {metric.unit}"
        if metric.samples is not None:
            samples, symbol = metric.samples
            counts = [f"{symbol}={_cell(evaluation.get(samples), 0)}" for evaluation in evaluations]
            several = {count for value, count in zip(column, counts, strict=True) if value}
            if len(several) == 1:
                header = f"{header} ({several.pop()})"
            else:
                column = [value and f"{value} ({count})" for value, count in zip(column, counts, strict=True)]
        columns[header + _ARROWS[metric.better]] = column
    return columns


def _cell(value: Any, decimals: int) -> str:
    """A metric, or a count; empty for anything else."""
    if is_finite(value) and (large := large_number(value)):
        return large
    return f"{value:.{decimals}f}" if type(value) is float else str(value) if type(value) is int else ""


def _notes(evaluations: Sequence[Mapping[str, Any]]) -> list[str]:
    """The warnings that the evaluations hold. Their files may be untrusted: only printable text is kept."""
    warnings = [evaluation.get("warning") for evaluation in evaluations]
    return list(dict.fromkeys(note for note in warnings if isinstance(note, str) and note.isprintable()))


def _several_networks(evaluations: Sequence[Mapping[str, Any]]) -> list[str]:
    """A warning for each metric that was measured by networks of several weights."""
    result = []
    for key, title, digest in ((one.key, one.title, one.network) for one in metric_table.METRICS if one.network):
        protocols = [metric_table.protocol_of(one) for one in evaluations if type(one.get(key)) is float]
        digests = {str(protocol.get(digest)) for protocol in protocols if protocol}
        if len(digests) > 1:
            result.append(f"THE {title} OF THESE RUNS IS NOT COMPARABLE: it was measured by networks of other weights")
    return result


def _likelihood(config: Config) -> dict[str, object]:
    """The settings of the likelihood, on which the size of a run's metrics depends: of p(x), or p(x|y) of a label."""
    objective = config.objective
    settings: dict[str, object] = {
        "model.conditional": config.model.conditional,
        "objective.reconstruction": objective.reconstruction,
    }
    if likelihood_kind(objective).has_scale:
        settings["objective.sigma"] = objective.sigma if objective.sigma_kind == "fixed" else "fitted"
    return settings
