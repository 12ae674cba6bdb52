"""A checkpoint: a folder of files that a manifest seals, free of pickle.

runs/<name>/checkpoints/step_00001200/
    model.safetensors       the weights, under their plain names
    optimizer.safetensors   the optimizer's moments and counts, as <parameter>.<moment>
    ema.safetensors         the moving average of the weights, if the run has one
    state.json              the step, and the values that later metrics records depend on
    config.yaml             the resolved config; with the weights, enough for evaluation and sampling
    manifest.json           sizes and sha256 of the others, and versions; written last

An export is such a folder without what only a training needs: the optimizer's file, and the trained weights beside
their moving average.

A checkpoint may be untrusted: see manifest.py. Tensors are loaded only if they fit the config's model.
"""

import hashlib
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from vae_dist import config as configs
from vae_dist.config import Config
from vae_dist.distributed.precision import param_dtype
from vae_dist.errors import RunError, UserError
from vae_dist.models import build_vae
from vae_dist.models.vae import VAE
from vae_dist.runs import manifest
from vae_dist.runs.manifest import FILES, MANIFEST, BadCheckpointError
from vae_dist.runs.state import TrainingState, parse_state

MODEL, STATE, CONFIG = FILES
OPTIMIZER = "optimizer.safetensors"
VISIBLE_SECONDS = 60.0  # for a network file system to show a rename by another machine
EMA = "ema.safetensors"
INFERENCE_FILES = (MODEL, EMA, STATE, CONFIG)  # evaluation and sampling read these


class Optimizer(Protocol):
    """An optimizer as a checkpoint saves and restores it."""

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None: ...


class Trained(Protocol):
    """What a checkpoint holds: networks and optimizers, in a file `<name>.safetensors` each.

    There are at least the network `model` and the optimizer `optimizer`. Frozen networks are held by their hash alone.
    """

    @property
    def networks(self) -> Mapping[str, nn.Module]: ...

    @property
    def optimizers(self) -> Mapping[str, Optimizer]: ...

    @property
    def frozen(self) -> Mapping[str, nn.Module]: ...


