"""The evaluations that are kept with a run."""

from collections.abc import Iterable
from contextlib import suppress

from vae_dist.evaluation.metric_table import protocol_of
from vae_dist.runs.lookup import Opened
from vae_dist.runs.run import EVALUATION, Evaluation, RunDirectory


def of_checkpoint(opened: Opened) -> list[Evaluation]:
    """Return the evaluations of an open checkpoint's weights: of test images first, then in its folder for output.

    Among others, the newest comes first. `evaluation.json` is one of them, and may be of another step.
    """
    found: list[Evaluation] = []
    for directory in dict.fromkeys((opened.output, opened.run.directory)):
        place = RunDirectory(directory)
        latest = [] if place.evaluation is None else [place.evaluation]
        kept = newest_first(opened, [*latest, *place.evaluations(f"step_{opened.step:08d}_*")])
        # It is the newest by definition, though a copy of a run may have lost the times of its files.
        found += sorted(kept, key=lambda one: one.path.name != EVALUATION)
    return sorted(found, key=lambda one: one.values.get("split") != "test")


def newest_first(opened: Opened, evaluations: Iterable[Evaluation]) -> list[Evaluation]:
    """Return those evaluations that are of the weights which the config chooses: the moving average, or `raw`."""
    weights, dated = opened.checkpoint.weights(opened.config), []
    for one in evaluations:
        if protocol_of(one.values).get("weights", "raw") == weights:  # earlier versions do not say: raw
            with suppress(OSError):
                dated.append((one.path.stat().st_mtime, one))
    return [one for _, one in sorted(dated, key=lambda item: item[0], reverse=True)]
