"""The metrics of a run as its report shows them: those of an evaluation, and curves over the training."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from vae_dist.reports.charts import Chart, Curve, line_chart
from vae_dist.reports.subject import Subject
from vae_dist.reports.text import format_number, format_value
from vae_dist.runs.metrics import is_number
from vae_dist.runs.run import RunDirectory

MOST_POINTS = 1000  # of a curve

# Title, unit, and the metric's name after `train/` and `validation/`.
_CURVES = (
    ("Negative ELBO", "nats per image", "negative_elbo"),
    ("Reconstruction", "nats per image", "reconstruction"),
    ("KL", "nats per image", "kl"),
    ("Training loss", "nats per image", "loss"),
    ("Sigma", "of the likelihood, white is 1", "sigma"),
    ("Gradient norm", "before clipping", "grad_norm"),
    ("Learning rate", "Adam's", "learning_rate"),
    ("Beta", "weight of the KL in the loss", "beta"),
    ("Speed", "images per second", "images_per_second"),
)
# Key in evaluation.json, name and unit. The headline is the first one that an evaluation has.
_METRICS = (
    ("negative_log_likelihood", "negative log-likelihood", "nats, at most"),
    ("negative_elbo", "negative ELBO", "nats"),
    ("reconstruction", "reconstruction", "nats"),
    ("kl", "KL", "nats"),
    ("bits_per_dimension", "bits per dimension", "bits"),
    ("mean_squared_error", "mean squared error", "per pixel"),
)


class Metric(NamedTuple):
    """A metric, formatted. Its standard error has as many decimals as its value; it is empty if none is known."""

    name: str
    value: str
    error: str
    unit: str


class Evaluation(NamedTuple):
    """An evaluation's metrics, the headline first, and its protocol."""

    headline: Metric
    others: list[Metric]
    conditions: str
    protocol: dict[str, str]
    warning: str | None
    is_of_this_step: bool


class Curves(NamedTuple):
    """Charts of the training, which draw every `every`-th point of the longest curve."""

    charts: list[Chart]
    every: int


def evaluation(subject: Subject, latent_dim: int) -> Evaluation | None:
    """The evaluation of a run whose model has `latent_dim` latents; None if it has none."""
    result = subject.evaluation
    present = [entry for entry in _METRICS if is_number(result.get(entry[0]))]
    if not present:
        return None
    protocol, errors = (
        value if isinstance(value := result.get(key), dict) else {} for key in ("protocol", "standard_errors")
    )
    headline, *others = (_metric(name, result[key], errors.get(key), unit) for key, name, unit in present)
    if present[0][0] == "negative_log_likelihood":
        samples = format_value(result.get("importance_samples"))
        headline = headline._replace(name=f"{headline.name}, {samples} importance samples")
    if is_number(active := result.get("active_units")):
        others.append(Metric("active units", f"{active:g}", "", f"of {latent_dim:,}"))
    warning = result.get("warning")
    return Evaluation(
        headline=headline,
        others=others,
        conditions=_conditions(result, protocol),
        protocol=_flatten(protocol),
        warning=warning[:1].upper() + warning[1:].rstrip(".") + "." if isinstance(warning, str) else None,
        is_of_this_step=result.get("step") == subject.step,
    )


def last_validation(run: RunDirectory) -> Metric | None:
    """The negative ELBO of the newest validation; None if there was no validation."""
    points = run.points("validation/negative_elbo")[-1:]
    metrics = [
        _metric(f"negative ELBO on validation images, step {step:,}", value, None, "nats") for step, value in points
    ]
    return metrics[0] if metrics else None


def _metric(name: str, value: float, error: Any, unit: str) -> Metric:
    text = format_number(value)
    places = len(text.partition(".")[2]) if "e" not in text else 0
    return Metric(name, text, f"{error:.{places}f}" if is_number(error) else "", unit)


def _conditions(result: Mapping[str, Any], protocol: Mapping[str, Any]) -> str:
    """The images, pixels, likelihood and step of an evaluation, in one line."""
    pixels = protocol.get("pixels", f"data.binarize={format_value(result.get('binarize'))}")
    likelihood = protocol.get("likelihood", result.get("likelihood"))
    images, split, dataset, step = (format_value(result.get(key)) for key in ("images", "split", "dataset", "step"))
    return (
        f"{images} {split} images of {dataset}; pixels: {format_value(pixels)}; "
        f"likelihood: {format_value(likelihood)}; step {step}"
    )


def _flatten(protocol: Mapping[str, Any]) -> dict[str, str]:
    """A protocol's values as text, with the members of its groups after all others."""
    flat = {key: value for key, value in protocol.items() if not isinstance(value, dict)}
    for group, members in protocol.items():
        flat |= {f"{group}: {key}": value for key, value in members.items()} if isinstance(members, dict) else {}
    return {key: format_value(value) for key, value in flat.items()}


def curves(run: RunDirectory) -> Curves:
    """The curves of all metrics that were logged.

    With beta at 1 the loss is the negative ELBO: then neither the loss nor beta has a chart of its own.
    """
    charts: list[Chart] = []
    drawn: list[list[str]] = []
    every = 1
    for title, unit, name in _CURVES:
        lines = []
        for group, prefix in (("training", "train"), ("validation", "validation")):
            points = run.points(f"{prefix}/{name}")
            stride = -(-len(points) // MOST_POINTS)
            every = max(every, stride)
            if points:
                lines.append(Curve(group, points[(len(points) - 1) % stride :: stride]))  # includes the last point
        values = [format_number(value) for line in lines for _, value in line.points if line.name == "training"]
        is_redundant = (name == "loss" and values in drawn) or (name == "beta" and set(values) == {"1.00"})
        if lines and not is_redundant:
            charts.append(line_chart(title, unit, lines))
            drawn.append(values)
    return Curves(charts, every)
