"""Runs side by side: their loss curves, their reconstructions of the same images, their figures; and studies, which
train such runs first.
"""

import hashlib
import json
import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vae_dist import config as configs
from vae_dist.config import Config, Study
from vae_dist.data import datasets
from vae_dist.data.datasets import Images
from vae_dist.distributed import processes
from vae_dist.errors import StoppedError, UserError
from vae_dist.evaluation.evaluate import evaluate
from vae_dist.files import ELSEWHERE, make_folder, write_together, writing
from vae_dist.models import check_names
from vae_dist.runs import checkpoint, console, manifest
from vae_dist.runs.checkpoint import Opened
from vae_dist.runs.manifest import MANIFEST, BadCheckpointError
from vae_dist.runs.picture import Picture, to_png, with_caption
from vae_dist.runs.tracking import METRICS
from vae_dist.training.loop import train
from vae_dist.views import pictures, plots
from vae_dist.views.plots import Curve

logger = logging.getLogger(__name__)

COLUMNS = 10  # images in a row of the reconstructions
LONGEST_LABEL = 60  # characters; where more differs, figures show names and the table tells the rest
LONGEST_NAME = 100  # characters of a comparison's folder

# The figures of the table: the name of each in `evaluation.json`, and at the head of its column.
_FIGURES = {
    "negative_elbo": "negative ELBO",
    "reconstruction": "reconstruction",
    "kl": "KL",
    "negative_log_likelihood": "NLL",
    "importance_samples": "K",
    "active_units": "active units",
}


def study(asked: Study) -> Path:
    """Train the runs of a study that are not trained yet, and compare them; the folder of the comparison.

    Raises UserError, before any of them is trained, for names that there are none of, and whatever `train` raises.
    """
    for config in asked.configs:
        datasets.check_name(config.data.name)
        check_names(config)
        configs.check_numbers(config)
    with processes.join(asked.configs[0]) as world:  # around all of them: a launch can't join its processes twice
        console.start(world)
        for number, config in enumerate(asked.configs, start=1):
            logger.info("run %d of %d: %s", number, len(asked.configs), config.name)
            world.set_timeout(config.runtime.start_timeout)
            try:
                train(config)
            except StoppedError as stopped:
                raise StoppedError(
                    f"asked to stop in run {number} of {len(asked.configs)}, {config.name}, which is saved; the same "
                    "command goes on",
                    stopped.exit_code,
                ) from None
        runs = [Path(config.runs_dir) / str(config.name) for config in asked.configs]
        return compare(runs, [*asked.reading, configs.argument("output", str(asked.output))])


def compare(runs: Sequence[Path], arguments: Sequence[str] = ()) -> Path:
    """Compare checkpoints (see `checkpoint.find`) on held-out images; the folder of what is written.

    A checkpoint that was evaluated is not evaluated again. Raises UserError for what is no run, for images of several
    shapes, and whatever `evaluate` raises.
    """
    if not runs:
        raise UserError("nothing to compare; name some runs' directories or checkpoints (--help says more)")
    runs_dir, arguments = configs.take(arguments, "runs_dir")
    output, arguments = configs.take(arguments, "output")
    with ExitStack() as held:
        found = [held.enter_context(checkpoint.open_for_reading(run, arguments)) for run in runs]
        world = held.enter_context(processes.join(found[0].config))
        console.start(world)
        opened = world.on_main(lambda: list({run.folder.resolve(): run for run in found}.values()))
        _require_one_shape([run.config for run in opened])
        folder = Path(output) if output else Path(runs_dir) / "comparisons" / _folder_name(opened)
        world.on_main(lambda: make_folder(folder, ELSEWHERE))
        kept = world.on_main(lambda: [_kept_evaluation(run, folder) or _place(run, folder) for run in opened])
        evaluations = []
        for number, (run, evaluation) in enumerate(zip(opened, kept, strict=True), start=1):
            if isinstance(evaluation, Path):
                logger.info("evaluating %s (%d of %d)", run.folder, number, len(opened))
                own = [] if evaluation == run.output else [configs.argument("output", str(evaluation))]
                evaluation = evaluate(run.folder, [*arguments, *own, f"device={world.device.type}"])
            evaluations.append(evaluation)
        if world.is_main:
            _write(folder, opened, evaluations, world.device)
    return folder