class Checkpoint:
    """A checkpoint's verified files. The manifest is parsed once, and each file is read and hashed at most once.

    Raises BadCheckpointError, a UserError, wherever the folder does not match its manifest. A pickled checkpoint is
    its path: the process that unpickles it reads the files itself.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = manifest.read(folder)
        self._contents: dict[str, bytes] = {}  # verified, and not loaded yet

    def __reduce__(self) -> tuple[Callable[[Path], "Checkpoint"], tuple[Path]]:
        return open_when_visible, (self.folder,)

    @property
    def step(self) -> int:
        """The number of optimizer steps done."""
        return self.manifest.step

    @property
    def run_dir(self) -> Path:
        """The run's directory; the folder itself if it has been moved out of a run."""
        return self.folder.parents[1] if self.folder.parent.name == "checkpoints" else self.folder

    @cached_property
    def state(self) -> TrainingState:
        """The training's state. Raises BadCheckpointError for values that no run writes."""
        return parse_state(self._content(STATE), self.folder / STATE)

    @cached_property
    def config(self) -> Config:
        """The run's config. Raises UserError for one that can't be used."""
        return configs.parse(self._content(CONFIG), self.folder / CONFIG)

    def verify(self, names: Collection[str] | None = None) -> "Checkpoint":
        """Check the size of every file and the hashes of `names`, by default of all; return the checkpoint."""
        files = self.manifest.files
        for name, sealed in files.items():
            manifest.require_size(self.folder / name, sealed)
        for name in files if names is None else [name for name in names if name in files]:
            self._content(name)
        if self.state.step != self.step:
            raise BadCheckpointError(f"{self.folder} is damaged: its manifest and its state are of different steps")
        return self

    def load_vae(self, config: Config, device: torch.device) -> VAE:
        """Build the model in float32 (float64 for a run in fp64) for inference.

        Its weights are the moving average if the run has one, unless the config has `weights=raw`.
        """
        shape, dtype = config.data.image_shape, param_dtype(config.train.precision)
        if shape is None:
            raise BadCheckpointError(f"{self.folder / CONFIG} does not state a data.image_shape")
        try:
            with torch.device("meta"):  # the config may describe more weights than fit into memory
                expected = build_vae(config, shape).to(dtype).state_dict()
        except (RuntimeError, OverflowError, TypeError, ValueError) as error:
            raise BadCheckpointError(f"{self.folder / CONFIG} describes a model that can't be built") from error
        is_average = self.weights(config) == "ema" and self.has_average
        weights = self._tensors(EMA if is_average else MODEL, expected)
        self._contents.pop(MODEL if is_average else EMA, None)  # verified, and not needed here
        vae = build_vae(config, shape).to(dtype)
        vae.load_state_dict(weights)
        return vae.to(device).eval().requires_grad_(False)

    @property
    def has_average(self) -> bool:
        """Whether the checkpoint has a moving average of the weights beside them."""
        return EMA in self.manifest.files

    def weights(self, config: Config) -> str:
        """Return the weights that `load_vae` loads: `ema`, the moving average, or `raw`.

        Raises UserError if the config wants the trained weights of an export of the moving average.
        """
        if self.has_average:
            return config.weights
        if self.manifest.weights == "ema" and config.weights == "raw":
            raise UserError(
                f"{self.folder} holds the moving average of the weights alone: leave out weights=raw, or give a "
                "checkpoint of the run"
            )
        return self.manifest.weights

    def require_training_state(self) -> None:
        """Raise UserError for an export, from which no training can resume."""
        if OPTIMIZER not in self.manifest.files:
            raise UserError(
                f"{self.folder} is an export: it holds no optimizer state, so no training can resume from it; give a "
                "checkpoint of a run"
            )

    def load_training(self, trained: Trained) -> TrainingState:
        """Load networks and optimizers in place, and return the state. Nothing is changed unless everything fits."""
        self.require_training_state()
        state = self.state
        for name, network in trained.frozen.items():
            if self.manifest.frozen.get(name) != hash_of(network):
                raise BadCheckpointError(
                    f"{self.folder} is of a run with other weights of the frozen network {name!r}: name the file that "
                    "the run started with"
                )
        loaded = [
            (part, self._tensors(f"{name}.safetensors", part.state_dict()))
            for name, part in [*trained.networks.items(), *trained.optimizers.items()]
        ]
        for part, tensors in loaded:
            part.load_state_dict(tensors)
        return state

    def _content(self, name: str) -> bytes:
        if name not in self._contents:
            if name not in self.manifest.files:
                raise BadCheckpointError(f"{self.folder} has no {name}")
            self._contents[name] = manifest.read_sealed(self.folder / name, self.manifest.files[name])
        return self._contents[name]

    def _tensors(self, name: str, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Load a file's tensors. They have the expected names, shapes and types, and are finite."""
        path = self.folder / name
        try:
            tensors = load(self._content(name))
        except BadCheckpointError:
            raise
        except Exception as error:  # an untrusted header can do anything to the parser
            raise BadCheckpointError(f"{path} can't be read ({str(error).partition(chr(10))[0]})") from error
        del self._contents[name]
        wanted = {name: (tensor.dtype, tensor.shape) for name, tensor in expected.items()}
        stored = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
        differing = sorted(name for name in stored.keys() | wanted.keys() if stored.get(name) != wanted.get(name))
        if differing:
            raise BadCheckpointError(f"{path} does not fit the config's model: {', '.join(differing[:3])} differ")
        if not all_finite(tensors.values()):
            raise BadCheckpointError(f"{path} holds numbers that are not finite")
        return tensors


def open_when_visible(folder: Path) -> Checkpoint:
    """Open a checkpoint that another process has seen. Raises RunError if it does not become visible."""
    await_visible(folder)
    return Checkpoint(folder)


def await_visible(folder: Path, name: str = MANIFEST) -> None:
    """Wait for a file, such as a checkpoint's, that another process has seen. Raises RunError if it stays invisible."""
    deadline = time.monotonic() + VISIBLE_SECONDS
    while not (folder / name).exists():
        if time.monotonic() > deadline:
            raise RunError(f"{folder} can't be seen by all processes; they need a file system that they share")
        time.sleep(0.1)
        if folder.parent.is_dir():
            list(folder.parent.iterdir())  # a network file system then asks its server again


def hash_of(network: nn.Module) -> str:
    """Return the sha256 of a network's weights and their names."""
    return hashlib.sha256(save(on_cpu(network.state_dict()))).hexdigest()


def on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors as safetensors takes them: on the CPU, and a copy of one that has another name before."""
    moved: dict[str, Tensor] = {}
    addresses: set[int] = set()
    for name, tensor in tensors.items():
        there = tensor.detach().to("cpu").contiguous()
        moved[name] = there.clone() if there.data_ptr() in addresses else there
        addresses.add(there.data_ptr())
    return moved


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Return whether all numbers are finite, in one pass: NaN is the largest of all. Integers and masks are."""
    numbers = (tensor for tensor in tensors if tensor.is_floating_point() and tensor.numel())
    return all(bool(tensor.abs().amax().isfinite()) for tensor in numbers)
