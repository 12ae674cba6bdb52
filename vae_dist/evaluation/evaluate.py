"""The evaluation of a checkpoint: its metrics go to files, to the log and to the screen."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vae_dist.config import Config
from vae_dist.data import datasets
from vae_dist.data.source import Source
from vae_dist.distributed import processes
from vae_dist.errors import UserError
from vae_dist.evaluation import protocol
from vae_dist.evaluation.metrics import measure
from vae_dist.files import ELSEWHERE, make_folder, write_together, writing
from vae_dist.runs import wandb_identity
from vae_dist.runs.lookup import open_checkpoint
from vae_dist.runs.run import EVALUATION, EVALUATIONS
from vae_dist.runs.tracking import track
from vae_dist.runs.wandb_client import check_online
from vae_dist.terminal import console, tables
from vae_dist.terminal.tables import Metric
from vae_dist.views import pictures

logger = logging.getLogger(__name__)

_LOGGED = (
    "negative_elbo", "reconstruction", "kl", "negative_log_likelihood", "importance_samples", "bits_per_dimension",
    "mean_squared_error", "active_units",
)  # fmt: skip


def evaluate(run: Path | None, arguments: Sequence[str] = ()) -> dict[str, Any]:
    """Evaluate a run's newest checkpoint, or the checkpoint `run`; the newest run by default.

    Returns the content of `evaluation.json`. Raises UserError if there is no checkpoint or no data, or if a metric is
    not finite. Every process calls this.
    """
    with open_checkpoint(run, arguments) as opened, processes.join(opened.config) as world:
        console.start(world)
        checkpoint, config, output, live = opened.agreed(world)
        step = checkpoint.step
        world.on_main(lambda: check_online(config.tracking))
        world.on_main(lambda: make_folder(output / EVALUATIONS, ELSEWHERE))
        vae = checkpoint.load_vae(config, world.device)
        source = world.main_first(lambda: _source(config))
        warning = protocol.comparison_warning(config)
        result = {
            "run": config.name,
            "dataset": config.data.name,
            "split": config.evaluate.split,
            "binarize": config.data.binarize,
            "likelihood": config.objective.reconstruction,
            "images": source.info.count,
            "step": step,
            **measure(vae, source, world, config),
            "comparable": warning is None,
            "warning": warning,
            "protocol": protocol.describe(
                config, source.info, vae.likelihood.description, checkpoint.weights(config), world
            ),
        }
        name = _name(result, raw=checkpoint.has_average and config.weights == "raw")
        subject = f"{config.data.name}, {config.evaluate.split} images, step {step}"
        tracked = wandb_identity.for_reading(config, checkpoint.run_dir, arguments)

        def keep() -> None:
            with track(tracked, output, is_main=world.is_main, live=live, kind="evaluation") as tracker:
                tracker.scalars(step, _record(result))
                tracker.pictures(step, lambda: {config.evaluate.split: pictures.reconstructions(vae, source, subject)})
                _write(output, name, result)

        try:
            world.on_main(keep)
        finally:  # also if writing fails: the metrics may have taken hours
            if world.is_main:
                _show(result)
        if world.is_main:
            logger.info("written to %s", output / EVALUATION)
    return result


def _source(config: Config) -> Source:
    """Return the images to evaluate on."""
    if config.evaluate.split == "test":
        return datasets.load_test(config.data)
    validation = datasets.load_training(config.data)[1]
    if validation.info.count == 0:
        raise UserError("this run has no validation images (data.validation_images=0); use evaluate.split=test")
    return validation


def _record(result: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics as a record of the metrics file."""
    return {f"{result['split']}/{name}": result[name] for name in _LOGGED if result[name] is not None}


def _name(result: Mapping[str, Any], *, raw: bool) -> str:
    """Return the name under which an evaluation is kept; `raw` if the run has a moving average, but was not used."""
    samples = f"_k{result['importance_samples']}" if result["importance_samples"] else ""
    return f"step_{result['step']:08d}_{result['split']}{samples}{'_raw' if raw else ''}.json"


def _write(output: Path, name: str, result: Mapping[str, Any]) -> None:
    """Write the metrics under a name of their own, and as the run's latest."""
    kept = output / EVALUATIONS / name
    content = (json.dumps(result, indent=2) + "\n").encode()
    with writing(output, ELSEWHERE):
        write_together({kept: content, output / EVALUATION: content})


def _show(result: Mapping[str, Any]) -> None:
    """Print the metrics with standard errors, then the protocol and any warning."""
    conditions, errors, samples = result["protocol"], result["standard_errors"], result["importance_samples"]
    rows = {
        "negative_log_likelihood": ("negative log-likelihood", f"nats, at most; {samples} samples"),
        "negative_elbo": ("negative ELBO", "nats"),
        "reconstruction": ("  reconstruction", "nats, the distortion"),
        "kl": ("  KL", "nats, the rate"),
        "bits_per_dimension": ("bits per dimension", f"from the {'log-likelihood' if samples else 'ELBO'}"),
        "mean_squared_error": ("mean squared error", "per pixel"),
        "active_units": ("active units", f"of {result['latents']} latents"),
    }
    tables.metrics(
        f"{result['run']}, step {result['step']}: {result['images']} {result['split']} images of {result['dataset']}",
        [Metric(name, result[key], errors.get(key), remark) for key, (name, remark) in rows.items()],
        "mean over the images ± its standard error\n"
        f"pixels {conditions['pixels']}; {conditions['likelihood']} likelihood\n"
        f"ELBO of 1 posterior sample; noise seed {conditions['noise_seed']}; {conditions['precision']} on "
        f"{conditions['device']}, threads: {conditions['threads']}"
        + ("; moving average of the weights" if conditions["weights"] == "ema" else ""),
        result["warning"],
    )
