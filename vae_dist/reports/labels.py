"""Labels that tell compared runs apart."""

import os
from collections.abc import Sequence
from pathlib import Path

from vae_dist import config as configs
from vae_dist.config import Config
from vae_dist.data import datasets
from vae_dist.runs.lookup import Opened

LONGEST_LABEL = 60  # characters; if one is longer, runs are labelled by name, and only the table has the settings


def labels(opened: Sequence[Opened]) -> list[str]:
    """A label for each run: the settings that differ, such as `latent_dim=2`, then names and steps if need be."""
    keys = configs.differing([run.config for run in opened])
    titles = {key: title_of(key, opened) for key in keys}
    result = [", ".join(f"{titles[key]}={value}" for key, value in settings(run, keys).items()) for run in opened]
    if max(map(len, result)) > LONGEST_LABEL:
        result = [""] * len(opened)
    steps = [f"step {run.step}" for run in opened]
    for more in (names(opened), steps):
        if "" in result or len(set(result)) < len(result):
            result = [", ".join(filter(None, parts)) for parts in zip(result, more, strict=True)]
    return result


def names(opened: Sequence[Opened]) -> list[str]:
    """The runs' names; if runs in several directories share one, as copies do, the end of each directory's path.

    The name is that of the run's directory, which may have been renamed or copied; of another folder with a checkpoint,
    such as an export, the stored one.
    """
    directories = [run.checkpoint.run_dir.resolve() for run in opened]
    own = [
        str(run.config.name) if run.checkpoint.folder.resolve() == directory else _name_of(directory)
        for run, directory in zip(opened, directories, strict=True)
    ]
    if len(set(zip(own, directories, strict=True))) == len(set(own)):
        return own
    for length in range(1, max(len(directory.parts) for directory in directories)):
        ends = {directory: str(Path(*directory.parts[-length:])) for directory in directories}
        if len(set(ends.values())) == len(ends):
            break
    return [ends[directory] for directory in directories]


def _name_of(directory: Path) -> str:
    """Return a directory's name as text: it need not be UTF-8."""
    return os.fsencode(directory.name).decode(errors="replace") or "/"


def settings(run: Opened, keys: Sequence[str]) -> dict[str, str]:
    """The values of those of these config keys that the run has, as text."""
    values = configs.flatten(run.config)
    return {key: configs.as_text(values[key]) for key in keys if key in values}


def title_of(key: str, opened: Sequence[Opened]) -> str:
    """The last part of a config key, or all of it if another key ends in the same part.

    That of a sigma says if a training started from it, and the metrics are of another.
    """
    if key == "objective.sigma" and any(run.config.objective.sigma_kind != "fixed" for run in opened):
        return "initial sigma"
    last = key.rpartition(".")[2]
    same = {option.key for option in configs.options() if option.key.rpartition(".")[2] == last}
    return last if same == {key} else key


def subject(opened: Sequence[Opened]) -> str:
    """The images that the runs are compared on, in words."""
    subjects = (f"{run.config.evaluate.split} images of {run.config.data.title}" for run in opened)
    return " and ".join(dict.fromkeys(subjects))


def held_out_set(config: Config) -> dict[str, object]:
    """The settings that decide which images a run is compared on."""
    keys = ["data.name", "data.binarize", "evaluate.split"]
    keys += ["data.synthetic_images"] * (config.data.name == datasets.FALLBACK)
    keys += ["data.identity", "data.group", "data.test_images"] * (config.data.name in configs.OWN_IMAGES)
    keys += ["data.validation_images"] * (config.evaluate.split == "validation")
    values = configs.flatten(config)
    values["data.identity"] = (config.data.identity or "")[:8]
    return {key: values[key] for key in keys}
