"""The list that `make runs` opens, over records of the real W&B client; test_tracking.py runs its browser."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, MakeConfig
from tests.test_tracking import inspect, tracked
from vae_dist.config import load_study
from vae_dist.errors import UserError
from vae_dist.evaluation.evaluate import evaluate
from vae_dist.reports.study import study
from vae_dist.runs import wandb_records
from vae_dist.training.loop import train
from vae_dist.views.sampling import sample

OFFLINE = "tracking.wandb=offline"


def listed(runs_dir: Path) -> list[str]:
    """The entries that `wandb leet` shows, in its order, without the time and the id. Each leads to a record.

    Its rule (0.31): the names that begin with `run-`, sorted, and the record by the id after the first time in a name.
    """
    folder = wandb_records.make_list(runs_dir)
    names = sorted(path.name for path in folder.iterdir() if path.name.startswith(("run-", "offline-run-")))
    shown = []
    for name in names:
        begun = re.search(r"run-\d{8}_\d{6}-", name)
        assert begun is not None and (folder / name / f"run-{name[begun.end() :]}.wandb").is_file()
        shown.append(name[: begun.start()].strip())
    return shown


FEW = ["evaluate.importance_samples=0", OFFLINE]


def test_records_are_listed_by_run_and_kind_in_order_of_time(make_config: MakeConfig) -> None:
    for steps in (5, 10):
        run_dir = train(make_config("name=mine", OFFLINE, f"train.steps={steps}"))
    evaluate(run_dir, FEW)
    sample(run_dir, [OFFLINE])
    kinds = ("1 training", "2 training", "3 evaluation", "4 samples")
    assert listed(run_dir.parent) == [f"run-mine {kind}" for kind in kinds]
    first = next((run_dir.parent / ".wandb").glob("run-mine 1*"))
    assert '"train/loss"' in inspect(first, "--summary")  # through the link


@pytest.mark.slow
def test_a_study_and_an_evaluation_kept_elsewhere_are_listed(
    make_config: MakeConfig, smoke_arguments: list[str]
) -> None:
    runs = Path("runs").resolve()
    settings = [f"runs_dir={runs}", "name=s", "train.steps=5", "model.latent_dim=1,2"]
    study(load_study([*smoke_arguments, *FEW, *settings]))
    evaluate(runs / "s-latent_dim-1", [*FEW, f"output={runs}/comparisons/mine"])
    assert listed(runs) == [
        "run-comparisons:mine 1 evaluation",
        "run-s-latent_dim-1 1 training", "run-s-latent_dim-1 2 evaluation",
        "run-s-latent_dim-2 1 training", "run-s-latent_dim-2 2 evaluation",
    ]  # fmt: skip


@pytest.fixture
def record(make_config: MakeConfig, tmp_path: Path) -> Path:
    """The folder of a real record, in runs/first."""
    with tracked(make_config(OFFLINE, "tracking.id=abc"), tmp_path / "runs/first", start=0) as tracker:
        tracker.scalars(1, {"train/loss": 1.0})
    return next((tmp_path / "runs/first/wandb").glob("offline-run-*"))


def copy_record(record: Path, run_dir: Path, name: str = "") -> Path:
    return Path(shutil.copytree(record, run_dir / "wandb" / (name or record.name)))


def test_a_run_of_any_name_is_listed_in_one_line_and_as_itself(record: Path) -> None:
    runs = record.parents[2]
    long = "ü" * 120  # 240 bytes
    names = {
        "two words": "two words", "größe": "größe", "-x": "-x", "{time}": "{time}", "run-": "run-", "wandb": "wandb",
        "line\nand \x1b[31mred": "line?and ?[31mred", "line\tand \x1b[31mred": "line?and ?[31mred~",
        os.fsdecode(b"latin-\xfc"): "latin-?",
        "20260101_000000-a": "20260101-000000-a", "run-20260101_000000-a": "run-20260101-000000-a",
    }  # fmt: skip
    for name in [*names, f"{long}1", f"{long}2", ".hidden"]:
        copy_record(record, runs / name)
    (runs / "linked").symlink_to(runs / "two words")
    shown = listed(runs)
    expected = [f"run-{name} 1 training" for name in [*names.values(), "first", "linked"]]
    assert sorted(name for name in shown if long[:50] not in name) == sorted(expected)
    assert len(shown) == len(expected) + 2 and len(set(shown)) == len(shown)  # the long ones stay distinct


def test_records_are_ordered_also_within_one_second(record: Path) -> None:
    run_dir = record.parents[1]
    copy_record(record, run_dir, f"{record.name}-1")  # the client's name if that was taken
    copy_record(record, run_dir, "run-20200101_000000-abc")  # online, or an import of an older one
    for number in range(9):
        copy_record(record, run_dir, f"offline-run-2030010{number}_000000-abc")
    shown = listed(run_dir.parent)
    assert shown == [f"run-first {number:02d} training" for number in range(1, 13)]
    targets = [link.readlink().name for link in sorted((run_dir.parent / ".wandb").iterdir())]
    assert targets[:4] == [
        "run-20200101_000000-abc", record.name, f"{record.name}-1", "offline-run-20300100_000000-abc",
    ]  # fmt: skip


def test_a_record_without_a_kind_is_recognised_by_its_program(record: Path) -> None:
    runs = record.parents[2]
    for noted in ("", "evaluation\n", "../x", "a\nb", "\0" * 10**6):
        (record / "kind.txt").write_text(noted)
        assert listed(runs) == [f"run-first 1 {noted.strip() if noted.startswith('eval') else 'record'}"]
    (record / "kind.txt").unlink()
    assert listed(runs) == ["run-first 1 record"]
    programs = {"train": "training", "evaluate": "evaluation", "compare": "evaluation", "sample": "samples"}
    for program, kind in programs.items():  # as the commands of versions that noted no kind have left it
        (record / "run-abc.wandb").write_bytes(b":W&B\0\xff name \x1a /a/vae_dist/" + program.encode() + b".py\x12")
        assert listed(runs) == [f"run-first 1 {kind}"]


def test_pipes_in_a_run_of_others_block_no_list(tmp_path: Path) -> None:
    folder = tmp_path / "theirs" / "wandb" / "offline-run-20260102_030405-abc"
    folder.mkdir(parents=True)
    os.mkfifo(folder / "kind.txt")
    os.mkfifo(folder / "run-abc.wandb")
    assert [name for name, _ in wandb_records.entries(tmp_path)] == ["run-theirs 1 record run-20260102_030405-abc"]


def test_only_records_are_listed_and_only_old_links_are_removed(record: Path) -> None:
    runs = record.parents[2]
    folder = wandb_records.make_list(runs)
    (folder / f"{record.name}").symlink_to(record)  # as earlier versions made them
    (folder / "run-mine").mkdir()
    (folder / ".wandb-leet.json").write_text("{}")  # what the browser remembers
    copied = copy_record(record, runs / "gone")
    for name in ("run-x", "offline-run-20260101_000000-", "offline-run-20260101_000000-a/files"):
        (runs / "first/wandb" / name).mkdir(parents=True)
    (runs / "first/wandb/offline-run-20260101_000000-b").touch()
    (runs / "a file").touch()
    wandb_records.make_list(runs)
    before = {path.name: path.lstat().st_ino for path in folder.iterdir()}
    assert len(before) == 4 and record.name not in before
    shutil.rmtree(copied)
    wandb_records.make_list(runs)
    after = {path.name: path.lstat().st_ino for path in folder.iterdir()}
    assert after == {name: inode for name, inode in before.items() if "gone" not in name}
    assert record.is_dir() and (record / "run-abc.wandb").stat().st_size > 0


def test_the_folder_of_the_runs_can_be_moved(record: Path, tmp_path: Path) -> None:
    wandb_records.make_list(tmp_path / "runs")
    (tmp_path / "runs").rename(tmp_path / "moved")
    (link,) = (tmp_path / "moved/.wandb").iterdir()
    assert (link / "run-abc.wandb").is_file()


def test_without_records_one_message_gives_the_remedy(record: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder in ("empty", "missing"):
        with pytest.raises(
            UserError, match=f"no run in .*{folder} has a W&B record; train with tracking.wandb=offline"
        ):
            wandb_records.browse(tmp_path / folder)
        assert not (tmp_path / folder / ".wandb").exists()
    (tmp_path / "runs/.wandb").touch()
    with pytest.raises(UserError, match=r"can't write to .*runs/\.wandb \(File exists\)"):
        wandb_records.browse(tmp_path / "runs")


@pytest.mark.usefixtures("record")
def test_without_a_terminal_one_message_says_so(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vae_dist", "runs", f"runs_dir={tmp_path / 'runs'}"]
    ended = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, start_new_session=True, cwd=REPOSITORY
    )
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: W&B's browser needs a terminal") and ended.stderr.count("\n") == 1
