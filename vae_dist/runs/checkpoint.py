"""Run directories and checkpoints: written whole or not at all, verified before they are trusted, and free of pickle.

runs/<name>/checkpoints/step_00001200/
    model.safetensors       the weights, under their plain names
    optimizer.safetensors   Adam's moments and counts, as <parameter>.<moment>
    state.json              the step, and what the rows of the metrics file still to come depend on
    config.yaml             the resolved config: with the weights, all that evaluation and sampling need
    manifest.json           sizes and sha256 of the others, and versions; written last

Whatever else is in the folder is no checkpoint: `.writing-*` and `.pruned-*` are on their way in and out and are
removed when a training starts, `set_aside-*` is what a training left behind when it went back to an older step.

A checkpoint may come from a stranger: see manifest.py. Tensors are loaded only where they fit the config's model.
"""

import fcntl
import logging
import re
import secrets
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor, nn

from vae_dist import config as configs
from vae_dist import locks
from vae_dist.config import Config
from vae_dist.distributed import precision
from vae_dist.errors import RunError, UserError
from vae_dist.files import NOT_RENAMED, advice, reason, require_no_links, sync, write_atomically, writing
from vae_dist.models import build_vae
from vae_dist.models.vae import VAE
from vae_dist.runs import manifest
from vae_dist.runs.manifest import MANIFEST, BadCheckpointError

logger = logging.getLogger(__name__)

LOCK, MARK = ".lock", ".writer.json"
LOCK_SECONDS = 10.0  # for a training that was asked to stop to leave the directory to the next one
VISIBLE_SECONDS = 60.0  # for a network file system to show on one machine what another has renamed
READ_ATTEMPTS = 5  # to catch a checkpoint of a live training before it is pruned

_STEP_FOLDER = re.compile(r"step_(\d{8,})")
_DTYPES = {torch.float32: "F32", torch.float64: "F64"}


@dataclass
class Best:
    """The best validation so far."""

    step: int
    negative_elbo: float  # nats per image


@dataclass
class TrainingState:
    """All that a run remembers beside its weights and the optimizer's moments."""

    step: int = 0  # optimizer steps done
    world_size: int = 1
    window: list[dict[str, float]] = field(default_factory=list)  # each process's sums of the row to come
    loss_scale: dict[str, Any] | None = None  # fp16's
    best: Best | None = None
    skipped_updates: int = 0  # left out because the loss or the gradient was not finite
    validation_pending: bool = False  # the run was stopped inside the validation of this step
    features: dict[str, Any] = field(default_factory=dict)  # by name: what a feature has to remember


class Optimizer(Protocol):
    """What a checkpoint saves and restores of an optimizer: the named state of each parameter, in their order."""

    MOMENTS: ClassVar[tuple[str, ...]]
    state: list[dict[str, Tensor]]

    def load(self, state: Iterable[Mapping[str, Tensor]]) -> None: ...


@contextmanager
def locked(run_dir: Path, take_over: str | None = None) -> Iterator[None]:
    """Keep other trainings out of a run's directory. Raises UserError where one is in it.

    Where the file system has no locks, a file MARK does this; `take_over` names one whose training is gone.
    """
    subject = f"another training is writing {run_dir}"
    with ExitStack() as held:
        try:
            with writing(run_dir, "choose another runs_dir"):
                problem = held.enter_context(locks.locked(run_dir / LOCK, LOCK_SECONDS, subject))
                if problem is not None:
                    held.enter_context(locks.marked(run_dir / MARK, LOCK_SECONDS, subject, take_over))
        except locks.InUseError as error:
            raise UserError(_in_use(run_dir, error)) from None
        if problem is not None:
            logger.warning(
                "%s can't be locked (%s): the file %s keeps other trainings out, and stays if this process is killed",
                run_dir, reason(problem), MARK,
            )  # fmt: skip
        yield


def _in_use(run_dir: Path, error: locks.InUseError) -> str:
    way_out = "wait for its end, or choose another name for a run of its own"
    if error.mark is not None:
        way_out += f"; if it is gone (this file system has no locks to tell), give checkpoint.take_over={error.mark}"
    return f"another training is writing {run_dir} ({error}); {way_out}"


def is_being_trained(run_dir: Path) -> bool:
    """Whether a training holds the directory."""
    return locks.is_held(run_dir / LOCK, fcntl.LOCK_SH, run_dir / MARK)


