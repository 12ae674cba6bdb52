"""The metrics of an evaluation as the report of its run shows them."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from vae_dist.reports.subject import Subject
from vae_dist.reports.text import format_number, format_value
from vae_dist.runs.metrics import is_number
from vae_dist.runs.run import RunDirectory

# Name and unit of each metric, by its key in evaluation.json. The number of samples in a name is the one of _SAMPLES.
_METRICS = {
    "negative_log_likelihood": ("negative log-likelihood, {} importance samples", "nats, at most"),
    "negative_elbo": ("negative ELBO", "nats"),
    "reconstruction": ("reconstruction", "nats"),
    "kl": ("KL", "nats"),
    "bits_per_dimension": ("bits per dimension", "bits"),
    "mean_squared_error": ("mean squared error", "per pixel"),
    "psnr": ("PSNR", "dB"),
    "ssim": ("SSIM", "1 if equal"),
    "lpips": ("LPIPS", "0 if equal"),
    "rfid": ("rFID", "0 if equal"),
    "fid": ("FID of {} samples", "0 if equal"),
    "constant_grid": ("grid on one colour", "8-bit levels"),
    "constant_border": ("border on one colour", "8-bit levels"),
}
_SAMPLES = {"negative_log_likelihood": "importance_samples", "fid": "fid_samples"}


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


def evaluation(subject: Subject, latent_dim: int) -> Evaluation | None:
    """The evaluation of a run whose model has `latent_dim` latents; None if it has none."""
    result = subject.evaluation
    # The headline is the first metric that is there. The recipe autoencoder weighs its KL far below the ELBO's 1, and
    # the sigma of the ELBO is no part of its l1 or l2: it does not minimise the ELBO.
    first = ("psnr",) if subject.config.train.recipe == "autoencoder" else ()
    present = [key for key in dict.fromkeys((*first, *_METRICS)) if is_number(result.get(key))]
    if not present:
        return None
    protocol, errors = (
        value if isinstance(value := result.get(key), dict) else {} for key in ("protocol", "standard_errors")
    )
    metrics = []
    for key in present:
        name, unit = _METRICS[key]
        samples = format_value(result.get(_SAMPLES.get(key, "")))
        metrics.append(_metric(name.format(samples), result[key], errors.get(key), unit))
    headline, *others = metrics
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
