"""A run's identity in W&B: its id, kept in the run's config, and the directory that the id belongs to."""

import hashlib
import os
import secrets
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from vae_dist import config as configs
from vae_dist.config import Config


def new_id() -> str:
    """Return a new W&B id. The run's config keeps it, so that training, evaluations and samples are one W&B run."""
    if "WANDB_SWEEP_ID" in os.environ and "WANDB_RUN_ID" in os.environ:  # an agent of a sweep has chosen it
        return os.environ["WANDB_RUN_ID"]
    return secrets.token_hex(4)


def owner(run_dir: Path) -> str:
    """Return `tracking.owner` of a run's directory, its inode and a hash of its path. Raises OSError if missing."""
    path = run_dir.resolve(strict=True)
    status = path.stat()
    return f"{status.st_dev:x}:{status.st_ino:x}-{hashlib.sha256(os.fsencode(path)).hexdigest()[:12]}"


def own_id(stored: Config, run_dir: Path) -> str | None:
    """Return the W&B id in a run's stored config if it was made for this directory, which may have been moved since.

    A copy has another inode and another path than its original, and gets None: two trainings under one id would
    mix their records. A run of an earlier version has no owner, and is recognised by its name.
    """
    if stored.tracking.owner is None:
        return stored.tracking.id if stored.name == run_dir.resolve().name else None
    parts = zip(stored.tracking.owner.split("-"), owner(run_dir).split("-"), strict=False)
    return stored.tracking.id if any(before == now for before, now in parts) else None


def for_reading(config: Config, run_dir: Path, arguments: Sequence[str]) -> Config:
    """Return the config of a run that is evaluated or sampled, with the W&B id for the results.

    It is the run's own, or the arguments' `tracking.id`. A copy of a run has another one, always the same: its original
    may be training, and two writers would lose records.
    """
    given, _ = configs.take(arguments, "tracking.id")
    own = given or own_id(config, run_dir)
    if own is None and config.tracking.id is not None:
        own = hashlib.sha256(f"{config.tracking.id} {owner(run_dir)}".encode()).hexdigest()[:8]
    return replace(config, tracking=replace(config.tracking, id=own))