def labels(opened: Sequence[Opened]) -> list[str]:
    """What tells each run from the others: settings such as `latent_dim=2`; names and steps where these don't."""
    keys = configs.differing([run.config for run in opened])
    result = [", ".join(f"{_short(key)}={value}" for key, value in _settings(run, keys).items()) for run in opened]
    if max(map(len, result)) > LONGEST_LABEL:
        result = [""] * len(opened)
    names = [str(run.config.name) for run in opened]
    steps = [f"step {run.step}" for run in opened]
    for more in (names, steps):
        if "" in result or len(set(result)) < len(result):
            result = [", ".join(filter(None, parts)) for parts in zip(result, more, strict=True)]
    return result


def curves(opened: Sequence[Opened]) -> tuple[list[Curve], tuple[str, str]]:
    """The training losses of runs up to their checkpoints, from their metrics files, and the names of the axes.

    Runs are compared by the images that they have seen where a step has not the same number of them in all, and by the
    negative ELBO where the loss weighs its terms differently.
    """
    objectives = {(run.config.objective.beta, run.config.objective.beta_warmup_steps) for run in opened}
    figure, name = ("loss", "training loss") if len(objectives) == 1 else ("negative_elbo", "training negative ELBO")
    batch_sizes = [run.config.train.batch_size for run in opened]
    same_size = len(set(batch_sizes)) == 1
    found = []
    for run, label, batch_size in zip(opened, labels(opened), batch_sizes, strict=True):
        points = _rows(run.output / METRICS, f"train/{figure}", run.step)
        if len(points) == 0:
            logger.warning("%s has no rows of the training up to step %d: no curve", run.output / METRICS, run.step)
        else:
            found.append(Curve(label, points * torch.tensor([1 if same_size else batch_size, 1])))
    return found, ("optimizer steps" if same_size else "training images seen", f"{name}, nats per image")


def reconstructions(opened: Sequence[Opened], device: torch.device) -> Picture:
    """Held-out images, and below them a row for each run: what it decodes from the posterior's mean of these images.

    Runs that are evaluated on other images have a row of originals of their own.
    """
    by_test_set: dict[str, list[tuple[str, Opened]]] = {}
    for label, run in zip(labels(opened), opened, strict=True):
        by_test_set.setdefault(", ".join(map(str, _test_set(run.config).values())), []).append((label, run))
    rows, names = [], []
    for test_set, runs in by_test_set.items():
        originals = datasets.to_unit(_one_of_each(_held_out(runs[0][1].config)))
        rows.append(originals)
        names.append("originals" if len(by_test_set) == 1 else f"originals: {test_set}")
        for label, run in runs:
            vae = checkpoint.load_vae(run.folder, run.config, device)
            with torch.inference_mode():
                batch = originals.to(vae.device, vae.dtype)
                rows.append(vae.decode(vae.encode(batch).mean).mean.float().cpu())
            names.append(label)
    columns = min(map(len, rows))
    caption = f"{_subject(opened)} over their reconstructions from the posterior's mean"
    picture = pictures.labelled_grid(torch.cat([row[:columns] for row in rows]), columns, left=names)
    return Picture(picture, caption)


