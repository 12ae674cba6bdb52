"""Comparisons of runs: loss curves, reconstructions of the same images, and a table of metrics."""

import hashlib
import logging
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch

from vae_dist import config as configs
from vae_dist.config import Config
from vae_dist.distributed import processes
from vae_dist.errors import UserError
from vae_dist.evaluation.evaluate import evaluate
from vae_dist.evaluation.kept import newest_first
from vae_dist.evaluation.metric_table import protocol_of
from vae_dist.features.files import digest
from vae_dist.files import ELSEWHERE, make_folder, write_together, writing
from vae_dist.reports.curves import error_unit, loss_unit
from vae_dist.reports.labels import labels, names
from vae_dist.reports.reconstructions import reconstructions
from vae_dist.reports.table import incomparable, make_table
from vae_dist.runs import manifest
from vae_dist.runs.lookup import Opened, open_checkpoint
from vae_dist.runs.manifest import MANIFEST
from vae_dist.runs.metrics import METRICS, is_finite
from vae_dist.runs.picture import to_png, with_caption
from vae_dist.runs.run import RunDirectory
from vae_dist.terminal import console, tables
from vae_dist.views import plots
from vae_dist.views.plots import Curve

logger = logging.getLogger(__name__)

LONGEST_NAME = 100  # bytes of a comparison's folder


def compare(runs: Sequence[Path], arguments: Sequence[str] = ()) -> Path:
    """Compare checkpoints (see `lookup.find`) on held-out images. Return the comparison's folder.

    A checkpoint that has an evaluation with the metrics that `arguments` ask for is not evaluated again. Raises
    UserError if a path is no run or if the images have several shapes, and whatever `evaluate` raises.
    """
    if not runs:
        raise UserError("nothing to compare; name some runs' directories or checkpoints (--help says more)")
    runs_dir, arguments = configs.take(arguments, "runs_dir")
    output, arguments = configs.take(arguments, "output")
    with ExitStack() as stack:
        checkpoints = [stack.enter_context(open_checkpoint(run, arguments)) for run in runs]
        if checkpoints[0].config.evaluate.folder is not None:
            raise UserError("runs are compared on their own images: leave out evaluate.folder, which is for make eval")
        world = stack.enter_context(processes.join(checkpoints[0].config))
        console.start(world)
        opened = world.on_main(lambda: list({run.checkpoint.folder.resolve(): run for run in checkpoints}.values()))
        _require_one_shape(opened)
        folder = Path(output) if output else Path(runs_dir) / "comparisons" / _folder_name(opened)
        world.on_main(lambda: make_folder(folder, ELSEWHERE))
        given = {configs.split_key(argument)[0] for argument in arguments}
        kept = world.on_main(lambda: [_kept_evaluation(run, folder, given) or _place(run, folder) for run in opened])
        evaluations = []
        for number, (run, evaluation) in enumerate(zip(opened, kept, strict=True), start=1):
            if isinstance(evaluation, Path):
                logger.info("evaluating %s (%d of %d)", run.checkpoint.folder, number, len(opened))
                own = [] if evaluation == run.output else [configs.argument("output", str(evaluation))]
                evaluation = evaluate(run.checkpoint.folder, [*arguments, *own, f"device={world.device.type}"])
            evaluations.append(evaluation)
        if world.is_main:
            _write(folder, opened, evaluations, world.device)
    return folder


def curves(opened: Sequence[Opened]) -> tuple[list[Curve], tuple[str, str]]:
    """The training curves of runs up to their checkpoints, from their metrics files, and the names of the axes.

    If the batch sizes differ, the first axis counts images instead of steps. If the losses are of several bounds or
    weigh their terms differently, the curves are of a metric that has the same meaning in all runs.
    """
    metric, axis = _metric([run.config for run in opened])
    batch_sizes = [run.config.train.batch_size for run in opened]
    same_size = len(set(batch_sizes)) == 1
    result = []
    for run, label, batch_size in zip(opened, labels(opened), batch_sizes, strict=True):
        points = [point for point in run.run.points(metric) if point[0] <= run.step]
        if points:
            scale = torch.tensor([1 if same_size else batch_size, 1])
            result.append(Curve(label, torch.tensor(points, dtype=torch.float64) * scale))
        else:
            path = run.run.directory / METRICS
            logger.warning("%s has no %s up to step %d: its curve is left out", path, metric, run.step)
    return result, ("optimizer steps" if same_size else "training images seen", axis)


def _metric(compared: Sequence[Config]) -> tuple[str, str]:
    """The metric that the curves of these runs are of, and the name of its axis."""
    first = compared[0]
    recipes = {config.train.recipe for config in compared}
    if len({_loss(config) for config in compared}) == 1:
        return "train/loss", f"training loss, {loss_unit(first)}"
    if recipes == {"vae"}:
        return "train/negative_elbo", "training negative ELBO, nats per image"
    if len(recipes) == 1 and len({config.first_stage.reconstruction for config in compared}) == 1:
        return "train/reconstruction_error", f"training {error_unit(first)}"
    return "validation/negative_elbo", "validation negative ELBO, nats per image"


def _loss(config: Config) -> tuple[object, ...]:
    """The settings that decide what a training loss is an estimate of."""
    if config.train.recipe == "autoencoder":
        return astuple(config.first_stage)
    objective = config.objective
    # An ELBO is the same with any number of samples.
    bound = ("iwae", objective.samples) if objective.is_importance_weighted else (objective.bound, None)
    return *bound, objective.beta, objective.beta_warmup_steps


