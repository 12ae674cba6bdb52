"""The curves of a run's metrics over its training, as its report shows them."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from vae_dist.config import Config
from vae_dist.reports.charts import KEY, Chart, Curve, line_chart
from vae_dist.reports.text import format_number
from vae_dist.runs.run import RunDirectory

MOST_POINTS = 1000  # of a curve

_ERRORS = {
    "l1": "mean absolute error per pixel value",
    "l2": "mean squared error per pixel value",
    "likelihood": "\u2212log p(x|z), nats per pixel value",
}
_WEIGHTED, _TRAINED = "adversarial_weight", "discriminator_trains"


class Curves(NamedTuple):
    """Charts of the training, which draw every `every`-th point of the longest curve."""

    charts: list[Chart]
    every: int
    key: tuple[str, ...] = KEY


class _Plan(NamedTuple):
    """A chart of a metric that training and validation may log, or of the training metrics `lines`, by their names."""

    title: str
    unit: str
    metric: str
    lines: Mapping[str, str] | None = None
    since: str = ""  # training metric that is above 0 once the lines begin
    idle: str = ""  # a training curve of this value alone says nothing

    @property
    def keys(self) -> dict[str, str]:
        """The key in the metrics file of each line, by the line's name."""
        if self.lines is not None:
            return {line: f"train/{metric}" for line, metric in self.lines.items()}
        return {"training": f"train/{self.metric}", "validation": f"validation/{self.metric}"}


def loss_unit(config: Config) -> str:
    """Return the unit of the training loss."""
    return "weighted sum of its terms" if config.train.recipe == "autoencoder" else "nats per image"


def error_unit(config: Config) -> str:
    """Return the unit of the reconstruction term of the recipe `autoencoder`."""
    return _ERRORS[config.first_stage.reconstruction]


def curves(run: RunDirectory, config: Config) -> Curves:
    """The curves of all metrics that a run with this config logged.

    A loss that equals another curve has no chart of its own (with beta at 1 it is the negative ELBO), nor has a factor
    that stays at 1. The curves of a discriminator begin when it is first trained, those of the adversarial term when
    the term has a weight.
    """
    charts: list[Chart] = []
    drawn: list[list[str]] = []
    every = 1
    for plan in _plans(config):
        lines = []
        for name, key in plan.keys.items():
            points = _since(run, plan.since, run.points(key))
            stride = -(-len(points) // MOST_POINTS)
            every = max(every, stride)
            if points:
                lines.append(Curve(name, points[(len(points) - 1) % stride :: stride]))  # includes the last point
        values = [format_number(value) for line in lines for _, value in line.points if line.name != "validation"]
        is_redundant = (plan.metric == "loss" and values in drawn) or set(values) == {plan.idle}
        if lines and not is_redundant:
            charts.append(line_chart(plan.title, plan.unit, lines))
            drawn.append(values)
    return Curves(charts, every)


def _plans(config: Config) -> Sequence[_Plan]:
    return (
        _Plan("Reconstruction error", error_unit(config), "reconstruction_error"),
        _Plan("Perceptual distance", "LPIPS, before its weight", "perceptual"),
        _Plan("Mean KL", "nats per latent, before its weight", "kl_per_latent"),
        _Plan("Adversarial term", "minus the mean logit of fakes", "adversarial", since=_WEIGHTED),
        _Plan("Negative ELBO", "nats per image", "negative_elbo"),
        _Plan("Reconstruction", "nats per image", "reconstruction"),
        _Plan("KL", "nats per image", "kl"),
        _Plan("Training loss", loss_unit(config), "loss"),
        _Plan("Sigma", "of the likelihood, white is 1", "sigma"),
        _Plan("Discriminator loss", "hinge", "discriminator_loss", since=_TRAINED),
        _Plan("Discriminator accuracy", "0.5 is chance", "discriminator_accuracy", since=_TRAINED),
        _Plan(
            "Logits", "means over patches", "logits", {"real": "logits_real", "fake": "logits_fake"}, since=_TRAINED
        ),
        _Plan("Adversarial weight", "before its factor", "adversarial_weight"),
        _Plan("Adversarial factor", "ratio of gradient norms", "adversarial_factor", since=_WEIGHTED, idle="1.00"),
        _Plan("Gradient norm", "before clipping", "grad_norm"),
        _Plan("Discriminator gradient norm", "before clipping", "discriminator_grad_norm", since=_TRAINED),
        _Plan("Spikes", "skipped for their norm, part of all updates", "spikes", idle="0"),
        _Plan("Learning rate", "of the optimizer", "learning_rate"),
        _Plan("Beta", "weight of the KL in the loss", "beta", idle="1.00"),
        _Plan("Speed", "images per second", "images_per_second"),
    )  # fmt: skip


def _since(run: RunDirectory, metric: str, points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """The points from the first step on in which this training metric is above 0; all if it was not logged."""
    logged = run.points(f"train/{metric}") if metric else []
    if not logged:
        return points
    begin = next((step for step, value in logged if value > 0), None)
    return [] if begin is None else [point for point in points if point[0] >= begin]
