"""With the real W&B client: offline, its records read with its own `wandb leet inspect`, and against a stand-in.

The stand-in fails in all the ways that a server can; the client's service, a process of its own, is stopped and killed.
"""

import base64
import gc
import hashlib
import json
import logging
import math
import os
import pty
import resource
import select
import shutil
import socket
import subprocess
import sys
import termios
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import wandb
from PIL import Image

from tests.conftest import REPOSITORY, MakeConfig
from tests.forked import ForkServer
from tests.wandb_server import Fault, Run, WandbServer
from vae_dist import config as configs
from vae_dist.config import Config
from vae_dist.errors import RunError, StoppedError, UserError
from vae_dist.evaluation.evaluate import evaluate
from vae_dist.runs import manifest, tracking, wandb_client, wandb_identity, wandb_run
from vae_dist.runs.lookup import find
from vae_dist.runs.metrics import is_number, read_records
from vae_dist.runs.metrics_log import MetricsLog
from vae_dist.runs.picture import Picture
from vae_dist.runs.tracking import Tracker
from vae_dist.terminal import console
from vae_dist.training.loop import train
from vae_dist.views.sampling import sample

KEY = "0123456789" * 4  # of no account
AT_ONCE = 1  # seconds: far more than a record takes, less than any wait for a server
SLACK = 10  # seconds that a busy machine may take on top of a bound; without the bound it is a minute or for ever


