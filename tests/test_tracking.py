"""With the real W&B client: offline, its records read with its own `wandb leet inspect`, and against a stand-in."""

import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import wandb

from tests.conftest import MakeConfig
from tests.wandb_server import Run, WandbServer
from vae_dist import config as configs
from vae_dist import tracking
from vae_dist.errors import RunError, UserError
from vae_dist.evaluation import evaluate
from vae_dist.trainer import train

KEY = "0123456789" * 4  # of no account


def inspect(record: Path, *options: str) -> str:
    command = [sys.executable, "-m", "wandb", "leet", "inspect", *options, "--json", str(record)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_wandb_gets_what_the_run_directory_has(make_config: MakeConfig) -> None:
    config = make_config("name=mine", "tracking.wandb=auto", "tracking.tags=[one,two]")
    run_dir = train(config)
    time.sleep(1.1)  # W&B names its records by the second
    evaluate(run_dir)
    records = sorted((run_dir / "wandb").glob("offline-run-*"))
    assert len(records) == 2
    assert len({record.name.rpartition("-")[2] for record in records}) == 1  # one identity: they land on one page

    trained, evaluated = (json.loads(inspect(record, "--summary")) for record in records)
    assert trained["config"]["model"]["latent_dim"] == 8 and trained["config"]["data"]["name"] == "synthetic_digits"
    assert trained["exit_code"] == 0
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    last = {key: value for row in rows for key, value in row.items()}
    for name in ("train/loss", "train/images_per_second", "validation/negative_elbo"):
        assert trained["summary"][name] == pytest.approx(last[name])
    assert evaluated["summary"]["test/negative_elbo"] == pytest.approx(last["test/negative_elbo"])
    for name in ("reconstructions", "samples"):
        assert trained["summary"][f"images/{name}"]["_type"] == "image-file"
        assert "step 40" in trained["summary"][f"images/{name}"]["caption"]
        assert len(list(records[0].glob(f"files/media/images/images/{name}_*.png"))) == 2


def test_the_run_directory_can_be_moved(make_config: MakeConfig) -> None:
    run_dir = train(make_config("name=mine", "tracking.wandb=offline", "train.steps=5"))
    assert not [path for path in run_dir.rglob("*") if path.is_symlink() and path.readlink().is_absolute()]


def test_a_run_that_goes_on_keeps_its_identity(make_config: MakeConfig) -> None:
    for steps in (5, 10):
        time.sleep(1.1)  # W&B names its records by the second
        run_dir = train(make_config("name=mine", "tracking.wandb=offline", f"train.steps={steps}"))
    records = sorted((run_dir / "wandb").glob("offline-run-*"))
    assert len(records) == 2 and len({record.name.rpartition("-")[2] for record in records}) == 1


def test_a_failed_run_is_marked_as_failed(make_config: MakeConfig) -> None:
    with pytest.raises(RunError):
        train(make_config("name=mine", "tracking.wandb=offline", "optim.learning_rate=1e30"))
    record = next(Path("runs/mine/wandb").glob("offline-run-*"))
    assert json.loads(inspect(record, "--summary"))["exit_code"] == 1


def test_training_needs_no_wandb(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it fails
    run_dir = train(make_config("name=mine", "tracking.wandb=auto", "train.steps=5"))
    assert "wandb is not installed" in (run_dir / "log.txt").read_text()
    with pytest.raises(UserError, match="pip install wandb"):
        train(make_config("name=other", "tracking.wandb=offline"))


def test_a_server_that_cannot_be_reached_leaves_the_run_offline(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr(tracking, "REACH_SECONDS", 3)
    run_dir = train(make_config("name=mine", "tracking.wandb=auto", "train.steps=5"))
    assert "W&B can't be reached" in (run_dir / "log.txt").read_text()
    assert list((run_dir / "wandb").glob("offline-run-*"))
    assert not [path for path in run_dir.rglob("*") if path.is_symlink() and path.readlink().is_absolute()]
    assert "0" * 40 not in (run_dir / "config.yaml").read_text() + (run_dir / "log.txt").read_text()


def test_an_account_that_is_none_leaves_the_run_offline(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "not a key")
    run_dir = train(make_config("name=mine", "tracking.wandb=auto", "train.steps=5"))
    assert "the W&B account can't be used" in (run_dir / "log.txt").read_text()
    with pytest.raises(UserError, match="no account is set up"):
        train(make_config("name=other", "tracking.wandb=online"))


def test_rows_beyond_the_checkpoint_are_cut_and_half_a_row_does_no_harm(tmp_path: Path) -> None:
    rows = [{"step": step, "train/loss": float(step)} for step in (5, 10, 15)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 20, "tra')
    directory = tracking.RunDirectory(tmp_path, start=10)
    directory.scalars(15, {"train/loss": 1.5})
    kept = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert kept == [*rows[:2], {"step": 15, "train/loss": 1.5}]


@pytest.mark.parametrize("identity", ["../other", "a b", "", "a" * 65, "a\n", "é"])
def test_an_identity_is_a_plain_word(identity: str, tmp_path: Path, make_config: MakeConfig) -> None:
    config = make_config()
    config.tracking.id = identity
    configs.save(config, tmp_path / "config.yaml")
    with pytest.raises(UserError, match=r"tracking\.id="):
        configs.read(tmp_path / "config.yaml")
    config.tracking.id = "Aa0_-" + "x" * 59
    configs.check(config)


def test_other_processes_write_nothing_and_draw_nothing(make_config: MakeConfig, tmp_path: Path) -> None:
    with tracking.track(make_config(), tmp_path / "run", is_main=False, start=0) as tracker:
        tracker.scalars(1, {"train/loss": 1.0})
        tracker.pictures(1, lambda: pytest.fail("drawn"))
    assert not (tmp_path / "run").exists()


@pytest.fixture
def server() -> Iterator[WandbServer]:
    """A W&B server of the test's own. The client's service remembers its server and account: it must not outlive it."""
    wandb.teardown()
    server = WandbServer()
    yield server
    wandb.teardown()
    server.close()


def log_in(server: WandbServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    monkeypatch.setenv("WANDB_API_KEY", KEY)


def check_that_all_arrived(run_dir: Path, run: Run) -> None:
    """The rows of the run's directory in their order, each once, and the picture that each picture's row speaks of."""
    rows = [{key: value for key, value in row.items() if not key.startswith("_")} for row in run.history]
    figures = [row for row in rows if not any(key.startswith("images/") for key in row)]
    assert figures == [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    # what is added to a run goes on from what W&B has: it does not start again at 0, over what is there
    assert [row["_step"] for row in run.history] == list(range(len(rows)))

    pictures = {key: value for row in rows for key, value in row.items() if key.startswith("images/")}
    assert set(pictures) == {"images/reconstructions", "images/samples", "images/test"}
    for picture in pictures.values():
        assert hashlib.sha256(run.files[picture["path"]]).hexdigest() == picture["sha256"]
    others = set(run.files) - {picture["path"] for picture in pictures.values()}
    assert others <= {"config.yaml", "wandb-summary.json", "wandb-metadata.json"}  # no code, diff, packages or console
    assert "output.log" not in run.streams


def test_with_an_account_a_run_is_online_and_its_rows_and_pictures_arrive(
    make_config: MakeConfig, tmp_path: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_in(server, monkeypatch)
    run_dir = train(make_config("name=mine", "tracking.wandb=auto", "train.steps=10"))
    time.sleep(1.1)  # W&B names its records by the second
    evaluate(run_dir)
    (identity, run), *others = server.runs.items()
    assert not others and identity == configs.read(run_dir / "config.yaml").tracking.id
    assert run.name == "mine" and run.config["model"]["latent_dim"] == 8
    check_that_all_arrived(run_dir, run)
    assert {"train/loss", "validation/negative_elbo", "test/negative_elbo"} <= set(run.summary)
    assert f"{server.url}/somebody/vae_dist/runs/{identity}" in (run_dir / "log.txt").read_text()
    assert not [operation for operation in server.operations if "Artifact" in operation]
    assert not [body for body in server.bodies if KEY.encode() in body]
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]


def test_what_was_written_offline_can_be_synced(
    make_config: MakeConfig, tmp_path: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = train(make_config("name=mine", "tracking.wandb=offline", "train.steps=10"))
    time.sleep(1.1)  # W&B names its records by the second
    evaluate(run_dir)
    assert not server.runs
    moved = run_dir.rename(tmp_path / "moved")
    log_in(server, monkeypatch)
    command = [sys.executable, "-m", "wandb", "sync", *map(str, (moved / "wandb").glob("offline-run-*"))]
    subprocess.run(command, check=True, capture_output=True, stdin=subprocess.DEVNULL, timeout=60)
    (run,) = server.runs.values()
    check_that_all_arrived(moved, run)