def write(run_dir: Path, config: Config, model: nn.Module, optimizer: Optimizer, state: TrainingState) -> Path:
    """Publish a checkpoint under `run_dir`, then prune older ones. One process calls this.

    Raises RunError where it can't be written and where a number in it is not finite; what was there before stays.
    """
    folder = run_dir / "checkpoints"
    target = folder / f"step_{state.step:08d}"
    temporary = folder / f".writing-{target.name}-{secrets.token_hex(4)}"
    weights, moments = _plain(model.state_dict()), _plain(_moments(model, optimizer))
    if not _all_finite([*weights.values(), *moments.values()]):
        raise RunError(f"the weights or moments after step {state.step} are not finite; they are not saved")
    try:
        temporary.mkdir(parents=True)
        contents = {
            "model.safetensors": save(weights),
            "optimizer.safetensors": save(moments),
            "state.json": manifest.to_json(asdict(state)),
            "config.yaml": configs.to_yaml(config).encode(),
        }
        for name, content in {**contents, MANIFEST: manifest.to_json(manifest.seal(contents, state.step))}.items():
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
            f"the same command with name={config.name} goes on from the newest checkpoint"
        ) from error
    _prune(run_dir, config.checkpoint.keep, state.best)
    return target


def recover(run_dir: Path) -> None:
    """Finish what a killed training was publishing, where all of it is there; remove what is half written or half
    pruned. Whoever calls this holds the directory.
    """
    for leftover in run_dir.glob("checkpoints/.writing-*"):
        target = leftover.with_name(leftover.name.removeprefix(".writing-").rpartition("-")[0])
        if not _is_whole(target) and _is_whole(leftover):
            if target.exists():
                _remove(target)
            _publish(leftover, target)
    for leftover in [*run_dir.glob("checkpoints/.writing-*"), *run_dir.glob("checkpoints/.pruned-*")]:
        shutil.rmtree(leftover, ignore_errors=True)


def go_back(run_dir: Path, step: int) -> None:
    """Set checkpoints of later steps aside. A training that goes on after `step` comes by there again; if it is stopped
    before, it must not go on from those.
    """
    for folder in _step_folders(run_dir):
        if int(folder.name.removeprefix("step_")) > step:
            logger.warning("set aside: %s", _set_aside(folder))


def newest(run_dir: Path) -> Path | None:
    """The newest whole checkpoint of a run, None where there is none. Raises UserError where all are damaged."""
    folders = _step_folders(run_dir)
    for folder in folders:
        try:
            verify(folder)
            return folder
        except BadCheckpointError as error:
            if folder.exists():  # otherwise it was pruned in this very moment
                logger.warning("passing over a checkpoint: %s", error)
    if folders:
        raise UserError(f"all checkpoints in {run_dir / 'checkpoints'} are damaged; nothing was started or changed")
    return None


def find(path: Path | None, runs_dir: Path) -> Path:
    """The checkpoint that `path` means: itself, RUN/best, or the newest of the run; the newest run's when left out."""
    try:
        return _find(_newest_run(runs_dir) if path is None else path)
    except OSError as error:
        raise UserError(f"can't look into {runs_dir if path is None else path} ({reason(error)})") from error


def _newest_run(runs_dir: Path) -> Path:
    found = {}
    if runs_dir.is_dir():
        next(runs_dir.iterdir(), None)  # a glob passes over a folder that may not be looked into
    for file in runs_dir.glob("*/checkpoints/step_*/" + MANIFEST):
        with suppress(FileNotFoundError):  # a training has just pruned it
            found[file.stat().st_mtime] = file.parents[2]
    if not found:
        raise UserError(f"there is no trained run in {runs_dir}; train one first, or name a run's directory")
    return found[max(found)]


def _find(path: Path) -> Path:
    if path.name == "checkpoints" and any(path.glob(f"step_*/{MANIFEST}")):
        path = path.parent
    if path.is_file() and (path.parent / MANIFEST).exists():
        path = path.parent
    if (path / MANIFEST).exists():
        verify(path)
        return path
    if path.name == "best" and not path.exists():
        return _best(path.parent)
    if not path.is_dir():
        raise UserError(f"there is no run at {path}; give a run's directory or one of its checkpoints")
    checkpoint = newest(path)
    if checkpoint is None:
        raise UserError(f"{path} has no checkpoint yet; give the directory of a run that has saved one")
    return checkpoint


def best_or_newest(run_dir: Path) -> Path:
    """A run's best checkpoint by validation, or its newest where nothing was validated."""
    newest = find(run_dir, run_dir)
    best = read_state(newest).best
    if best is None:
        return newest
    folder = run_dir / "checkpoints" / f"step_{best.step:08d}"
    verify(folder)
    return folder


def _best(run_dir: Path) -> Path:
    if read_state(find(run_dir, run_dir)).best is None:
        raise UserError(f"{run_dir} has no validation yet, so no best checkpoint; give {run_dir} for its newest")
    return best_or_newest(run_dir)


