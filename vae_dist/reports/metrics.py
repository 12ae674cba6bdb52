"""The metrics of an evaluation as the report of its run shows them."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from vae_dist.config.text import LARGEST
from vae_dist.evaluation.metric_table import Measurement, measurements, protocol_of
from vae_dist.reports.subject import Subject
from vae_dist.reports.text import format_number, format_value
from vae_dist.runs.run import RunDirectory


class FormattedMetric(NamedTuple):
    """A metric, formatted. Its standard error has as many decimals as its value; it is empty if none is known."""

    name: str
    value: str
    error: str
    unit: str


class Evaluation(NamedTuple):
    """An evaluation's metrics, the headline first, and its protocol."""

    headline: FormattedMetric
    others: list[FormattedMetric]
    conditions: str
    protocol: dict[str, str]
    warning: str | None  # of the metrics in nats
    warns_of_headline: bool
    is_of_this_step: bool


def evaluation(subject: Subject, latent_dim: int) -> Evaluation | None:
    """The evaluation of a run whose model has `latent_dim` latents; None if it has none."""
    result = subject.evaluation
    # The headline is the first metric that is there. The recipe autoencoder weighs its KL far below the ELBO's 1, and
    # the sigma of the ELBO is no part of its l1 or l2: it does not minimise the ELBO.
    first = "psnr" if subject.config.train.recipe == "autoencoder" else ""
    measured = measurements({"latents": latent_dim, **result})
    if not measured:
        return None
    headline, *others = sorted(measured, key=lambda one: one.metric.key != first)
    protocol = protocol_of(result)
    warning = result.get("warning") if any(one.metric.unit == "nats" for one in measured) else None
    return Evaluation(
        headline=_formatted(headline),
        others=list(map(_formatted, others)),
        conditions=_conditions(result, protocol),
        protocol=_flatten(protocol),
        warning=warning[:1].upper() + warning[1:].rstrip(".") + "." if isinstance(warning, str) else None,
        warns_of_headline=headline.metric.unit == "nats",
        is_of_this_step=result.get("step") == subject.step,
    )


def last_validation(run: RunDirectory) -> FormattedMetric | None:
    """The negative ELBO of the newest validation; None if there was no validation."""
    for step, value in run.points("validation/negative_elbo")[-1:]:
        return _formatted(measurements({"negative_elbo": value})[0], f" on validation images, step {step:,}")
    return None


def _formatted(measurement: Measurement, of: str = "") -> FormattedMetric:
    metric, value, error, unit = measurement
    text = format_number(value) if isinstance(value, float) or abs(value) >= LARGEST else f"{value:,}"
    places = len(text.partition(".")[2]) if "e" not in text else 0
    return FormattedMetric(metric.title + of, text, "" if error is None else _rounded(error, places), unit)


def _rounded(error: float, places: int) -> str:
    """A standard error with as many decimals as its value, or with two digits if these would all be 0."""
    text = f"{error:.{places}f}"
    return text if abs(error) < LARGEST and (float(text) or not error) else f"{error:.2g}"


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
