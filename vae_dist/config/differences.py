"""Keys that may differ between a run and a command that reads, resumes or is compared with it."""

from collections.abc import Sequence
from dataclasses import replace

from vae_dist.config.keys import flatten, is_among, options
from vae_dist.config.schema import Config
from vae_dist.config.text import as_text
from vae_dist.errors import UserError

# A command that reads a finished run may set these. The model and its training data are the run's: with another
# data.skip_damaged, images of the user's own that differ from the run's are refused by their identity.
READER_KEYS = (
    "device", "output", "weights", "runs_dir", "data.root", "data.download", "data.mirror", "data.path",
    "data.pack", "data.pack_dir", "data.workers", "data.check", "data.skip_damaged", "train.threads",
    "tracking.", "runtime.", "evaluate.", "sample.", "encode.", "export.",
)  # fmt: skip

# These do not change what is learned.
_ASIDE_KEYS = (
    *READER_KEYS, "name", "train.accumulate", "train.compile", "train.checkpointing", "train.log_every",
    "train.validate_every", "train.nonfinite", "train.max_skipped", "checkpoint.",
)  # fmt: skip

# A resumed run may change these. Its length matters to some schedules (`resume`).
_RESUMABLE_KEYS = (*_ASIDE_KEYS, "first_stage.perceptual", "train.epochs", "train.steps", "train.precision")

# Keys of `data` that are the stored run's when it is resumed with null.
_INHERITED_KEYS = ("image_shape", "validation_images", "test_images", "size", "channels", "identity", "classes")

# A comparison does not tell runs apart by these.
_SAME_RUN_KEYS = (*_ASIDE_KEYS, "data.image_shape", "data.classes")


def resume(config: Config, stored: Config) -> Config:
    """Return `config` for resuming a run whose config is `stored`: `auto` becomes the value that the run had resolved.

    Raises UserError if the two differ in what is learned.
    """
    merged = replace(
        config,
        data=replace(config.data),
        model=config.model.resumed(stored.model),
        objective=replace(config.objective),
        train=replace(config.train),
    )
    if config.data.name == "auto":
        merged.data.name = stored.data.name
    for key in _INHERITED_KEYS:
        if getattr(config.data, key) is None:
            setattr(merged.data, key, getattr(stored.data, key))
    if config.objective.sigma is None:
        merged.objective.sigma = stored.objective.sigma
    if config.train.precision == "auto":
        merged.train.precision = stored.train.precision
    now, before = flatten(merged), flatten(stored)
    shared = [key for key in now if key in before]  # the others are another architecture's, which is named
    keys = [key for key in shared if now[key] != before[key] and not is_among(key, _RESUMABLE_KEYS)]
    because = ""
    length = [key for key in ("train.epochs", "train.steps") if now[key] != before[key]]
    if falls_at_the_end(stored) and length:
        keys += length
        schedule = stored.optim.schedule
        because = f", since optim.schedule={schedule} falls to 0 at the length that the run was started with"
    precisions = [train.precision for train in (merged.train, stored.train)]
    if precisions[0] != precisions[1] and "fp64" in precisions:  # the others keep weights in float32
        keys.append("train.precision")
    if keys:
        changes = ", ".join(f"{key} (was {as_text(before[key])}, now {as_text(now[key])})" for key in keys)
        if config.checkpoint.resume in ("auto", "never"):
            remedy = "choose another name for a new run"
        else:  # under any name it would be refused again
            remedy = (
                f"leave {', '.join(keys)} as it was, or leave out checkpoint.resume={config.checkpoint.resume} and "
                "choose a new name to train from the start"
            )
        raise UserError(f"run {config.name} can't be resumed with another {changes}{because}; {remedy}")
    return merged


def falls_at_the_end(config: Config) -> bool:
    """Return whether the learning rate is 0 at the run's last step, so that the run can't be extended."""
    optim = config.optim
    return optim.schedule != "constant" and optim.stages is None and optim.decay_steps is None


def differing(configs: Sequence[Config]) -> list[str]:
    """Return the keys in which the runs differ, of those that affect what was learned.

    A key of one architecture is among them if runs of this architecture differ in it.
    """
    tables = [flatten(config) for config in configs]
    keys = dict.fromkeys(option.key for option in options() if not is_among(option.key, _SAME_RUN_KEYS))
    values = {key: [table[key] for table in tables if key in table] for key in keys}
    return [key for key in keys if any(value != values[key][0] for value in values[key])]