def verify(folder: Path) -> int:
    """The step of a checkpoint whose files are what its manifest says. Raises BadCheckpointError for another one."""
    step = read_state(folder).step
    if manifest.verify(folder) != step:
        raise BadCheckpointError(f"{folder} is damaged: its manifest and its state are of different steps")
    return step


def await_visible(folder: Path) -> None:
    """Wait for a checkpoint that another process has seen. Raises RunError where it does not come into sight."""
    give_up = time.monotonic() + VISIBLE_SECONDS
    while not (folder / MANIFEST).exists():
        if time.monotonic() > give_up:
            raise RunError(f"{folder} can't be seen by all processes; they need a file system that they share")
        time.sleep(0.1)
        if folder.parent.is_dir():
            list(folder.parent.iterdir())  # a network file system then asks its server anew


class Opened(NamedTuple):
    """A checkpoint chosen for evaluation or sampling."""

    folder: Path
    config: Config  # the run's, with what may be changed for looking at it
    step: int
    output: Path  # where what is made from it goes
    live: bool  # whether a training is writing the run now


@contextmanager
def open_for_reading(path: Path | None, arguments: Sequence[str]) -> Iterator[Opened]:
    """The checkpoint that `path` means (see `find`), with its config and `key=value` arguments.

    While the context lasts, no training prunes it.
    """
    runs_dir, rest = configs.take(arguments, "runs_dir")
    with _keep(path, Path(runs_dir)) as folder:
        config = configs.load_reader(read_config(folder), rest)
        home = folder.parents[1] if folder.parent.name == "checkpoints" else folder
        output = Path(config.output) if config.output else home
        if output == home:
            require_no_links(home)
        yield Opened(folder, config, read_state(folder).step, output, is_being_trained(home))


@contextmanager
def _keep(path: Path | None, runs_dir: Path) -> Iterator[Path]:
    """`find`, and a lock that all may share and that keeps the pruner off."""
    for _ in range(READ_ATTEMPTS):
        folder = find(path, runs_dir)
        try:
            file = manifest.open_small(folder / MANIFEST)
        except BadCheckpointError:
            continue  # pruned since it was found
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError as error:
                logger.info("%s can't be locked (%s)", folder, reason(error))
            if (folder / MANIFEST).exists():
                yield folder
                return
    raise UserError(f"{path or runs_dir}: its checkpoints are pruned faster than they can be opened; try again")


def read_config(folder: Path) -> Config:
    """The config in a checkpoint. Raises UserError for one that can't be used."""
    manifest.content(folder, "config.yaml")  # is what the manifest says
    return configs.read(folder / "config.yaml")


def load_vae(folder: Path, config: Config, device: torch.device) -> VAE:
    """The model in a checkpoint, in float32 (float64 for a run in fp64), for looking at and not for training."""
    shape, dtype = config.data.image_shape, precision.param_dtype(config.train.precision)
    if shape is None or len(shape) != 3 or min(shape) < 1:
        raise BadCheckpointError(f"{folder / 'config.yaml'} does not state a data.image_shape of three sizes")
    try:
        with torch.device("meta"):
            skeleton = build_vae(config, shape).to(dtype)
    except (RuntimeError, OverflowError, TypeError, ValueError) as error:
        raise BadCheckpointError(f"{folder / 'config.yaml'} describes a model that can't be built") from error
    _require_fitting(folder, "model.safetensors", skeleton.state_dict())
    vae = build_vae(config, shape).to(dtype)
    load_model(folder, vae)
    return vae.to(device).eval().requires_grad_(False)


def load_model(folder: Path, model: nn.Module) -> None:
    """Put a checkpoint's weights into `model`; nothing is changed unless all of them fit."""
    model.load_state_dict(_tensors(folder, "model.safetensors", model.state_dict()))


def load_training(folder: Path, model: nn.Module, optimizer: Optimizer) -> TrainingState:
    """Put a checkpoint into `model` and `optimizer`, and return the rest; nothing is changed unless all of it fits."""
    state = read_state(folder)
    expected = {
        f"{name}.{moment}": parameter if moment != "step" else torch.zeros(())
        for name, parameter in model.named_parameters()
        for moment in optimizer.MOMENTS
    }
    moments = _tensors(folder, "optimizer.safetensors", expected)
    load_model(folder, model)
    names = [name for name, _ in model.named_parameters()]
    optimizer.load({moment: moments[f"{name}.{moment}"] for moment in optimizer.MOMENTS} for name in names)
    return state


