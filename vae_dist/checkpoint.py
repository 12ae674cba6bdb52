"""Run directories and checkpoints: written whole or not at all, verified before they are trusted, and free of pickle.

runs/<name>/checkpoints/step_00001200/
    model.safetensors       the weights, under their plain names
    optimizer.safetensors   Adam's moments and counts, as <parameter>.<moment>
    state.json              the step, and what the rows of the metrics file still to come depend on
    config.yaml             the resolved config: with the weights, all that evaluation and sampling need
    manifest.json           sizes and sha256 of the others, and versions; written last
"""

import hashlib
import json
import logging
import os
import platform
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.optim import Optimizer

import vae_dist
from vae_dist import config as configs
from vae_dist import runtime
from vae_dist.config import Config
from vae_dist.errors import UserError
from vae_dist.files import write_atomically
from vae_dist.model import build_vae
from vae_dist.model.vae import VAE

logger = logging.getLogger(__name__)

FORMAT = 1
MANIFEST = "manifest.json"
_STEP_FOLDER = re.compile(r"step_(\d{8,})")
_LIBRARIES = ("accelerate", "numpy", "safetensors", "torch")


class BadCheckpointError(UserError):
    """A checkpoint that is not what its manifest says."""


@dataclass
class TrainingState:
    """All that a run remembers beside its weights and the optimizer's moments."""

    step: int = 0  # optimizer steps done
    world_size: int = 1
    window: dict[str, float] = field(default_factory=dict)  # sums of the metrics row that is being gathered
    loss_scale: dict[str, Any] | None = None  # fp16's
    features: dict[str, Any] = field(default_factory=dict)  # by name: what a feature has to remember


def write(run_dir: Path, config: Config, model: nn.Module, optimizer: Optimizer, state: TrainingState) -> Path:
    """Publish a checkpoint under `run_dir` and prune the oldest ones. One process calls this."""
    contents = {
        "model.safetensors": save(_plain(model.state_dict())),
        "optimizer.safetensors": save(_plain(_moments(model, optimizer))),
        "state.json": _json(asdict(state)),
        "config.yaml": configs.to_yaml(config).encode(),
    }
    manifest = {
        "format": FORMAT,
        "step": state.step,
        "files": {
            name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            for name, content in contents.items()
        },
        "versions": {
            "vae_dist": vae_dist.__version__,
            "python": platform.python_version(),
            **{library: version(library) for library in _LIBRARIES},
        },
    }
    folder = run_dir / "checkpoints"
    target = folder / f"step_{state.step:08d}"
    temporary = folder / f".{target.name}.{os.getpid()}"
    temporary.mkdir(parents=True)
    for name, content in {**contents, MANIFEST: _json(manifest)}.items():
        write_atomically(temporary / name, content)
    _sync_folder(temporary)
    if target.exists():  # a run that went back to an older checkpoint comes by here again
        shutil.rmtree(target)
    temporary.rename(target)
    _sync_folder(folder)
    for old in _step_folders(run_dir)[config.checkpoint.keep :]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def newest(run_dir: Path) -> Path | None:
    """The newest whole checkpoint of a run, None where there is none. Raises UserError where all are damaged."""
    folders = _step_folders(run_dir)
    for folder in folders:
        try:
            verify(folder)
            return folder
        except BadCheckpointError as error:
            logger.warning("passing over a checkpoint: %s", error)
    if folders:
        raise UserError(f"all checkpoints in {run_dir / 'checkpoints'} are damaged; nothing was started or changed")
    return None


def find(path: Path | None, runs_dir: Path) -> Path:
    """The checkpoint that `path` means: itself, or the newest of the run; the newest run's when left out."""
    if path is None:
        found = sorted(runs_dir.glob("*/checkpoints/step_*/" + MANIFEST), key=lambda file: file.stat().st_mtime)
        if not found:
            raise UserError(f"there is no trained run in {runs_dir}; train one first, or name a run's directory")
        path = found[-1].parents[2]
    if (path / MANIFEST).exists():
        verify(path)
        return path
    if not path.is_dir():
        raise UserError(f"there is no run at {path}; give a run's directory or one of its checkpoints")
    checkpoint = newest(path)
    if checkpoint is None:
        raise UserError(f"{path} has no checkpoint yet; give the directory of a run that has saved one")
    return checkpoint