def _write(folder: Path, opened: Sequence[Opened], evaluations: Sequence[Any], device: torch.device) -> None:
    """Print the table, and write it, the figures, and what they were made from."""
    shown = with_caption(reconstructions(opened, device))
    contents = {"reconstructions.png": to_png(shown, optimize=True)}
    drawn, axes = curves(opened)
    if drawn:
        contents["losses.png"] = to_png(plots.lines(drawn, axes), optimize=True)
    keys = configs.differing([run.config for run in opened])
    columns = {
        **{_short(key): [_settings(run, keys)[key] for run in opened] for key in keys},
        "step": [str(run.step) for run in opened],
        **_figures(evaluations),
        "run": [str(run.config.name) for run in opened],
    }
    header, rows = list(columns), [list(row) for row in zip(*columns.values(), strict=True)]
    title = f"{_subject(opened)}, nats per image"
    warning = _warning([run.config for run in opened])
    notes = [warning] if warning else _notes(evaluations)
    contents["table.md"] = _markdown(title, header, rows, notes, bool(drawn)).encode()
    compared = {
        "differing_keys": keys,
        "warning": warning,
        "runs": [
            {
                "label": label,
                "run": run.config.name,
                "checkpoint": str(run.folder),
                "step": run.step,
                "settings": {key: configs.flatten(run.config)[key] for key in keys},
                "evaluation": evaluation,
            }
            for label, run, evaluation in zip(labels(opened), opened, evaluations, strict=True)
        ],
    }
    contents["comparison.json"] = manifest.to_json(compared)
    told_apart = bool(keys) and len({tuple(row[: len(keys)]) for row in rows}) == len(rows)
    columns_shown = -1 if told_apart else len(header)  # names would only take room
    console.columns(title, header[:columns_shown], [row[:columns_shown] for row in rows], notes)
    with writing(folder, ELSEWHERE):
        write_together({folder / name: content for name, content in contents.items()})
    logger.info("written to %s", folder)


def _markdown(
    title: str, header: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str], has_curves: bool
) -> str:
    marks = ["---:"] * (len(header) - 1) + ["---"]
    lines = [[cell.replace("|", "\\|") for cell in cells] for cells in (header, marks, *rows)]
    table = [f"| {' | '.join(cells)} |" for cells in lines]
    pictures = ["losses"] * has_curves + ["reconstructions"]
    parts = [f"{title}.", "\n".join(table), *notes, *(f"![{name}]({name}.png)" for name in pictures)]
    return "\n\n".join(parts) + "\n"