def inspect(record: Path, *options: str) -> str:
    command = [sys.executable, "-m", "wandb", "leet", "inspect", *options, "--json", str(record)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def identity(record: Path) -> str:
    """The W&B run's, in its record's name: `offline-run-20260102_030405-0123abcd`, with a number if that was taken."""
    return record.name.removeprefix("offline-").split("-")[2]


def test_wandb_gets_what_the_run_directory_has(make_config: MakeConfig) -> None:
    config = make_config("name=mine", "tracking.wandb=auto", "tracking.tags=[one,two]")
    run_dir = train(config)
    evaluate(run_dir)
    records = sorted((run_dir / "wandb").glob("offline-run-*"))
    assert len(records) == 2
    assert len({identity(record) for record in records}) == 1  # they are one W&B run

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


def test_a_resumed_run_keeps_its_identity(make_config: MakeConfig) -> None:
    for steps in (5, 10):
        run_dir = train(make_config("name=mine", "tracking.wandb=offline", f"train.steps={steps}"))
    records = sorted((run_dir / "wandb").glob("offline-run-*"))
    assert len(records) == 2 and len({identity(record) for record in records}) == 1


def id_of(run_dir: Path) -> str:
    """The W&B identity that a run has saved."""
    saved = configs.read(run_dir / "config.yaml").tracking.id
    assert saved is not None
    return saved


def test_a_saved_config_gives_its_runs_identity_to_no_other_run(
    make_config: MakeConfig, smoke_arguments: list[str], tmp_path: Path
) -> None:
    run_dir = train(make_config("name=mine", "train.steps=5"))
    saved, old, own = run_dir / "config.yaml", tmp_path / "old.yaml", tmp_path / "own.yaml"
    old.write_text("".join(line for line in saved.read_text().splitlines(True) if "owner:" not in line))
    own.write_text("tracking:\n  id: abc\n")
    elsewhere = f"runs_dir={tmp_path / 'elsewhere'}"
    others = [(saved, "name=other"), (saved, "name=mine", elsewhere), (old, "name=old"), (old, "name=old", elsewhere)]
    ids = {id_of(train(configs.load([*map(str, arguments)]))) for arguments in others}
    assert len(ids) == 4 and id_of(run_dir) not in ids
    assert id_of(train(replace(configs.read(saved), name="by_hand"))) not in {id_of(run_dir), *ids}

    assert id_of(train(configs.load([str(saved), "train.steps=10"]))) == id_of(run_dir)  # the same run
    assert configs.load([str(saved), "name=other", "tracking.id=abc"]).tracking.id == "abc"
    assert configs.load([*smoke_arguments[:1], str(own)]).tracking.id == "abc"
    study = configs.load_study([str(saved), "name=study", "optim.learning_rate=1e-3,1e-4"])
    assert {config.tracking.id for config in study.configs} == {None}


@pytest.mark.slow
def test_a_copied_run_gets_a_new_identity_and_a_moved_one_keeps_it(
    make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["evaluate.importance_samples=0"]
    runs, elsewhere = tmp_path / "runs", tmp_path / "elsewhere"
    mine = id_of(train(make_config("name=mine", "train.steps=5")))
    for copy in (runs / "copy", elsewhere / "mine"):
        shutil.copytree(runs / "mine", copy)
        train(make_config(f"name={copy.name}", f"runs_dir={copy.parent}", "train.steps=10"))
    assert len({mine, id_of(runs / "copy"), id_of(elsewhere / "mine")}) == 3
    assert "copy is a copy of run mine" in capsys.readouterr().err

    untrained = shutil.copytree(runs / "mine", tmp_path / "untrained")
    evaluate(untrained, [*few, "tracking.wandb=offline"])
    sample(untrained, ["tracking.wandb=offline"])
    evaluate(untrained, [*few, "tracking.wandb=offline", "tracking.id=abc"])
    pages = [identity(record) for record in sorted((untrained / "wandb").glob("offline-run-*"))]
    assert len(pages) == 3 and len(set(pages)) == 2 and pages.count("abc") == 1 and mine not in pages

    moved = runs / "mine"
    for place in (runs / "renamed", tmp_path / "moved" / "renamed"):
        place.parent.mkdir(exist_ok=True)
        moved = moved.rename(place)
        assert id_of(train(make_config("name=renamed", f"runs_dir={place.parent}", "train.steps=10"))) == mine
    evaluate(moved.rename(tmp_path / "again"), [*few, "tracking.wandb=offline"])
    assert {identity(record) for record in (tmp_path / "again/wandb").glob("offline-run-*")} == {mine}


def test_a_run_stored_without_an_owner_is_recognised_by_its_name(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = make_config("name=mine", "tracking.id=abc")
    for parent, name, expected in (("runs", "mine", "abc"), ("elsewhere", "mine", "abc"), ("runs", "other", None)):
        run_dir = tmp_path / parent / name
        run_dir.mkdir(parents=True)
        monkeypatch.chdir(run_dir)
        assert wandb_identity.own_id(stored, run_dir) == wandb_identity.own_id(stored, Path()) == expected


def test_a_directory_keeps_its_identity_where_it_moves_and_a_copy_has_none(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "mine"
    run_dir.mkdir()
    stored = make_config("name=mine", "tracking.id=abc")
    stored.tracking.owner = wandb_identity.owner(Path("mine"))
    copy = Path(shutil.copytree(run_dir, tmp_path / "copy/mine"))
    assert wandb_identity.own_id(stored, run_dir) == "abc" and wandb_identity.own_id(stored, copy) is None
    monkeypatch.chdir(tmp_path / "copy")
    assert wandb_identity.own_id(stored, Path("mine")) is None  # a relative path of the same name
    moved = run_dir.rename(tmp_path / "moved")
    assert wandb_identity.own_id(stored, moved) == "abc"
    another = Path(shutil.copytree(moved, tmp_path / "copy/another"))
    ids = [wandb_identity.for_reading(stored, run, []).tracking.id for run in (moved, copy, copy, another)]
    assert ids[1] == ids[2] and len(set(ids)) == 3 and ids[0] == "abc"
    assert wandb_identity.for_reading(stored, moved, ["tracking.id=given"]).tracking.id == "given"


def test_only_an_agent_of_a_sweep_chooses_the_identity_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """WANDB_RUN_ID alone may be left from another run: two trainings under one id would mix their records."""
    monkeypatch.setenv("WANDB_RUN_ID", "abc")
    monkeypatch.delenv("WANDB_SWEEP_ID", raising=False)
    ids = {wandb_identity.new_id() for _ in range(100)}
    assert len(ids) == 100 and "abc" not in ids
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep")
    assert wandb_identity.new_id() == "abc"


def test_the_best_checkpoint_is_an_artifact_on_request(make_config: MakeConfig) -> None:
    """The client's record names it and holds the digest of each of its files."""
    settings = ["tracking.wandb=offline", "train.steps=30", "train.validate_every=10", "checkpoint.every=10"]
    for wanted in (True, False):
        run_dir = train(make_config(f"name={wanted}", f"tracking.artifact={str(wanted).lower()}", *settings))
        (file,) = (run_dir / "wandb").glob("offline-run-*/run-*.wandb")
        best = find(run_dir / "best", run_dir).folder
        name = f"checkpoint-{configs.read(run_dir / 'config.yaml').tracking.id}".encode()
        deadline = time.monotonic() + 30  # the client's service may write on a busy machine when the run has ended
        while wanted and name not in file.read_bytes() and time.monotonic() < deadline:
            time.sleep(0.1)
        record = file.read_bytes()
        assert (name in record) == wanted
        assert (best.name.encode() in record) == wanted
        for path in best.iterdir():
            digest = base64.b64encode(hashlib.md5(path.read_bytes(), usedforsecurity=False).digest())
            assert (digest in record) == wanted


def test_a_failed_run_is_marked_as_failed(make_config: MakeConfig) -> None:
    with pytest.raises(RunError):
        train(make_config("name=mine", "tracking.wandb=offline", "optim.learning_rate=1e30"))
    record = next(Path("runs/mine/wandb").glob("offline-run-*"))
    assert json.loads(inspect(record, "--summary"))["exit_code"] == 1


def test_training_needs_no_wandb(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb_client, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it fails
    run_dir = train(make_config("name=mine", "tracking.wandb=auto", "train.steps=5"))
    assert "wandb is not installed" in (run_dir / "log.txt").read_text()
    evaluate(run_dir, ["tracking.wandb=offline"])  # as if it had been trained with wandb installed
    with pytest.raises(UserError, match="pip install wandb"):
        train(make_config("name=other", "tracking.wandb=offline"))


def test_an_invalid_account_leaves_the_run_offline(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "not a key")
    run_dir = train(make_config("name=mine", "tracking.wandb=auto", "train.steps=5"))
    assert "the W&B account can't be used" in (run_dir / "log.txt").read_text()
    with pytest.raises(UserError, match="no account is set up"):
        train(make_config("name=other", "tracking.wandb=online"))


def test_records_beyond_the_checkpoint_and_half_records_are_removed(tmp_path: Path) -> None:
    rows = [{"step": step, "train/loss": float(step)} for step in (5, 10, 15)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    for torn in (b'{"step": 20, "tra', b"\0\0\0\0", b"\xff", b"{}", b"20"):
        (tmp_path / "metrics.jsonl").write_bytes(text.encode() + torn)
        directory = MetricsLog(tmp_path, start=10)
        directory.scalars(15, {"train/loss": 1.5})
        assert rows_of(tmp_path) == [*rows[:2], {"step": 15, "train/loss": 1.5}]


def test_records_are_strict_json_also_of_a_run_that_has_diverged(tmp_path: Path) -> None:
    old = '{"step": 5, "train/loss": NaN, "train/kl": -Infinity, "train/beta": 1.0}\n'  # of an earlier version
    (tmp_path / "metrics.jsonl").write_text(old)
    directory = MetricsLog(tmp_path, start=5)
    directory.scalars(10, {"train/loss": math.inf, "train/kl": math.nan, "train/beta": 0.5})

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line, parse_constant=refuse) for line in lines] == [
        {"step": step, "train/loss": None, "train/kl": None, "train/beta": beta} for step, beta in ((5, 1.0), (10, 0.5))
    ]
    (tmp_path / "other.jsonl").write_text(old)
    read = [next(read_records(tmp_path / name)) for name in ("metrics.jsonl", "other.jsonl")]
    assert [{name for name, value in record.items() if is_number(value)} for record in read] == [
        {"step", "train/beta"}
    ] * 2
    assert manifest.to_json({"a": [(1.5, math.nan)], "b": {"c": -math.inf}}) == (
        json.dumps({"a": [[1.5, None]], "b": {"c": None}}, indent=2).encode() + b"\n"
    )


def test_beside_a_live_training_nothing_goes_to_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []
    monkeypatch.setattr(wandb_run, "start", lambda config, run_dir, kind: started.append(kind))
    for live in (True, False):
        with tracking.track(Config(), tmp_path, is_main=True, kind="evaluation", live=live) as tracker:
            tracker.scalars(1, {"test/negative_elbo": 1.0})
    assert started == ["evaluation"] and len(rows_of(tmp_path)) == 2


def test_a_client_that_falls_far_behind_is_left_with_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("vae_dist"), "propagate", True)
    monkeypatch.setattr(wandb_client, "BACKLOG", 2)
    release = threading.Event()

    class Run:
        dir = str(tmp_path / "files")

        def log(self, values: object) -> None:
            release.wait(10)

    monkeypatch.setattr(wandb_run.WandbRun, "_begin", lambda *_: Run())
    run = wandb_run.WandbRun(Config(), tmp_path, "offline", "training")
    for step in range(9):
        run.scalars(step, {"train/loss": 1.0})
    release.set()
    run._worker.end()
    lost = [record for record in caplog.records if "W&B is lost (it takes too long)" in record.getMessage()]
    assert len({id(record) for record in lost}) == 1, [(r.created, r.threadName, logging.root.handlers) for r in lost]


def test_several_calls_that_fail_are_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Calls that wait for the client fail one after the other when its service is gone."""
    monkeypatch.setattr(logging.getLogger("vae_dist"), "propagate", True)
    release = threading.Event()

    class Run:
        dir = str(tmp_path / "files")

        def log(self, values: object) -> None:
            release.wait(60)
            raise ConnectionResetError("the service is gone")

    monkeypatch.setattr(wandb_run.WandbRun, "_begin", lambda *_: Run())
    run = wandb_run.WandbRun(Config(), tmp_path, "offline", "training")
    for step in range(3):
        run.scalars(step, {"train/loss": 1.0})
    done = run._worker.do(lambda: None)
    release.set()
    done.result(60)
    run._worker.end()
    lost = {id(record): record.getMessage() for record in caplog.records}
    assert list(lost.values()) == [
        f"W&B is lost (the service is gone): metrics and pictures go to {tmp_path} alone from here on"
    ]


def test_a_record_without_metrics_is_not_logged(tmp_path: Path, make_config: MakeConfig) -> None:
    with tracking.track(make_config(), tmp_path, is_main=True, start=0) as tracker:
        tracker.scalars(1, {})
        tracker.scalars(2, {"train/loss": 1.0})
    assert rows_of(tmp_path) == [{"step": 2, "train/loss": 1.0}]


def test_flushed_records_have_reached_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced, fsync = [], os.fsync

    def recorded(descriptor: int) -> None:
        fsync(descriptor)
        status = os.fstat(descriptor)
        synced.append((status.st_ino, status.st_size))

    tracker = Tracker([MetricsLog(tmp_path, start=0)])
    tracker.scalars(1, {"train/loss": 1.0})
    monkeypatch.setattr(os, "fsync", recorded)
    tracker.flush()
    metrics = (tmp_path / "metrics.jsonl").stat()
    assert metrics.st_size > 0 and (metrics.st_ino, metrics.st_size) in synced
    assert tmp_path.stat().st_ino in [inode for inode, _ in synced]  # the folder holds the file's name


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file can grow beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_ends_the_run_with_a_remedy(tmp_path: Path) -> None:
    run_dir = tmp_path / "mine"
    tracker = Tracker([MetricsLog(run_dir, start=0)])
    tracker.pictures(1, lambda: picture(1))
    (old,) = (run_dir / "images").iterdir()
    before = old.read_bytes()
    with full_disk(50), pytest.raises(RunError, match=r"metrics.jsonl \(File too large\); make room.* name=mine"):
        for step in range(10):
            tracker.scalars(step, {"train/loss": 1.0})
    with full_disk(50), pytest.raises(RunError, match=r"samples_step_00000001.png \(File too large\); make room"):
        tracker.pictures(1, lambda: picture(2))
    assert [path.read_bytes() for path in (run_dir / "images").iterdir()] == [
        before
    ]  # no half file and no temporary one


def test_a_deleted_directory_ends_the_run_with_a_remedy(tmp_path: Path) -> None:
    in_training = (0, RunError, "put the folder back; .* with name=mine")
    looked_at = (None, UserError, "run the same command again$")
    for start, kind, remedy in (in_training, looked_at):
        run_dir = tmp_path / "mine"
        tracker = Tracker([MetricsLog(run_dir, start)])
        shutil.rmtree(run_dir)
        calls: list[Callable[[], None]] = [
            lambda: tracker.scalars(1, {"train/loss": 1.0}),  # noqa: B023
            lambda: tracker.pictures(1, lambda: picture(1)),  # noqa: B023
            tracker.flush,
        ]
        for call in calls:
            with pytest.raises(kind, match=rf"{run_dir}.*No such file or directory.*{remedy}"):
                call()


def test_nothing_is_written_through_a_link_out_of_the_run(tmp_path: Path) -> None:
    mine, run_dir = tmp_path / "precious", tmp_path / "run"
    mine.write_text("mine\n")
    (run_dir / "images").mkdir(parents=True)
    (run_dir / "images/samples_step_00000001.png").symlink_to(mine)
    MetricsLog(run_dir, None).pictures(1, picture(1))
    with Image.open(run_dir / "images/samples_step_00000001.png") as image:
        assert image.format == "PNG"
    assert mine.read_text() == "mine\n"

    for name in ("metrics.jsonl", "images", "wandb"):
        run_dir = tmp_path / f"with {name}"
        run_dir.mkdir()
        (run_dir / name).symlink_to(mine)
        for start in (None, 0):
            with pytest.raises(UserError, match=f"{name} is a symbolic link"):
                MetricsLog(run_dir, start)
    assert mine.read_text() == "mine\n"


@pytest.mark.parametrize("identity", ["../other", "a b", "", "a" * 65, "é"])
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
    server.recover()
    wandb.teardown()
    server.close()
    with warnings.catch_warnings(action="ignore", category=ResourceWarning):
        gc.collect()  # the client does not wait for a service that was killed, and Python says so


def log_in(server: WandbServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    monkeypatch.setenv("WANDB_API_KEY", KEY)


def rows_of(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def check_that_all_arrived(run_dir: Path, run: Run) -> None:
    """Assert that W&B has the records of the run's directory, in order and once, and the pictures."""
    rows = [{key: value for key, value in row.items() if not key.startswith("_")} for row in run.history]
    metrics = [row for row in rows if not any(key.startswith("images/") for key in row)]
    assert metrics == rows_of(run_dir)
    # a resumed run appends to W&B's records: it does not overwrite them from 0
    assert [row["_step"] for row in run.history] == list(range(len(rows)))

    pictures = {key: value for row in rows for key, value in row.items() if key.startswith("images/")}
    names = {path.name.partition("_step_")[0] for path in (run_dir / "images").iterdir()}
    assert set(pictures) == {f"images/{name}" for name in names}
    for picture in pictures.values():
        assert hashlib.sha256(run.files[picture["path"]]).hexdigest() == picture["sha256"]
    others = {name for name in run.files if not name.startswith("media/images/images/")}
    assert others <= {"config.yaml", "wandb-summary.json", "wandb-metadata.json"}  # no code, diff, packages or console
    assert "output.log" not in run.streams


def sync(*records: Path) -> None:
    command = [sys.executable, "-m", "wandb", "sync", "--include-online", *map(str, records)]
    subprocess.run(command, check=True, capture_output=True, stdin=subprocess.DEVNULL, timeout=60)


def test_with_an_account_a_run_is_online_and_its_records_arrive(
    make_config: MakeConfig, server: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_in(server, monkeypatch)
    run_dir = train(make_config("name=mine", "tracking.wandb=auto", "train.steps=10"))
    evaluate(run_dir)
    (identity, run), *others = server.runs.items()
    assert not others and identity == configs.read(run_dir / "config.yaml").tracking.id
    assert run.name == "mine" and run.config["model"]["latent_dim"] == 8
    check_that_all_arrived(run_dir, run)
    assert {"train/loss", "validation/negative_elbo", "test/negative_elbo"} <= set(run.summary)
    assert f"{server.url}/somebody/vae_dist/runs/{identity}" in (run_dir / "log.txt").read_text()
    assert not [operation for operation in server.operations if "Artifact" in operation]


@pytest.mark.skipif(shutil.which("git") is None, reason="there is no git to make a repository with")
def test_wandb_gets_the_configs_facts_and_nothing_of_the_folder_around(
    make_config: MakeConfig, tmp_path: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the commit or the remote of a git repository, nor what is printed."""
    log_in(server, monkeypatch)
    for name in [name for name in os.environ if name.startswith("GIT_")]:  # a hook's, of another repository
        monkeypatch.delenv(name)
    for command in (
        ["init"], ["remote", "add", "origin", "https://example.com/secret.git"],
        ["-c", "user.name=me", "-c", "user.email=me@example.com", "commit", "--allow-empty", "-m", "first"],
        ["rev-parse", "HEAD"],
    ):  # fmt: skip
        ended = subprocess.run(["git", *command], check=True, capture_output=True)
    commit = ended.stdout.strip()
    given = ["wandb=online", "entity=us", "project=ours", "group=several", "notes=of today", "tags=[one,two]", "id=abc"]
    config = make_config("name=mine", *(f"tracking.{option}" for option in given))
    with tracked(config, tmp_path / "run") as tracker:
        log(tracker, range(1, 3))
        print("a line of the console")
    asked = [json.loads(body)["variables"] for body in server.bodies if b"UpsertBucket" in body]
    facts = ["entity", "project", "groupName", "displayName", "notes", "tags"]
    assert [asked[0][fact] for fact in facts] == ["us", "ours", "several", "mine", "of today", ["one", "two"]]
    step, *axes = server.runs["abc"].config["_wandb"]["m"]  # `define_metric`, with numbers for names
    assert step["1"] == "step" and {axis["2"]: axis["5"] for axis in axes} == {
        f"{group}/*": 1 for group in ("train", "validation", "test", "validation_raw", "test_raw", "images")
    }
    sent = [*server.bodies, *(file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file())]
    for private in (b"example.com", commit, b"a line of the console"):
        assert not [content for content in sent if private in content]


def test_offline_records_can_be_synced(
    make_config: MakeConfig, tmp_path: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = train(make_config("name=mine", "tracking.wandb=offline", "train.steps=10"))
    evaluate(run_dir)
    assert not server.runs
    moved = run_dir.rename(tmp_path / "moved")
    log_in(server, monkeypatch)
    sync(*(moved / "wandb").glob("offline-run-*"))
    (run,) = server.runs.values()
    check_that_all_arrived(moved, run)


def test_records_of_one_second_are_all_kept(
    make_config: MakeConfig, tmp_path: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    for step in range(1, 6):
        with tracked(make_config("tracking.wandb=offline", "tracking.id=abc"), run_dir, start=step - 1) as tracker:
            tracker.scalars(step, {"train/loss": float(step)})
    records = list((run_dir / "wandb").glob("offline-run-*"))
    assert len(records) == 5
    assert len({record.name.split("-")[2] for record in records}) < 5, "all were begun in seconds of their own"
    log_in(server, monkeypatch)
    sync(*records)
    check_that_all_arrived(run_dir, server.runs["abc"])


def test_the_key_is_in_the_authorization_of_requests_and_nowhere_else(
    make_config: MakeConfig, tmp_path: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_in(server, monkeypatch)
    train(make_config("name=online", "tracking.wandb=online", "train.steps=5"))
    train(make_config("name=offline", "tracking.wandb=offline", "train.steps=5"))
    encoded = base64.b64encode(f"api:{KEY}".encode())
    assert f"Basic {encoded.decode()}" in {headers.pop("Authorization", None) for headers in server.headers}
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"debug.log", "debug-internal.log", "log.txt", "config.yaml"} <= {path.name for path in written}
    sent = [str(headers).encode() for headers in server.headers] + server.bodies
    assert not [text for text in sent if KEY.encode() in text or encoded in text]
    assert not [path for path in written if KEY.encode() in path.read_bytes() or encoded in path.read_bytes()]


# Every command, in one process. The user's variables stay unchanged, and the user's own runs online.
ALL_COMMANDS = """
import os, sys
import wandb
from vae_dist import config
from vae_dist.evaluation.evaluate import evaluate
from vae_dist.reports.comparison import compare
from vae_dist.reports.report import report
from vae_dist.reports.study import study
from vae_dist.training.loop import train
from vae_dist.views.sampling import sample

before = dict(os.environ)
arguments = sys.argv[1:]
run = train(config.load([*arguments, "name=mine", "tracking.wandb=offline", "tracking.artifact=true"]))
evaluate(run)
sample(run)
report(run)
planned = config.load_study([*arguments, "name=s", "tracking.wandb=auto", "optim.learning_rate=1e-3,1e-4"])
study(planned)
compare([run, run.parent / "s-learning_rate-0.001"])
changed = {name for name in before.keys() | os.environ.keys() if before.get(name) != os.environ.get(name)}
assert not [name for name in changed - {"WANDB_SERVICE"} if "WANDB" in name], changed
assert wandb.setup().settings.mode == "online"
"""


def reporting() -> dict[str, str]:
    """The environment of a user who has not turned off the client's reports and messages, as the tests' own has."""
    off = ("WANDB_ERROR_REPORTING", "WANDB_SILENT")
    kept = {name: value for name, value in os.environ.items() if name not in off}
    return kept | {"PYTHONPATH": str(REPOSITORY)}


@pytest.mark.slow
def test_offline_nothing_is_sent_by_any_command(
    fork_server: ForkServer, smoke_arguments: list[str], tmp_path: Path
) -> None:
    """No connection is made, so that where the network swallows packets nothing is waited for either."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        environment = reporting() | {"WANDB_BASE_URL": f"http://127.0.0.1:{server.getsockname()[1]}"}
        arguments = [
            *smoke_arguments,
            f"runs_dir={tmp_path / 'runs'}",
            "train.steps=5",
            "evaluate.importance_samples=1",
        ]
        (done,) = fork_server.run_group([environment], "-c", ALL_COMMANDS, *arguments)
        assert done.returncode == 0 and "wandb:" not in done.stderr, done.stderr
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()
    records = list((tmp_path / "runs").glob("*/wandb/offline-run-*"))
    assert len(records) == 7  # of three trainings, three evaluations and a sampling


UNREACHED = """
import logging, sys
from pathlib import Path
from vae_dist import config
from vae_dist.runs import tracking, wandb_client

logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(message)s")
wandb_client.REACH_SECONDS = 1
with tracking.track(config.load(["tracking.wandb=auto"]), Path("run"), is_main=True, start=0) as tracker:
    tracker.scalars(1, {"train/loss": 1.0})
"""


@pytest.mark.slow
def test_after_going_offline_nothing_more_is_sent(server: WandbServer) -> None:
    server.fail("error")
    process = subprocess.Popen(
        [sys.executable, "-c", UNREACHED], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=reporting() | {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY},
    )  # fmt: skip
    assert process.stdout is not None
    with process, process.stdout:
        while "W&B can't be reached" not in (line := process.stdout.readline()):
            assert line
        connections = server.connections
        assert connections > 0
        rest = process.stdout.read()
    assert "W&B is offline" in rest and process.returncode == 0
    assert server.connections == connections


def test_readers_of_a_run_go_online_only_with_an_account_or_on_request(
    make_config: MakeConfig,
) -> None:
    for stored, arguments, expected in (
        ("online", [], "auto"),
        ("online", ["tracking.wandb=online"], "online"),
        ("offline", [], "offline"),
        ("disabled", [], "disabled"),
    ):
        config = configs.load_reader(make_config(f"tracking.wandb={stored}"), arguments)
        assert config.tracking.wandb == expected


@pytest.mark.slow
def test_browsing_the_records_sends_nothing(make_config: MakeConfig, tmp_path: Path) -> None:
    """It shows each of them by its run and kind."""
    run_dir = train(make_config("name=mine", "train.steps=5", "tracking.wandb=offline"))
    evaluate(run_dir, ["evaluate.importance_samples=0", "tracking.wandb=offline"])
    shutil.copytree(run_dir, run_dir.with_name("two words"))
    entries = [
        f"run-{name} {kind}".encode() for name in ("mine", "two words") for kind in ("1 training", "2 evaluation")
    ]
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (40, 160))
    with socket.create_server(("127.0.0.1", 0)) as server, open(ours, "r+b", buffering=0) as terminal:
        command = ["make", "-f", str(REPOSITORY / "Makefile"), "runs", f"PYTHON={sys.executable}"]
        browser = subprocess.Popen(
            ["setsid", "--ctty", "--wait", *command],
            stdin=theirs, stdout=theirs, stderr=theirs, cwd=tmp_path,
            env=reporting() | {"WANDB_BASE_URL": f"http://127.0.0.1:{server.getsockname()[1]}", "TERM": "xterm"},
        )  # fmt: skip
        os.close(theirs)
        shown = b""
        while not all(part in shown for part in (*entries, b"image-file")):  # the summary's, of the first record
            assert select.select([terminal], [], [], 30)[0], shown
            shown += terminal.read(2**16)
        terminal.write(b"q")
        with suppress(OSError):  # when the other end is closed
            while terminal.read(2**16):
                pass
        assert browser.wait(60) == 0
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()


@pytest.mark.parametrize("told_by", ["variable", "file"])
def test_a_disabled_wandb_records_and_sends_nothing(
    told_by: str, make_config: MakeConfig, tmp_path: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_in(server, monkeypatch)
    if told_by == "variable":
        monkeypatch.setenv("WANDB_MODE", "disabled")
    else:
        (tmp_path / "settings").write_text("[default]\nmode = disabled\n")  # as `wandb disabled` does
    for mode in ("auto", "offline"):
        with tracked(make_config(f"tracking.wandb={mode}"), tmp_path / mode) as tracker:
            log(tracker, range(1, 51))
        assert len(rows_of(tmp_path / mode)) == 50
        assert not (tmp_path / mode / "wandb").exists()
    run_dir = train(make_config("name=mine", "train.steps=5"))
    remedy = "unset WANDB_MODE" if told_by == "variable" else "run `wandb online`"
    for command in (
        lambda: train(make_config("name=other", "tracking.wandb=online")),
        lambda: evaluate(run_dir, ["tracking.wandb=online"]),
        lambda: sample(run_dir, ["tracking.wandb=online"]),
    ):
        with pytest.raises(UserError, match=f"W&B is set to disabled; {remedy}"):
            command()
    assert not services() and not server.connections


@pytest.mark.parametrize("told_by", ["WANDB_MODE=offline", "WANDB_MODE=dryrun", "wandb offline"])
def test_a_wandb_that_is_set_offline_sends_nothing_of_a_run_that_leaves_it_open(
    told_by: str, make_config: MakeConfig, tmp_path: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_in(server, monkeypatch)
    name, _, mode = told_by.partition("=")
    if mode:
        monkeypatch.setenv(name, mode)
    else:
        (tmp_path / "settings").write_text("[default]\nmode = offline\n")
    with tracked(make_config("tracking.wandb=auto"), tmp_path / "run") as tracker:
        log(tracker, range(1, 3))
    assert record_of(tmp_path / "run", "offline-run").is_dir() and not server.connections
    with pytest.raises(UserError, match=r"W&B is set to offline; (unset WANDB_MODE|run `wandb online`), or use"):
        wandb_client.check_online(make_config("tracking.wandb=online").tracking)


@contextmanager
def tracked(config: Config, run_dir: Path, start: int | None = 0) -> Iterator[Tracker]:
    """The tracker of a training that starts at `start`, its messages in the run's directory."""
    run_dir.mkdir(parents=True, exist_ok=True)
    console.logger.setLevel(logging.INFO)
    with (
        console.logged_to(run_dir / "log.txt"),
        tracking.track(config, run_dir, is_main=True, start=start) as tracker,
    ):
        yield tracker


def messages_with(run_dir: Path, what: str) -> int:
    """The number of log lines that contain a text."""
    return (run_dir / "log.txt").read_text().count(what)


def record_of(run_dir: Path, mode: str = "run") -> Path:
    (record,) = (run_dir / "wandb").glob(f"{mode}-*")
    return record


def picture(step: int) -> dict[str, Picture]:
    return {"samples": Picture(Image.new("L", (64, 64), step % 256), f"step {step}")}


def log(tracker: Tracker, steps: range) -> float:
    """Log a record for each step and a picture for every fiftieth; return the seconds of the slowest call."""
    slowest = 0.0
    for step in steps:
        started = time.perf_counter()
        tracker.scalars(step, {"train/loss": float(step)})
        if step % 50 == 0:
            tracker.pictures(step, lambda step=step: picture(step))  # type: ignore[misc]
        slowest = max(slowest, time.perf_counter() - started)
    return slowest


def wait_until(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def services(pid: int | None = None) -> list[psutil.Process]:
    """The client's services that a process has started, by default this one."""
    children = psutil.Process(pid).children()
    return [child for child in children if alive(child) and child.name() == "wandb-core"]


# A thread of the client may end with an exception when its service is gone.
client_may_break = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


@pytest.fixture
def upload_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """By default the client uploads every 15 seconds; it takes whole seconds alone."""
    monkeypatch.setenv("WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL", "1")


@pytest.mark.parametrize(
    ("fault", "after"),
    [
        ("refuse", 0),
        *(pytest.param(fault, 0, marks=pytest.mark.slow) for fault in ("error", "reset", "hang")),
        # It has answered the first request.
        *(pytest.param(fault, 1, marks=pytest.mark.slow) for fault in ("error", "reset", "hang")),
    ],
)
def test_a_server_that_cannot_be_reached_leaves_the_run_offline(
    fault: Fault,
    after: int,
    make_config: MakeConfig,
    tmp_path: Path,
    server: WandbServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log_in(server, monkeypatch)
    monkeypatch.setattr(wandb_client, "REACH_SECONDS", 1)
    server.fail(fault, after)
    run_dir = tmp_path / "run"
    started = time.monotonic()
    with tracked(make_config("tracking.wandb=auto", "tracking.id=abc"), run_dir) as tracker:
        assert time.monotonic() - started < 1 + SLACK
        assert log(tracker, range(1, 21)) < AT_ONCE
    assert time.monotonic() - started < 1 + 2 * SLACK
    assert messages_with(run_dir, "W&B can't be reached") == 1 and messages_with(run_dir, "WARNING") == 1
    assert not [path for path in run_dir.rglob("*") if path.is_symlink() and path.readlink().is_absolute()]
    assert len(rows_of(run_dir)) == 20
    server.recover()
    sync(record_of(run_dir, "offline-run"))
    check_that_all_arrived(run_dir, server.runs["abc"])


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["hang", "forbidden", "error", "reset", "refuse"])
@pytest.mark.usefixtures("upload_soon")
def test_a_server_lost_during_a_run_costs_no_record_and_no_time(
    fault: Fault, make_config: MakeConfig, tmp_path: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_in(server, monkeypatch)
    monkeypatch.setattr(wandb_run, "FINISH_SECONDS", 1)
    run_dir = tmp_path / "run"
    with tracked(make_config("tracking.wandb=auto", "tracking.id=abc"), run_dir) as tracker:
        assert log(tracker, range(1, 51)) < AT_ONCE
        wait_until(lambda: server.runs["abc"].history)
        server.fail(fault)
        assert log(tracker, range(51, 501)) < AT_ONCE
        if fault == "forbidden":  # the client gives up, and reports it to this package alone
            wait_until(lambda: messages_with(run_dir, "W&B takes no more of this run"))
        ending = time.monotonic()
    assert time.monotonic() - ending < 1 + SLACK
    assert len(rows_of(run_dir)) == 500
    assert 0 < len(server.runs["abc"].history) < 100
    record = record_of(run_dir)
    assert messages_with(run_dir, "W&B's records are incomplete") == 1
    assert messages_with(run_dir, f"`wandb sync --include-online {record}`") == 1
    server.recover()
    sync(record)
    check_that_all_arrived(run_dir, server.runs["abc"])


@pytest.mark.slow
def test_an_outage_heals_by_itself(
    make_config: MakeConfig, tmp_path: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_in(server, monkeypatch)
    monkeypatch.setenv("WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL", "1")
    for kind in ("FILE_STREAM", "FILE_TRANSFER", "GRAPHQL"):
        monkeypatch.setenv(f"WANDB_X_{kind}_RETRY_WAIT_MIN_SECONDS", "1")
        monkeypatch.setenv(f"WANDB_X_{kind}_RETRY_WAIT_MAX_SECONDS", "1")
    run_dir = tmp_path / "run"
    with tracked(make_config("tracking.wandb=auto", "tracking.id=abc"), run_dir) as tracker:
        server.fail("error")
        log(tracker, range(1, 101))
        time.sleep(25)  # by default the client gives up on a picture after twenty tries, silently
        server.recover()
    check_that_all_arrived(run_dir, server.runs["abc"])
    assert not messages_with(run_dir, "WARNING")


@client_may_break
@pytest.mark.slow
def test_a_killed_service_costs_wandb_one_second_and_the_disk_nothing(
    make_config: MakeConfig, tmp_path: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_in(server, monkeypatch)
    run_dir = tmp_path / "run"
    with tracked(make_config("tracking.wandb=auto", "tracking.id=abc"), run_dir) as tracker:
        log(tracker, range(1, 51))
        record = record_of(run_dir)
        wait_until(lambda: json.loads(inspect(record, "--summary"))["summary"].get("train/loss") == 50)
        assert not server.runs["abc"].history
        (service,) = services()
        service.kill()
        service.wait()
        assert log(tracker, range(51, 101)) < AT_ONCE
        ending = time.monotonic()
    assert time.monotonic() - ending < SLACK
    assert len(rows_of(run_dir)) == 100
    assert messages_with(run_dir, "W&B is lost") == 1 and messages_with(run_dir, "W&B's records are incomplete") == 1
    sync(record)
    assert [row["train/loss"] for row in server.runs["abc"].history if "train/loss" in row] == list(range(1, 51))


@client_may_break
@pytest.mark.slow
def test_a_service_that_no_longer_answers_delays_nothing(
    make_config: MakeConfig, tmp_path: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_in(server, monkeypatch)
    monkeypatch.setattr(wandb_client, "BACKLOG", 100)
    monkeypatch.setattr(wandb_run, "STOP_SECONDS", 2)
    monkeypatch.setattr(wandb_client, "END_SECONDS", 1)
    run_dir = tmp_path / "run"
    with tracked(make_config("tracking.wandb=auto"), run_dir) as tracker:
        (service,) = services()
        service.suspend()
        for step in range(1, 5001):  # more than its socket takes
            tracker.scalars(step, {"train/loss": float(step)})
        ending = time.monotonic()
    assert time.monotonic() - ending < 2 + SLACK
    assert len(rows_of(run_dir)) == 5000
    assert messages_with(run_dir, "W&B is lost (it takes too long)") == 1
    assert not services()


@client_may_break
def test_a_service_that_never_answers_leaves_wandb_out(
    make_config: MakeConfig, tmp_path: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_in(server, monkeypatch)
    monkeypatch.setattr(wandb_client, "REACH_SECONDS", 0.5)
    monkeypatch.setattr(wandb_client, "CLIENT_SECONDS", 0.5)
    monkeypatch.setattr(wandb_client, "END_SECONDS", 0.5)
    run_dir = tmp_path / "run"
    with socket.socket(socket.AF_UNIX) as mute:
        mute.bind("mute")
        mute.listen()
        monkeypatch.setenv("WANDB_SERVICE", f"3-{os.getpid()}-unix-{tmp_path / 'mute'}")
        started = time.monotonic()
        with tracked(make_config("tracking.wandb=auto"), run_dir) as tracker:
            log(tracker, range(1, 21))
        assert time.monotonic() - started < 1 + SLACK
    assert messages_with(run_dir, "W&B can't be used (it takes too long)") == 1
    assert len(rows_of(run_dir)) == 20


def test_a_run_that_is_asked_to_stop_is_preempted(
    make_config: MakeConfig, tmp_path: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_in(server, monkeypatch)
    run_dir = tmp_path / "run"
    with (
        pytest.raises(StoppedError),
        tracked(make_config("tracking.wandb=auto", "tracking.id=abc"), run_dir) as tracker,
    ):
        log(tracker, range(1, 101))
        raise StoppedError("stopped by SIGTERM", 143)
    streamed = [json.loads(body) for body in server.bodies if b"exitcode" in body or b"preempting" in body]
    assert any(message.get("preempting") for message in streamed)
    assert [message["exitcode"] for message in streamed if message.get("complete")] == [143]
    check_that_all_arrived(run_dir, server.runs["abc"])


@client_may_break
@pytest.mark.slow
def test_a_run_that_is_asked_to_stop_waits_for_no_server(
    make_config: MakeConfig, tmp_path: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_in(server, monkeypatch)
    monkeypatch.setattr(wandb_run, "STOP_SECONDS", 4)  # FINISH_SECONDS is unchanged
    monkeypatch.setattr(wandb_client, "END_SECONDS", 1)
    run_dir = tmp_path / "run"
    with (
        pytest.raises(StoppedError),
        tracked(make_config("tracking.wandb=auto", "tracking.id=abc"), run_dir) as tracker,
    ):
        server.fail("hang")
        log(tracker, range(1, 101))
        stopped = time.monotonic()
        raise StoppedError("stopped by SIGTERM", 143)
    assert time.monotonic() - stopped < 4 + SLACK
    assert not services()
    server.recover()
    sync(record_of(run_dir))
    check_that_all_arrived(run_dir, server.runs["abc"])


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["service", "server"])
def test_a_training_ends_in_time_though_wandb_hangs(
    fault: str, smoke_arguments: list[str], tmp_path: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_in(server, monkeypatch)
    monkeypatch.delenv("WANDB_SILENT")
    program = f"""
import runpy, sys
from vae_dist.runs import wandb_client, wandb_run
wandb_run.FINISH_SECONDS = wandb_client.END_SECONDS = 1
sys.argv[0] = {str(REPOSITORY / "vae_dist/train.py")!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    arguments = ["name=mine", "tracking.wandb=online", "tracking.id=abc", "train.steps=1000", "train.log_every=1"]
    arguments += ["train.validate_every=1000", "checkpoint.every=1000"]
    training = subprocess.Popen(
        [sys.executable, "-c", program, *smoke_arguments, *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    try:
        run_dir = tmp_path / "runs/mine"
        wait_until(lambda: (run_dir / "log.txt").exists() and messages_with(run_dir, "W&B: http"))
        (service,) = services(training.pid)
        if fault == "server":
            server.fail("hang")
        else:
            service.suspend()
        wait_until(lambda: messages_with(run_dir, "step 1000:"))
        ended = time.monotonic()
        output, errors = training.communicate(timeout=60)
    finally:
        training.kill()
    assert time.monotonic() - ended < 4 + 2 * SLACK
    assert training.returncode == 0 and "train/loss" in output, errors
    assert len(server.runs["abc"].history) < len(rows_of(run_dir)) == 1001
    assert errors.count("W&B") == 2 and "W&B's records are incomplete" in errors and "wandb:" not in errors
    assert not alive(service)
