"""Shared fixtures of the tests on a GPU, which need no more than the package, pytest and one GPU."""

from collections.abc import Callable
from pathlib import Path

import pytest

from vae_dist import config
from vae_dist.config import Config
from vae_dist.training.loop import train

REPOSITORY = Path(__file__).resolve().parents[2]

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

    def once(name: str, *more: str) -> Path:
        folder = train(make_config(f"name={name}", *more))
        assert "can't be" not in (folder / "log.txt").read_text()
        return folder

    return once
