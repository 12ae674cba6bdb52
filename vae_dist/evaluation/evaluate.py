"""The evaluation of a checkpoint: its metrics go to files, to the log and to the screen."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vae_dist.data.chosen import choose
from vae_dist.distributed import processes
from vae_dist.evaluation import constants, metric_table, networks, per_image, protocol
from vae_dist.evaluation.metrics import measure
from vae_dist.files import ELSEWHERE, make_folder, write_together, writing
from vae_dist.runs import manifest, wandb_identity
from vae_dist.runs.lookup import open_checkpoint
from vae_dist.runs.run import EVALUATION, EVALUATIONS
from vae_dist.runs.tracking import track
from vae_dist.runs.wandb_client import check_online
from vae_dist.terminal import console, tables
from vae_dist.terminal.tables import MetricRow
from vae_dist.views import pictures

logger = logging.getLogger(__name__)


def evaluate(run: Path | None, arguments: Sequence[str] = ()) -> dict[str, Any]:
    """Evaluate a run's newest checkpoint, or the checkpoint `run`; the newest run by default.

    Returns the content of `evaluation.json`; of `evaluate.folder`, the content of its own file. Raises UserError if
    there is no checkpoint or no data, or if a metric is not finite. Every process calls this.
    """
    with open_checkpoint(run, arguments) as opened, processes.join(opened.config) as world:
        console.start(world)
        checkpoint, config, output, live = opened.agreed(world)
        step = checkpoint.step
        world.on_main(lambda: check_online(config.tracking))
        world.on_main(lambda: make_folder(output / EVALUATIONS, ELSEWHERE))
        vae = checkpoint.load_vae(config, world.device)
        options = config.evaluate
        images = world.main_first(lambda: choose(config.data, options.split, options.folder, "evaluate"))
        source, dataset, split, _ = images
        warning = protocol.comparison_warning(config, dataset)
        comparing = networks.load(options, source.info.image_shape, world)
        metrics, by_image = measure(vae, source, world, config, comparing)
        result = {
            "run": config.name,
            "dataset": dataset,
            "split": split,
            "binarize": config.data.binarization,
            "likelihood": config.objective.reconstruction,
            "images": source.info.count,
            "step": step,
            **metrics,
            "comparable": warning is None,
            "warning": warning,
            "protocol": protocol.describe(
                config,
                source.info,
                world,
                dataset=dataset,
                split=split,
                likelihood=vae.likelihood.description,
                weights=checkpoint.weights(config),
                networks=comparing,
                constants=constants.protocol(vae, config),
            ),
        }
        is_raw = checkpoint.has_average and config.weights == "raw"
        name = _name(result, images.file, raw=is_raw)
        group = f"{split}_raw" if is_raw else split  # of records: those of the training are of the average
        is_own = config.evaluate.folder is None
        tracked = wandb_identity.for_reading(config, checkpoint.run_dir, arguments)

        def keep() -> None:
            files = {f"{EVALUATIONS}/{name}.csv": per_image.to_csv(source, by_image)}
            if not is_own:  # the run's records are of its own images
                _write(output, result, [f"{EVALUATIONS}/{name}.json"], files)
                return
            with track(tracked, output, is_main=world.is_main, live=live, kind="evaluation") as tracker:
                tracker.scalars(step, _record(group, result))
                subject = f"{dataset}, {split} images, step {step}"
                tracker.pictures(step, lambda: {group: pictures.reconstructions(vae, source, subject)})
                _write(output, result, [f"{EVALUATIONS}/{name}.json", EVALUATION], files)

        try:
            world.on_main(keep)
        finally:  # also if writing fails: the metrics may have taken hours
            if world.is_main:
                _show(result)
        if world.is_main:
            if (worst := per_image.worst(source, by_image)) is not None:
                logger.info("the largest mean squared errors: %s", worst)
            logger.info("written to %s", output / (EVALUATION if is_own else f"{EVALUATIONS}/{name}.json"))
    return result


def _record(group: str, result: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics as a record of the metrics file, in a group such as `test`."""
    logged = {"importance_samples", *(metric.key for metric in metric_table.METRICS)}
    return {f"{group}/{name}": value for name, value in result.items() if name in logged and value is not None}


def _name(result: Mapping[str, Any], images: str, *, raw: bool) -> str:
    """Return the name under which an evaluation is kept: one without a metric never replaces one that has it.

    `raw` if the run has a moving average, but was not used.
    """
    parts = {
        f"k{result['importance_samples']}": bool(result["importance_samples"]),
        "lpips": "lpips" in result,
        "rfid": "rfid" in result,
        f"fid{result.get('fid_samples')}": "fid" in result,
        "raw": raw,
    }
    return "_".join([f"step_{result['step']:08d}", images, *(part for part, has in parts.items() if has)])


def _write(output: Path, result: Mapping[str, Any], names: Sequence[str], files: Mapping[str, bytes | None]) -> None:
    """Write the metrics under each of some names, and other files."""
    content = manifest.to_json(result)
    contents = {output / name: content for name in names}
    with writing(output, ELSEWHERE):
        write_together(contents | {output / name: other for name, other in files.items() if other is not None})


def _show(result: Mapping[str, Any]) -> None:
    """Print the metrics with standard errors, then the protocol and any warning."""
    conditions = result["protocol"]
    split = "" if result["split"] == "all" else f"{result['split']} "
    which = f"{result['images']} {split}images of"
    tables.metrics(
        f"{result['run']}, step {result['step']}: {which} {result['dataset']}",
        [
            MetricRow("  " * metric.is_term + metric.title, value, error, unit)
            for metric, value, error, unit in metric_table.measurements(result)
        ],
        "mean over the images ± its standard error",
        f"pixels {conditions['pixels']}; likelihood: {conditions['likelihood']}"
        + (", given each image's label" if conditions.get("conditional") else ""),
        f"ELBO of 1 posterior sample; noise seed {conditions['noise_seed']}; {conditions['precision']} on "
        f"{conditions['device']}, threads: {conditions['threads']}"
        + ("; moving average of the weights" if conditions["weights"] == "ema" else ""),
        warning=result["warning"],
    )