def _write(folder: Path, opened: Sequence[Opened], evaluations: Sequence[Any], device: torch.device) -> None:
    """Print the table, and write it with the pictures and the evaluations that they show."""
    keys = configs.differing([run.config for run in opened])
    table = make_table(opened, keys, evaluations)
    contents = {"reconstructions.png": to_png(with_caption(reconstructions(opened, device)), optimize=True)}
    drawn, axes = curves(opened)
    if drawn:
        contents["losses.png"] = to_png(plots.lines(drawn, axes), optimize=True)
    pictures = [name for name in ("losses", "reconstructions") if f"{name}.png" in contents]
    contents["table.md"] = table.markdown(pictures).encode()
    contents["comparison.json"] = manifest.to_json(_to_json(opened, keys, evaluations))
    tables.columns(*table.without_redundant_names())
    with writing(folder, ELSEWHERE):
        write_together({folder / name: content for name, content in contents.items()})
    logger.info("written to %s", folder)


def _to_json(opened: Sequence[Opened], keys: Sequence[str], evaluations: Sequence[Any]) -> dict[str, Any]:
    """The content of comparison.json."""
    runs = [
        {
            "label": label,
            "run": run.config.name,
            "checkpoint": str(run.checkpoint.folder),
            "step": run.step,
            "settings": {key: value for key, value in configs.flatten(run.config).items() if key in keys},
            "evaluation": evaluation,
        }
        for label, run, evaluation in zip(labels(opened), opened, evaluations, strict=True)
    ]
    return {"differing_keys": keys, "warning": incomparable(opened), "runs": runs}


def _require_one_shape(opened: Sequence[Opened]) -> None:
    shapes = [run.config.data.image_shape for run in opened]
    if any(shape != shapes[0] for shape in shapes):
        listed = ", ".join(f"{run.config.name} {shape}" for run, shape in zip(opened, shapes, strict=True))
        raise UserError(f"these runs have images of several shapes, which can't be compared: {listed}")


def _place(run: Opened, folder: Path) -> Path:
    """The folder for an evaluation of a run: its own, or one in the comparison if the run's can't be written to."""
    try:
        make_folder(run.output, ELSEWHERE)
    except UserError:
        return _own_folder(run, folder)
    return run.output


def _own_folder(run: Opened, folder: Path) -> Path:
    """A folder for one run inside a comparison's."""
    return folder / f"{run.config.name}-{hashlib.sha256(str(run.checkpoint.folder.resolve()).encode()).hexdigest()[:8]}"


def _kept_evaluation(run: Opened, folder: Path, given: Collection[str]) -> dict[str, Any] | None:
    """Return the newest evaluation of a checkpoint, kept with its run or else with the comparison; None if none is.

    It has the metrics that the options ask for whose keys are `given`.
    """
    split, saved = run.config.evaluate.split, _modified(run.checkpoint.folder / MANIFEST)
    for place in run.output, _own_folder(run, folder):
        found = RunDirectory(place).evaluations(f"step_{run.step:08d}_{split}*")
        # An evaluation that is older than the checkpoint is of another run, which had this name before.
        found = [evaluation for evaluation in found if _modified(evaluation.path) >= saved]
        for path, values in newest_first(run, found):
            metrics = [values.get(name) for name in ("negative_elbo", "reconstruction", "kl")]
            facts = [values.get(name) for name in ("step", "split")]
            titles = run.config.data.title, run.config.data.name  # those of earlier versions have the latter
            if not _has_asked(values, run.config, given):
                continue
            if facts == [run.step, split] and values.get("dataset") in titles and all(map(is_finite, metrics)):
                return values
            logger.warning("skipping an evaluation: %s is not of %s", path, run.checkpoint.folder)
    return None


def _has_asked(evaluation: Mapping[str, Any], config: Config, given: Collection[str]) -> bool:
    """Return whether an evaluation has the metrics that the options ask for whose keys are `given`."""
    options = config.evaluate
    has: dict[str, Callable[[], bool]] = {  # called if they are asked for: weights are large files
        "evaluate.importance_samples": lambda: (
            evaluation.get("importance_samples") == (options.importance_samples or 0)
        ),
        "evaluate.perceptual": lambda: _is_by(evaluation, "lpips", options.perceptual),
        "evaluate.inception": lambda: _is_by(evaluation, "rfid", options.inception),
        "evaluate.fid_samples": lambda: options.fid_samples in (None, evaluation.get("fid_samples")),
    }
    return all(has[key]() for key in has.keys() & given)


def _is_by(evaluation: Mapping[str, Any], metric: str, weights: str | None) -> bool:
    """Return whether an evaluation has a metric by the network of a file; true if no file is named."""
    if weights is None:
        return True
    named = protocol_of(evaluation).get(f"{metric}_sha256")
    return metric in evaluation and named is not None and named == digest(Path(weights))


def _modified(path: Path) -> float:
    return path.stat().st_mtime


def _folder_name(opened: Sequence[Opened]) -> str:
    """The runs' names (see `names`), shortened to LONGEST_NAME with a hash of all of them."""
    name = "_".join(dict.fromkeys(name.replace("/", "-") for name in names(opened)))
    content = os.fsencode(name)
    if len(content) <= LONGEST_NAME:
        return name
    return f"{content[: LONGEST_NAME - 9].decode(errors='ignore')}-{hashlib.sha256(content).hexdigest()[:8]}"