def _figures(evaluations: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """The columns of the table that come from evaluations: only those that one of them has something for."""
    columns = {head: [_figure(evaluation.get(name)) for evaluation in evaluations] for name, head in _FIGURES.items()}
    pairs = list(zip(columns.pop("NLL"), columns.pop("K"), strict=True))
    counts = {count for nll, count in pairs if nll}
    if len(counts) == 1:
        columns[f"NLL (K={counts.pop()})"] = [nll for nll, _ in pairs]
    else:
        columns["NLL"] = [nll and f"{nll} (K={count})" for nll, count in pairs]
    return {head: column for head, column in columns.items() if any(column)}


def _figure(value: object) -> str:
    """A figure as it stands in the table; nothing for what is none."""
    return f"{value:.2f}" if type(value) is float else str(value) if type(value) is int else ""


def _require_one_shape(compared: Sequence[Config]) -> None:
    if any(config.data.image_shape != compared[0].data.image_shape for config in compared):
        listed = ", ".join(f"{config.name} {config.data.image_shape}" for config in compared)
        raise UserError(f"these runs are of images of several shapes, which can't be compared: {listed}")


def _warning(compared: Sequence[Config]) -> str | None:
    """Why the figures of these runs do not compare; None where they do."""
    facts = [_test_set(config) | _likelihood(config) for config in compared]
    keys = dict.fromkeys(key for fact in facts for key in fact)
    values = {key: dict.fromkeys(str(fact[key]) for fact in facts if key in fact) for key in keys}
    differing = [f"{key} ({', '.join(found)})" for key, found in values.items() if len(found) > 1]
    if not differing:
        return None
    return f"THE FIGURES OF THESE RUNS DO NOT COMPARE WITH ONE ANOTHER: they differ in {' and '.join(differing)}"


def _notes(evaluations: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the evaluations have to say of their figures. They are files, which somebody else may have written."""
    said = [evaluation.get("warning") for evaluation in evaluations]
    return list(dict.fromkeys(note for note in said if isinstance(note, str) and note.isprintable()))


def _subject(opened: Sequence[Opened]) -> str:
    subjects = (f"{run.config.evaluate.split} images of {run.config.data.name}" for run in opened)
    return " and ".join(dict.fromkeys(subjects))


def _test_set(config: Config) -> dict[str, object]:
    """What decides which images a run is compared on."""
    keys = ["data.name", "data.binarize", "evaluate.split"]
    keys += ["data.synthetic_images"] * (config.data.name == datasets.FALLBACK)
    keys += ["data.validation_images"] * (config.evaluate.split == "validation")
    values = configs.flatten(config)
    return {key: values[key] for key in keys}


def _likelihood(config: Config) -> dict[str, object]:
    """What decides the size of a run's figures on the same images."""
    sigma = {"objective.sigma": config.objective.sigma} if config.objective.reconstruction == "gaussian" else {}
    return {"objective.reconstruction": config.objective.reconstruction, **sigma}


def _place(run: Opened, folder: Path) -> Path:
    """Where an evaluation of a run goes: beside it, or to the comparison where the run can't be written to."""
    try:
        make_folder(run.output, ELSEWHERE)
    except UserError:
        return _own_folder(run, folder)
    return run.output


def _own_folder(run: Opened, folder: Path) -> Path:
    """A run's own folder beside the files of a comparison."""
    return folder / f"{run.config.name}-{hashlib.sha256(str(run.folder.resolve()).encode()).hexdigest()[:8]}"


def _kept_evaluation(run: Opened, folder: Path) -> dict[str, Any] | None:
    """The newest evaluation of a checkpoint that is kept with its run, or else with the comparison; or None."""
    split, saved = run.config.evaluate.split, _modified(run.folder / MANIFEST)
    found = []
    for place in run.output, _own_folder(run, folder):
        kept = (place / "evaluations").glob(f"step_{run.step:08d}_{split}*.json")
        # Those before the checkpoint are of another run, which had this name before.
        found += sorted((path for path in kept if _modified(path) >= saved), key=_modified, reverse=True)
    for path in found:
        try:
            with manifest.open_small(path) as file:
                evaluation = manifest.parse(file.read(), path)
        except BadCheckpointError as error:
            logger.warning("passing over an evaluation: %s", error)
            continue
        numbers = [evaluation.get(name) for name in ("negative_elbo", "reconstruction", "kl")]
        facts = [evaluation.get(name) for name in ("step", "split", "dataset")]
        if facts == [run.step, split, run.config.data.name] and all(type(number) is float for number in numbers):
            return evaluation
        logger.warning("passing over an evaluation: %s is not of %s", path, run.folder)
    return None


def _modified(path: Path) -> float:
    return path.stat().st_mtime


def _rows(path: Path, figure: str, last_step: int) -> Tensor:
    """A figure of a metrics file up to a step: optimizer steps and values `(rows, 2)`, float64."""
    points = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
            step, value = row["step"], row.get(figure)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            continue  # a run that is being written, or was killed, can end in half a row
        if type(step) is int and 0 <= step <= last_step and type(value) is float and math.isfinite(value):
            points.append((step, value))
    return torch.tensor(points, dtype=torch.float64).view(-1, 2)


def _held_out(config: Config) -> Images:
    return (
        datasets.load_test(config.data) if config.evaluate.split == "test" else datasets.load_training(config.data)[1]
    )


def _one_of_each(found: Images) -> Tensor:
    """Pixels to show, `(COLUMNS, C, H, W)` uint8: the first image of each class, then the second of each, and so on."""
    seen: Counter[int] = Counter()
    turns = []
    for index, label in enumerate(found.labels.tolist()):
        turns.append((seen[label], label, index))
        seen[label] += 1
    return found.pixels[[index for _, _, index in sorted(turns)[:COLUMNS]]]


def _settings(run: Opened, keys: Sequence[str]) -> dict[str, str]:
    values = configs.flatten(run.config)
    return {key: configs.as_text(values[key]) for key in keys}


def _short(key: str) -> str:
    """The last part of a key where no other key ends so."""
    last = key.rpartition(".")[2]
    return last if [option.key.rpartition(".")[2] for option in configs.options()].count(last) == 1 else key


def _folder_name(opened: Sequence[Opened]) -> str:
    """The runs' names, shortened where they would be too long."""
    name = "_".join(dict.fromkeys(str(run.config.name) for run in opened))
    if len(name) <= LONGEST_NAME:
        return name
    return f"{name[: LONGEST_NAME - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
