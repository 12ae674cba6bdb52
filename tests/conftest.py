"""Shared fixtures: a small config over embedded digits that are drawn once, and a clean environment."""

import gc
import os
import signal
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from hypothesis import HealthCheck, settings
from hypothesis.configuration import set_hypothesis_home_dir
from torch import Tensor, nn

from tests.forked import ForkServer
from vae_dist import config
from vae_dist.compute.cuda_graph import Capture
from vae_dist.config import Config
from vae_dist.data.batches import Batch
from vae_dist.distributed import precision as precisions
from vae_dist.distributed.world import World
from vae_dist.models import build_vae
from vae_dist.models.vae import VAE
from vae_dist.runs.lookup import Opened, open_checkpoint
from vae_dist.runs.run import RunDirectory
from vae_dist.training.loss_scaler import LossScaler
from vae_dist.training.optimizers import OPTIMIZERS
from vae_dist.training.update import Update, freeze
from vae_dist.training.vae_recipe import VAERecipe

# Before wandb and huggingface_hub are imported anywhere: no account, no server, nothing reported.
os.environ.update(
    WANDB_ERROR_REPORTING="false", WANDB_SILENT="true", WANDB_BASE_URL="http://127.0.0.1:9", WANDB_DATA_DIR="/tmp",
    HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_DISABLE_TELEMETRY="1", HF_HUB_DISABLE_XET="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1", HF_HOME="/nonexistent",
)  # fmt: skip
for name in ("WANDB_API_KEY", "WANDB_MODE", "OMP_NUM_THREADS", "HF_TOKEN", "HF_HUB_OFFLINE"):
    os.environ.pop(name, None)

# A shell's background job ignores SIGINT and a job of nohup SIGHUP, and the programs under test would too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores

os.fsync = lambda fd: None  # slow, and only a power cut would tell

# The same examples every time, and no database of them.
hypothesis_home = tempfile.TemporaryDirectory()  # otherwise it makes one in the folder that the tests are run from
set_hypothesis_home_dir(hypothesis_home.name)
settings.register_profile(
    "suite", derandomize=True, database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("suite")

REPOSITORY = Path(__file__).resolve().parents[1]

MakeConfig = Callable[..., Config]


def pytest_collection_finish() -> None:
    """Spare the libraries' objects the collections of garbage that tests ask for."""
    gc.freeze()


@pytest.fixture(scope="session")
def fork_server() -> Iterator[ForkServer]:
    """Python processes that have imported torch already."""
    server = ForkServer()
    yield server
    server.close()


@pytest.fixture(scope="session")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="session")
def smoke_arguments(data_root: Path) -> list[str]:
    """A small training on the embedded digits: 20 steps an epoch."""
    return [
        str(REPOSITORY / "configs/smoke.yaml"),
        f"data.root={data_root}",
        "tracking.wandb=disabled",
        "device=cpu",
        "train.threads=1",
        "train.compile=false",  # or those that are to run until they are stopped would be compiled
    ]


@pytest.fixture
def make_config(smoke_arguments: list[str], tmp_path: Path) -> MakeConfig:
    """The small training's config with `key=value` arguments, its runs below the test's own folder."""

    def make(*arguments: str) -> Config:
        return config.load([*smoke_arguments, f"runs_dir={tmp_path / 'runs'}", *arguments])

    return make


class Parts:
    """A VAE and its optimizer, as a checkpoint holds them."""

    def __init__(self, vae: VAE, config: Config) -> None:
        self.vae = vae
        self.optimizer = OPTIMIZERS[config.optim.optimizer](vae.named_parameters(), config.optim)
        self.networks: dict[str, nn.Module] = {"model": vae}
        self.optimizers = {"optimizer": self.optimizer}
        self.frozen: dict[str, nn.Module] = {}


def update_of(
    config: Config,
    world: World,
    image_shape: Sequence[int],
    *,
    flat: bool | None = None,
    capture: Capture | None = None,
    last_step: int = 100,
    vae: VAE | None = None,
) -> Update:
    """The optimizer steps of a model, by default a new one, as `train` makes them."""
    if vae is None:
        vae = build_vae(config, image_shape).to(world.device, precisions.param_dtype(config.train.precision))
    freeze(vae, config)
    scaler = LossScaler(config.train.precision, world.device)
    return Update(VAERecipe(vae, config, world, scaler, last_step, flat), config, world, scaler, capture)


def batch_of(pixels: Tensor, noise: Tensor) -> Batch:
    """Batches of k steps `(k, b, ...)` without labels."""
    return Batch(pixels, noise, torch.empty(len(pixels), 0, dtype=torch.int64))


def opened(path: Path, arguments: Sequence[str] = ()) -> Opened:
    """An open checkpoint, for a test that alone uses it."""
    with open_checkpoint(path, arguments) as run:
        return run


def newest_checkpoint(run_dir: Path) -> Path | None:
    """The folder of a run's newest checkpoint."""
    checkpoint = RunDirectory(run_dir).newest()
    return None if checkpoint is None else checkpoint.folder


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Compute on one thread: on small tensors several ones wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Isolate each test from the folder that the tests are run from and from the user's home."""
    torch.set_flush_denormal(False)  # a run in this process leaves it on, and hypothesis wants to draw such numbers
    AcceleratorState._reset_state(reset_partial_state=True)  # a test outside of a run may have changed it
    GradientState._reset_state()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
