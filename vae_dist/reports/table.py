"""The table of a comparison: the settings that differ, the metrics, and whether these are comparable."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from vae_dist.config import Config
from vae_dist.models.likelihoods import likelihood_kind
from vae_dist.reports.labels import held_out_set, settings, short_key, subject
from vae_dist.runs.lookup import Opened

# The metrics of the table: the key of each in `evaluation.json`, and its column's header.
_METRICS = {
    "negative_elbo": "negative ELBO",
    "reconstruction": "reconstruction",
    "kl": "KL",
    "negative_log_likelihood": "NLL",
    "importance_samples": "K",
    "active_units": "active units",
}


class Table(NamedTuple):
    """A row for each run: settings, step, metrics, name."""

    title: str
    header: list[str]
    rows: list[list[str]]
    notes: list[str]
    names_are_redundant: bool  # the settings alone tell the rows apart

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
        **{short_key(key): [settings(run, keys).get(key, "") for run in opened] for key in keys},
        "step": [str(run.step) for run in opened],
        **_metric_columns(evaluations),
        "run": [str(run.config.name) for run in opened],
    }
    rows = [list(row) for row in zip(*columns.values(), strict=True)]
    warning = incomparable(opened)
    return Table(
        title=f"{subject(opened)}, nats per image",
        header=list(columns),
        rows=rows,
        notes=[warning] if warning else _notes(evaluations),
        names_are_redundant=bool(keys) and len({tuple(row[: len(keys)]) for row in rows}) == len(rows),
    )


def incomparable(opened: Sequence[Opened]) -> str | None:
    """A warning that the metrics of these runs are not comparable, with the reason; None if they are."""
    facts = [held_out_set(run.config) | _likelihood(run.config) for run in opened]
    keys = dict.fromkeys(key for fact in facts for key in fact)
    values = {key: dict.fromkeys(str(fact[key]) for fact in facts if key in fact) for key in keys}
    differing = [f"{key} ({', '.join(several)})" for key, several in values.items() if len(several) > 1]
    if not differing:
        return None
    return f"THE METRICS OF THESE RUNS ARE NOT COMPARABLE: they differ in {' and '.join(differing)}"


def _metric_columns(evaluations: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """The columns of metrics that at least one evaluation has."""
    columns = {header: [_cell(evaluation.get(key)) for evaluation in evaluations] for key, header in _METRICS.items()}
    pairs = list(zip(columns.pop("NLL"), columns.pop("K"), strict=True))
    counts = {count for nll, count in pairs if nll}
    if len(counts) == 1:
        columns[f"NLL (K={counts.pop()})"] = [nll for nll, _ in pairs]
    else:
        columns["NLL"] = [nll and f"{nll} (K={count})" for nll, count in pairs]
    return {header: column for header, column in columns.items() if any(column)}


def _cell(value: object) -> str:
    """A metric with two decimals, which columns of it share, or a count; empty for anything else."""
    return f"{value:.2f}" if type(value) is float else str(value) if type(value) is int else ""


def _notes(evaluations: Sequence[Mapping[str, Any]]) -> list[str]:
    """The warnings that the evaluations hold. Their files may be untrusted: only printable text is kept."""
    warnings = [evaluation.get("warning") for evaluation in evaluations]
    return list(dict.fromkeys(note for note in warnings if isinstance(note, str) and note.isprintable()))


def _likelihood(config: Config) -> dict[str, object]:
    """The settings of the likelihood, on which the size of a run's metrics depends."""
    objective = config.objective
    settings: dict[str, object] = {"objective.reconstruction": objective.reconstruction}
    if likelihood_kind(objective).has_scale:
        settings["objective.sigma"] = objective.sigma if objective.sigma_kind == "fixed" else "fitted"
    return settings
