"""The records of a run as tables and curves."""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from vae_dist.config.text import truncate
from vae_dist.errors import UserError
from vae_dist.runs.run import RunDirectory
from vae_dist.views import plots

DEFAULT_CURVES = ("train/loss", "validation/negative_elbo")
FIRST_STAGE_CURVES = ("train/loss", "train/reconstruction_error")  # of the recipe autoencoder, in units of their own


def table(records: Sequence[dict[str, float]]) -> Any:
    """Return records of metrics joined by step: a pandas DataFrame with the index `step`, or a list without pandas."""
    by_step: dict[int, dict[str, float]] = {}
    for record in records:
        by_step.setdefault(int(record["step"]), {}).update(record)
    rows: list[dict[str, float]] = [{**row, "step": step} for step, row in sorted(by_step.items())]
    try:
        import pandas as pd
    except ImportError:
        return rows
    return pd.DataFrame(rows, columns=list(dict.fromkeys(["step", *(name for row in rows for name in row)]))).set_index(
        "step"
    )


def curves(run: RunDirectory, names: Sequence[str] = ()) -> Image.Image:
    """Plot metrics by step; by default those of DEFAULT_CURVES that the run has, or FIRST_STAGE_CURVES.

    Raises UserError for unknown ones.
    """
    known = sorted({name for record in run.metrics for name in record} - {"step"})
    if not known:
        raise UserError(f"{run.directory} has no metrics")
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"{run.directory} has no metric {truncate(repr(unknown[0]))}; it has {', '.join(known)}")
    usual, unit = DEFAULT_CURVES, "nats per image"
    if FIRST_STAGE_CURVES[1] in known:
        usual, unit = FIRST_STAGE_CURVES, "means per pixel value"
    chosen = names or [name for name in usual if name in known]
    drawn = [plots.Curve(name, torch.tensor(run.points(name), dtype=torch.float64)) for name in chosen]
    return plots.lines(drawn, ("optimizer step", unit if not names else ""))
