"""Shared fixtures of the tests on a GPU, which need no more than the package, pytest and one GPU."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

from tests.image_folders import image_bytes
from vae_dist import config
from vae_dist.config import Config
from vae_dist.training.loop import train

REPOSITORY = Path(__file__).resolve().parents[2]
STEPS, CUT = 30, 17  # of a training on colour images; where one is stopped that resumes

Train = Callable[..., Path]


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="session")
def arguments(tmp_path_factory: pytest.TempPathFactory, runs: Path) -> list[str]:
    """A training of 70 steps that ends within an epoch, with validations and checkpoints on the way."""
    return [
        f"data.root={tmp_path_factory.mktemp('data')}", "data.name=synthetic_digits", "data.synthetic_images=5000",
        "data.validation_images=500", f"runs_dir={runs}", "tracking.wandb=disabled",
        "device=cuda", "train.steps=70", "train.batch_size=100", "train.log_every=9", "train.validate_every=30",
        "checkpoint.every=23", "model.hidden_dims=[200]", "model.latent_dim=10", "objective.beta_warmup_steps=40",
    ]  # fmt: skip


@pytest.fixture
def make_config(arguments: list[str]) -> Callable[..., Config]:
    return lambda *more: config.load([*arguments, *more])


@pytest.fixture
def run(make_config: Callable[..., Config]) -> Train:
    """Train or resume the run of a name; fail if a step can't be compiled or captured."""
    return lambda name, *more: trained(make_config(f"name={name}", *more))


@pytest.fixture(scope="session")
def colours(tmp_path_factory: pytest.TempPathFactory, runs: Path) -> list[str]:
    """A training on a folder of small colour images in two classes."""
    folder = tmp_path_factory.mktemp("colours")
    for number in range(120):
        path = folder / "ab"[number % 2] / f"{number:03}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(image_bytes(number, size=(20, 18)))
    return [
        "data.name=folder", f"data.path={folder}", "data.size=16", "data.flip=true", "data.workers=2",
        f"data.root={tmp_path_factory.mktemp('data')}", f"runs_dir={runs}", "tracking.wandb=disabled", "device=cuda",
        f"train.steps={STEPS}", "train.batch_size=16", "train.log_every=5", "train.validate_every=100",
        "checkpoint.every=100", "objective.reconstruction=laplace", "objective.sigma=0.3",
    ]  # fmt: skip


@pytest.fixture
def colour_run(colours: list[str]) -> Train:
    """As `run`, on colour images."""
    return lambda name, *more: trained(config.load([*colours, f"name={name}", *more]))


def trained(settings: Config) -> Path:
    folder = train(settings)
    assert "can't be" not in (folder / "log.txt").read_text()
    return folder


def resumed(colour_run: Train, name: str, *given: str) -> Path:
    """Train in two parts, of which the second compiles anew, as another process would."""
    colour_run(name, *given, f"train.steps={CUT}")
    torch.compiler.reset()
    return colour_run(name, *given)


def state_of(run_dir: Path, step: int = STEPS) -> Mapping[str, bytes]:
    """The files of a checkpoint that hold tensors: of all networks, optimizers and averages."""
    folder = run_dir / f"checkpoints/step_{step:08d}"
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}
