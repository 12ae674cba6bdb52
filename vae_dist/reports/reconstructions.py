"""Reconstructions of the same held-out images by several runs."""

from collections import Counter
from collections.abc import Sequence

import torch

from vae_dist.config import Config
from vae_dist.data import datasets
from vae_dist.data.source import Source, every_label, read
from vae_dist.models.inputs import read_inputs
from vae_dist.models.tensors import to_unit
from vae_dist.reports.labels import held_out_set, labels, subject
from vae_dist.runs.lookup import Opened
from vae_dist.runs.picture import Picture
from vae_dist.views import pictures

COLUMNS = 10  # images in a row


def reconstructions(opened: Sequence[Opened], device: torch.device) -> Picture:
    """Held-out images, and below them for each run a row of their reconstructions from the posterior's mean.

    Runs that are evaluated on other images have a row of originals of their own.
    """
    by_held_out_set: dict[str, list[tuple[str, Opened]]] = {}
    for label, run in zip(labels(opened), opened, strict=True):
        by_held_out_set.setdefault(", ".join(map(str, held_out_set(run.config).values())), []).append((label, run))
    rows, names = [], []
    for name, runs in by_held_out_set.items():
        source = _held_out(runs[0][1].config)
        chosen = _one_of_each(source)
        originals = to_unit(read(source, chosen))
        rows.append(originals)
        names.append("originals" if len(by_held_out_set) == 1 else f"originals: {name}")
        for label, run in runs:
            vae = run.checkpoint.load_vae(run.config, device)
            with torch.inference_mode():
                images, classes = read_inputs(vae, source, chosen)
                rows.append(vae.decode(vae.infer(images, classes).mean, labels=classes).mean.float().cpu())
            names.append(label)
    columns = min(map(len, rows))
    caption = f"{subject(opened)} over their reconstructions from the posterior's mean"
    picture = pictures.labelled_grid(torch.cat([row[:columns] for row in rows]), columns, left=names)
    return Picture(picture, caption)


def _held_out(config: Config) -> Source:
    return (
        datasets.load_test(config.data) if config.evaluate.split == "test" else datasets.load_training(config.data)[1]
    )


def _one_of_each(source: Source) -> list[int]:
    """The indices of COLUMNS images to show: the first of each class, then the second of each, and so on.

    Without labels they are the first images.
    """
    labels = every_label(source)
    if labels is None:
        return list(range(min(COLUMNS, source.info.count)))
    seen: Counter[int] = Counter()
    turns = []
    for index, label in enumerate(labels.tolist()):
        turns.append((seen[label], label, index))
        seen[label] += 1
    return [index for _, _, index in sorted(turns)[:COLUMNS]]
