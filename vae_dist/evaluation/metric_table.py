"""The table of an evaluation's metrics: a metric that has a line here is logged, printed, reported and compared."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from vae_dist.runs.metrics import is_finite, is_number


class Metric(NamedTuple):
    """A metric of an evaluation. Its standard error has the same key in `standard_errors`."""

    key: str  # in evaluation.json, metrics.jsonl and W&B
    title: str
    unit: str = ""
    note: str = ""  # beside the unit; {key} stands for a number of the evaluation
    better: Literal["higher", "lower"] | None = None
    digits: int | None = 2  # decimals in a comparison; None leaves out what another metric tells
    is_term: bool = False  # of the metric before it
    samples: tuple[str, str] | None = None  # the key of the number of samples that it is of, and the number's symbol
    network: str | None = None  # the key of the sha256 of the network that measures it, in the protocol


MOST_LEVELS = 100  # whose KL is shown

METRICS = (
    Metric(
        "negative_log_likelihood", "negative log-likelihood", "nats", "at most; {importance_samples} samples", "lower",
        samples=("importance_samples", "K"),
    ),
    Metric("negative_elbo", "negative ELBO", "nats", better="lower"),
    Metric("reconstruction", "reconstruction", "nats", "the distortion", is_term=True),
    Metric("kl", "KL", "nats", "the rate", is_term=True),
    Metric(
        "bits_per_dimension", "bits per dimension", "", "from the {bound}", "lower", digits=3,
        samples=("importance_samples", "K"),
    ),
    Metric("mean_squared_error", "mean squared error", "per pixel", better="lower", digits=None),
    Metric("psnr", "PSNR", "dB", "8-bit values", "higher"),
    Metric("ssim", "SSIM", "", "1 if equal; 8-bit values", "higher", digits=4),
    Metric("lpips", "LPIPS", "", "0 if equal; VGG16, 8-bit values", "lower", digits=4, network="lpips_sha256"),
    Metric("rfid", "rFID", "", "0 if equal; {images} images, 8-bit values", "lower", network="rfid_sha256"),
    Metric(
        "fid", "FID", "", "0 if equal; {fid_samples} samples from the prior, 8-bit values", "lower",
        samples=("fid_samples", "N"), network="rfid_sha256",
    ),
    Metric("constant_grid", "grid", "8-bit levels", "in images of one colour", "lower"),
    Metric("constant_border", "border", "8-bit levels", "in images of one colour", "lower"),
    Metric("active_units", "active units", "", "of {latents} latents", digits=0),
)  # fmt: skip


class Measurement(NamedTuple):
    """A metric's value in one evaluation."""

    metric: Metric
    value: float
    error: float | None  # the standard error
    unit: str  # with the metric's note


def protocol_of(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """Return the protocol in the content of an evaluation's file, which may be untrusted; empty if it has none."""
    protocol = evaluation.get("protocol")
    return protocol if isinstance(protocol, dict) else {}


def measurements(evaluation: Mapping[str, Any]) -> list[Measurement]:
    """Return the metrics that the content of an evaluation's file has. It may be untrusted: only numbers count."""
    kept = evaluation.get("standard_errors")
    errors = {key: error for key, error in kept.items() if is_finite(error)} if isinstance(kept, dict) else {}
    numbers = {key: f"{value:,}" for key, value in evaluation.items() if is_number(value)}
    numbers["bound"] = "log-likelihood" if evaluation.get("importance_samples") else "ELBO"
    found: list[Measurement] = []
    for metric in METRICS:
        if is_finite(evaluation.get(metric.key)):
            error, unit = errors.get(metric.key), _unit(metric, numbers)
            found.append(Measurement(metric, evaluation[metric.key], error, unit))
        if metric.key == "kl":
            found += _levels(evaluation.get("kl_per_level"))
    return found


def _levels(kl: object) -> list[Measurement]:
    """The KL of each level of a hierarchy, the lowest resolution first, from a file that may be untrusted."""
    levels = kl[:MOST_LEVELS] if isinstance(kl, list) and all(map(is_finite, kl)) else []
    return [
        Measurement(Metric(f"kl_of_level_{number}", f"KL of level {number}", "nats", is_term=True), value, None, "nats")
        for number, value in enumerate(levels, start=1)
    ]


def _unit(metric: Metric, numbers: Mapping[str, str]) -> str:
    try:
        note = metric.note.format_map(numbers)
    except KeyError:  # evaluations of earlier versions lack some numbers
        note = ""
    return ", ".join(filter(None, (metric.unit, note)))