def verify(folder: Path) -> int:
    """The step of a checkpoint whose files are what its manifest says. Raises BadCheckpointError for another one."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        if manifest["format"] != FORMAT:
            raise BadCheckpointError(f"{folder} has format {manifest['format']}; this version reads {FORMAT}")
        for name in ("model.safetensors", "optimizer.safetensors", "state.json", "config.yaml"):
            _read(folder, name, manifest)
        return int(manifest["step"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadCheckpointError(f"{folder / MANIFEST} can't be read ({error})") from error


class Opened(NamedTuple):
    """A checkpoint chosen for evaluation or sampling."""

    folder: Path
    config: Config  # the run's, with what may be changed for looking at it
    step: int
    output: Path  # where what is made from it goes


def open_for_reading(path: Path | None, arguments: Sequence[str]) -> Opened:
    """The checkpoint that `path` means (see `find`), with its config and `key=value` arguments."""
    runs_dir, rest = configs.take(arguments, "runs_dir")
    folder = find(path, Path(runs_dir))
    config = configs.load_reader(configs.read(folder / "config.yaml"), rest)
    home = folder.parents[1] if folder.parent.name == "checkpoints" else folder
    return Opened(folder, config, read_state(folder).step, Path(config.output) if config.output else home)


def load_vae(folder: Path, config: Config, device: torch.device) -> VAE:
    """The model in a checkpoint, in float32 (float64 for a run in fp64), for looking at and not for training."""
    if config.data.image_shape is None:
        raise BadCheckpointError(f"{folder / 'config.yaml'} does not state data.image_shape")
    vae = build_vae(config, config.data.image_shape).to(runtime.dtype(config.train.precision))
    load_model(folder, vae)
    return vae.to(device).eval().requires_grad_(False)


def load_model(folder: Path, model: nn.Module) -> None:
    """Put a checkpoint's weights into `model`; nothing is changed unless all of them fit."""
    tensors = load(_read(folder, "model.safetensors"))
    _require_same(tensors, model.state_dict(), folder / "model.safetensors")
    model.load_state_dict(tensors)


def read_state(folder: Path) -> TrainingState:
    return TrainingState(**json.loads(_read(folder, "state.json")))


def load_training(folder: Path, model: nn.Module, optimizer: Optimizer) -> TrainingState:
    """Put a checkpoint into `model` and `optimizer`, and return the rest; nothing is changed unless all of it fits."""
    state = read_state(folder)
    moments = load(_read(folder, "optimizer.safetensors"))
    expected = {
        f"{name}.{moment}": parameter if moment != "step" else torch.zeros(())
        for name, parameter in model.named_parameters()
        for moment in ("step", "exp_avg", "exp_avg_sq")
    }
    _require_same(moments, expected, folder / "optimizer.safetensors")
    load_model(folder, model)
    by_parameter = {
        index: {moment: moments[f"{name}.{moment}"] for moment in ("step", "exp_avg", "exp_avg_sq")}
        for index, (name, _) in enumerate(model.named_parameters())
    }
    optimizer.load_state_dict({"state": by_parameter, "param_groups": optimizer.state_dict()["param_groups"]})
    return state


def _moments(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}.{moment}": value
        for name, parameter in model.named_parameters()
        for moment, value in optimizer.state[parameter].items()
    }


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}


def _require_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path) -> None:
    differing = sorted(
        name
        for name in found.keys() | expected.keys()
        if name not in found or name not in expected or found[name].shape != expected[name].shape
    )
    if differing:
        raise BadCheckpointError(f"{path} does not fit the config's model: {', '.join(differing[:3])} differ")


def _read(folder: Path, name: str, manifest: Mapping[str, Any] | None = None) -> bytes:
    """A checkpoint's file, equal to what the manifest promises."""
    manifest = manifest or json.loads((folder / MANIFEST).read_bytes())
    promised = manifest["files"][name]
    path = folder / name
    try:
        if path.stat().st_size != promised["bytes"]:
            raise BadCheckpointError(f"{path} has {path.stat().st_size} bytes, not {promised['bytes']}")
        content = path.read_bytes()
    except OSError as error:
        raise BadCheckpointError(f"{path} can't be read ({error.strerror})") from error
    if hashlib.sha256(content).hexdigest() != promised["sha256"]:
        raise BadCheckpointError(f"{path} is damaged: its sha256 is not the manifest's")
    return content


def _step_folders(run_dir: Path) -> list[Path]:
    """A run's checkpoint folders, newest first."""
    found = [(match, path) for path in run_dir.glob("checkpoints/*") if (match := _STEP_FOLDER.fullmatch(path.name))]
    return [path for match, path in sorted(found, key=lambda pair: int(pair[0][1]), reverse=True)]


def _sync_folder(folder: Path) -> None:
    """Make a rename inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