def read_state(folder: Path) -> TrainingState:
    """What a checkpoint remembers beside its tensors. Raises BadCheckpointError for what no run would have written."""
    values = manifest.parse(manifest.content(folder, "state.json"), folder / "state.json")
    try:
        best = values.get("best")
        state = TrainingState(**{**values, "best": None if best is None else Best(**best)})
    except TypeError as error:
        raise BadCheckpointError(f"{folder / 'state.json'} is not a training's state ({error})") from error
    counts = [state.step, state.world_size, state.skipped_updates, *([state.best.step] if state.best else [])]
    if not isinstance(state.window, list) or not all(isinstance(sums, dict) for sums in state.window):
        raise BadCheckpointError(f"{folder / 'state.json'} is not a training's state")
    numbers = [number for sums in state.window for number in sums.values()]
    numbers += [state.best.negative_elbo] if state.best else []
    if (
        not all(type(count) is int and 0 <= count < 2**63 for count in counts)
        or not all(type(number) in (int, float) and abs(number) <= sys.float_info.max for number in numbers)
        or type(state.validation_pending) is not bool
        or not isinstance(state.features, dict)
        or not isinstance(state.loss_scale, dict | None)
    ):
        raise BadCheckpointError(f"{folder / 'state.json'} is not a training's state")
    return state


def _tensors(folder: Path, name: str, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A file's tensors, by the names, shapes and types that are expected; all of their numbers are finite."""
    _require_fitting(folder, name, expected)
    tensors = load(manifest.content(folder, name))
    if not _all_finite(tensors.values()):
        raise BadCheckpointError(f"{folder / name} holds numbers that are not finite")
    return tensors


def _require_fitting(folder: Path, name: str, expected: Mapping[str, Tensor]) -> None:
    """Compare what a file says that it holds, before any of it is loaded."""
    path = folder / name
    manifest.open_promised(folder, name).close()
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            found = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise BadCheckpointError(f"{path} can't be read ({error})") from error
    wanted = {name: (_DTYPES.get(tensor.dtype), tuple(tensor.shape)) for name, tensor in expected.items()}
    differing = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
    if differing:
        raise BadCheckpointError(f"{path} does not fit the config's model: {', '.join(differing[:3])} differ")


def _moments(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}.{moment}": value
        for (name, _), state in zip(model.named_parameters(), optimizer.state, strict=True)
        for moment, value in state.items()
    }


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}


def _all_finite(tensors: Iterable[Tensor]) -> bool:
    return all(bool(tensor.abs().amax().isfinite()) for tensor in tensors)  # one pass, and NaN is the largest of all


def _prune(run_dir: Path, keep: int, best: Best | None) -> None:
    """Remove all checkpoints but the newest, the best, and those that somebody is reading."""
    for folder in _step_folders(run_dir)[keep:]:
        is_best = best is not None and folder.name == f"step_{best.step:08d}"
        if is_best or locks.is_held(folder / MANIFEST, fcntl.LOCK_EX):
            continue
        try:
            _remove(folder)
        except OSError as error:
            logger.warning("%s can't be removed (%s); the training goes on", folder, reason(error))


def _publish(folder: Path, target: Path) -> None:
    """Give a whole checkpoint its name. Until all of it is there, it is no checkpoint, and `recover` finishes this."""
    try:
        folder.rename(target)
    except OSError as error:
        if error.errno not in NOT_RENAMED:
            raise
        target.mkdir()
        try:
            for name in (*manifest.FILES, MANIFEST):
                write_atomically(target / name, (folder / name).read_bytes())
        except OSError:
            shutil.rmtree(target, ignore_errors=True)
            raise
        sync(target)
        shutil.rmtree(folder, ignore_errors=True)


def _remove(folder: Path) -> None:
    """From the first step on it is no checkpoint, however long the removal takes."""
    removed = folder.with_name(f".pruned-{folder.name}-{secrets.token_hex(4)}")
    try:
        folder.rename(removed)
    except OSError as error:
        if error.errno not in NOT_RENAMED:
            raise
        (folder / MANIFEST).unlink(missing_ok=True)
        removed = folder
    shutil.rmtree(removed)


def _set_aside(folder: Path) -> Path:
    aside = folder.with_name(f"set_aside-{folder.name}-{secrets.token_hex(4)}")
    return Path(shutil.move(folder, aside))


def _is_whole(folder: Path) -> bool:
    try:
        verify(folder)
    except BadCheckpointError:
        return False
    return True


def _step_folders(run_dir: Path) -> list[Path]:
    """A run's checkpoint folders, newest first. Raises UserError where nobody may look for them."""
    try:
        paths = list((run_dir / "checkpoints").iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise UserError(f"can't look into {run_dir / 'checkpoints'} ({reason(error)})") from error
    found = [(match, path) for path in paths if (match := _STEP_FOLDER.fullmatch(path.name))]
    return [path for match, path in sorted(found, key=lambda pair: int(pair[0][1]), reverse=True)]
