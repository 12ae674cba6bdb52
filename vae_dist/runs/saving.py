"""Saving checkpoints: each is published whole or not at all, and older ones are pruned.

Names in `checkpoints/` other than `step_<number>` are not checkpoints: `.writing-*` is being written, `.pruned-*` is
being removed, and both are cleaned up when a training starts; `set_aside-*` was left by a training that resumed from an
older step.
"""

import fcntl
import logging
import re
import secrets
import shutil
from pathlib import Path

from safetensors.torch import save

from vae_dist import config as configs
from vae_dist import locks
from vae_dist.config import Config
from vae_dist.errors import RunError, UserError
from vae_dist.files import advice, reason, renamed, sync, write_atomically
from vae_dist.runs import manifest
from vae_dist.runs.checkpoint import CONFIG, STATE, Checkpoint, Trained, all_finite, hash_of, on_cpu
from vae_dist.runs.manifest import MANIFEST, BadCheckpointError
from vae_dist.runs.state import Best, TrainingState, state_values

logger = logging.getLogger(__name__)

_STEP_FOLDER = re.compile(r"step_(\d{8,})")


def save_checkpoint(run_dir: Path, config: Config, trained: Trained, state: TrainingState) -> Path:
    """Publish a checkpoint in a run's directory, prune older ones, and return its folder. One process calls this.

    Raises RunError if it can't be written or if a number is not finite; existing checkpoints then stay.
    """
    folder = run_dir / "checkpoints"
    target = folder_of(run_dir, state.step)
    temporary = folder / f".writing-{target.name}-{secrets.token_hex(4)}"
    parts = {**trained.networks, **trained.optimizers}
    tensors = {f"{name}.safetensors": on_cpu(part.state_dict()) for name, part in parts.items()}
    if not all(all_finite(part.values()) for part in tensors.values()):
        raise RunError(
            f"the weights or moments after step {state.step} are not finite; they are not saved. Start a new run with "
            "a lower optim.learning_rate or a smaller optim.max_grad_norm"
        )
    try:
        temporary.mkdir(parents=True)
        contents = {
            **{name: save(part) for name, part in tensors.items()},
            STATE: manifest.to_json(state_values(state)),
            CONFIG: configs.to_yaml(config).encode(),
        }
        frozen = {name: hash_of(network) for name, network in trained.frozen.items()}
        sealed = manifest.to_json(manifest.seal(contents, state.step, frozen))
        for name, content in {**contents, MANIFEST: sealed}.items():
            write_atomically(temporary / name, content)
        sync(temporary)
        if target.exists():  # if this process dies between the two renames, `recover` does the second
            _remove(target)
        _publish(temporary, target)
        sync(folder)
    except OSError as error:
        if not _is_whole(temporary):  # otherwise the next training publishes it
            shutil.rmtree(temporary, ignore_errors=True)
        raise RunError(
            f"step {state.step} can't be saved in {folder}: {reason(error)}; {advice(error, 'make it writable')}, then "
            f"the same command with name={config.name} resumes from the newest checkpoint"
        ) from error
    _prune(run_dir, config.checkpoint.keep, state.best)
    return target


def folder_of(run_dir: Path, step: int) -> Path:
    """Return the folder of a step's checkpoint, which need not exist."""
    return run_dir / "checkpoints" / f"step_{step:08d}"


def step_folders(run_dir: Path) -> list[Path]:
    """Return a run's checkpoint folders, the newest first. Raises UserError if they can't be listed."""
    try:
        paths = list((run_dir / "checkpoints").iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise UserError(f"can't read {run_dir / 'checkpoints'} ({reason(error)})") from error
    matches = [(match, path) for path in paths if (match := _STEP_FOLDER.fullmatch(path.name))]
    return [path for match, path in sorted(matches, key=lambda pair: int(pair[0][1]), reverse=True)]


def recover(run_dir: Path) -> None:
    """Publish checkpoints that a killed training had written whole; remove those half written or half pruned.

    The caller holds the run's lock.
    """
    for leftover in run_dir.glob("checkpoints/.writing-*"):
        target = leftover.with_name(leftover.name.removeprefix(".writing-").rpartition("-")[0])
        if not _is_whole(target) and _is_whole(leftover):
            if target.exists():
                _remove(target)
            _publish(leftover, target)
    for leftover in [*run_dir.glob("checkpoints/.writing-*"), *run_dir.glob("checkpoints/.pruned-*")]:
        shutil.rmtree(leftover, ignore_errors=True)


def set_aside_after(run_dir: Path, step: int) -> None:
    """Set aside the checkpoints of steps after `step`.

    A training that resumes from `step` reaches those steps again. If it is interrupted first, it must not resume from
    the old ones.
    """
    for folder in step_folders(run_dir):
        if int(folder.name.removeprefix("step_")) > step:
            set_aside(folder)


def set_aside(path: Path) -> None:
    """Rename a checkpoint or a file, so that nothing finds it any more under its name or its suffix."""
    aside = path.with_name(f"set_aside-{path.name}-{secrets.token_hex(4)}")
    logger.warning("set aside: %s", shutil.move(path, aside))


def _prune(run_dir: Path, keep: int, best: Best | None) -> None:
    """Remove all checkpoints but the newest, the best, and those that a reader has open."""
    for folder in step_folders(run_dir)[keep:]:
        is_best = best is not None and folder == folder_of(run_dir, best.step)
        if is_best or locks.is_held(folder / MANIFEST, fcntl.LOCK_EX):
            continue
        try:
            _remove(folder)
        except OSError as error:
            logger.warning("%s can't be removed (%s); the training continues", folder, reason(error))


def _publish(folder: Path, target: Path) -> None:
    """Rename a whole checkpoint to its final name. If this is interrupted, `recover` finishes it."""
    if renamed(folder, target):
        return
    target.mkdir()
    try:
        for name in (*manifest.read(folder).files, MANIFEST):
            write_atomically(target / name, (folder / name).read_bytes())
    except OSError:
        shutil.rmtree(target, ignore_errors=True)
        raise
    sync(target)
    shutil.rmtree(folder, ignore_errors=True)


def _remove(folder: Path) -> None:
    """Remove a checkpoint. It is no checkpoint any more after the first operation, however long the rest takes."""
    removed = folder.with_name(f".pruned-{folder.name}-{secrets.token_hex(4)}")
    if not renamed(folder, removed):
        (folder / MANIFEST).unlink(missing_ok=True)
        removed = folder
    shutil.rmtree(removed)


def _is_whole(folder: Path) -> bool:
    try:
        Checkpoint(folder).verify()
    except BadCheckpointError:
        return False
    return True
