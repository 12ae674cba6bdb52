"""Runs on file systems that are limited, full or read-only, and under paths with any characters."""

import errno
import fcntl
import json
import logging
import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from tests.conftest import REPOSITORY, MakeConfig, opened
from vae_dist import config, locks
from vae_dist.encoding.encode import encode
from vae_dist.errors import RunError, UserError
from vae_dist.evaluation.evaluate import evaluate
from vae_dist.files import advice, append, make_folder
from vae_dist.reports.comparison import compare
from vae_dist.reports.report import report
from vae_dist.reports.study import study
from vae_dist.reports.subject import subject_of
from vae_dist.runs import saving
from vae_dist.runs.checkpoint import Checkpoint
from vae_dist.runs.lookup import find
from vae_dist.terminal import invocation
from vae_dist.training.loop import train
from vae_dist.views.sampling import sample

# Trains, meets the mark of a training on another machine, and takes the directory over.
PROGRAM = """
import json, sys
from pathlib import Path
from vae_dist.runs import run
from vae_dist.runs.run import MARK, RunDirectory
from vae_dist import config
from vae_dist.errors import UserError
from vae_dist.training.loop import train
run.LOCK_SECONDS = 0.2
arguments = sys.argv[1:]
run_dir = train(config.load([*arguments, "train.steps=20"]))
mark = run_dir / MARK
assert not mark.exists()
mark.write_text(json.dumps({"host": "node7", "process": 4711, "since": "2026-01-02 03:04:05 +0000"}))
assert RunDirectory(run_dir).is_training
try:
    train(config.load([*arguments, "train.steps=30"]))
except UserError as error:
    print(error)
    train(config.load([*arguments, "train.steps=30", str(error).rpartition(" ")[2]]))
assert not mark.exists()
"""


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library to preload, which makes calls fail as file systems do."""
    compiler = shutil.which("cc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("there is no C compiler, or this is not Linux")
    library = tmp_path_factory.mktemp("faults") / "faults.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, REPOSITORY / "tests/faults.c", "-ldl"], check=True)
    return library


@pytest.mark.slow
def test_a_run_without_fsync_rename_or_locks_is_bitwise_the_same(
    faults: Path, smoke_arguments: list[str], make_config: MakeConfig, tmp_path: Path
) -> None:
    settings = ["name=a", "checkpoint.every=5", "train.validate_every=7"]
    command = [sys.executable, "-c", PROGRAM, *smoke_arguments, f"runs_dir={tmp_path / 'odd'}", *settings]
    environment = {**os.environ, "LD_PRELOAD": str(faults), "FAULTS": "fsync rename flock"}
    environment["PYTHONPATH"] = str(REPOSITORY)
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("can't be flushed to its disk (Invalid argument)") == 1
    assert "odd/a can't be locked (Function not implemented)" in ended.stderr
    assert "process 4711 on node7, since 2026-01-02 03:04:05 +0000" in ended.stdout
    assert "checkpoint.take_over=" in ended.stdout and "taking over" in ended.stderr

    odd = tmp_path / "odd/a"
    plain = train(make_config(*settings, "train.steps=30"))
    names = [sorted(path.name for path in (run / "checkpoints").iterdir()) for run in (odd, plain)]
    assert names[0] == names[1]
    for name in ("model.safetensors", "optimizer.safetensors"):
        contents = [find(run, run).folder.joinpath(name).read_bytes() for run in (odd, plain)]
        assert contents[0] == contents[1]
    assert len((odd / "metrics.jsonl").read_text().splitlines()) >= 10
    assert not [path for path in odd.rglob(".*") if path.name != ".lock"]


def test_a_copy_killed_halfway_is_finished_by_the_next_training(make_config: MakeConfig, tmp_path: Path) -> None:
    run_dir = train(make_config("name=a", "train.steps=20"))
    whole = find(run_dir, run_dir).folder
    shutil.copytree(whole, whole.with_name(f".writing-{whole.name}-0123abcd"))
    for name in ("manifest.json", "state.json"):  # the last that are copied
        (whole / name).unlink()
        saving.recover(run_dir)
        assert Checkpoint(whole).verify().step == 20
        shutil.copytree(whole, whole.with_name(f".writing-{whole.name}-0123abcd"))


def hold(path: Path) -> subprocess.Popen[bytes]:
    """Start another process that holds a mark."""
    program = "import pathlib, sys, time; from vae_dist import locks\n"
    program += "with locks.marked(pathlib.Path(sys.argv[1]), 0, '', None): print(1, flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", program, str(path)], cwd=REPOSITORY, stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline()
    return process


def test_a_mark_names_its_process_and_ends_with_it(tmp_path: Path) -> None:
    path = tmp_path / "mark"
    process = hold(path)
    with pytest.raises(locks.InUseError, match=f"process {process.pid} on .*, since 20") as refused:
        locks.marked(path, 0.1, "", "another").__enter__()
    assert refused.value.mark is not None
    no_lock = tmp_path / "lock"
    assert locks.is_held(no_lock, fcntl.LOCK_SH, path)
    process.kill()
    time.sleep(0.1)  # it has ended and was not waited for: a zombie
    assert not locks.is_held(no_lock, fcntl.LOCK_SH, path)
    with locks.marked(path, 0.1, "", None):
        assert json.loads(path.read_text())["process"] == os.getpid()
    process.communicate()
    assert not path.exists()


@pytest.mark.parametrize(
    "change", [{"host": "other", "machine": "other"}, {"machine": None}, {"process": -1}, {"after_boot": "now"}, None]
)
def test_a_mark_of_an_unknown_process_holds_until_taken_over(change: dict[str, object] | None, tmp_path: Path) -> None:
    path = tmp_path / "mark"
    process = hold(path)
    process.kill()
    process.communicate()
    holder = json.loads(path.read_text())
    path.write_text("" if change is None else json.dumps(holder | change))
    left = path.read_bytes()
    with pytest.raises(locks.InUseError) as refused:
        locks.marked(path, 0, "", None).__enter__()
    assert path.read_bytes() == left
    with locks.marked(path, 0, "", refused.value.mark):
        assert path.read_bytes() != left


def test_a_mark_of_a_process_whose_number_another_one_has_now_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "mark"
    with locks.marked(path, 0, "", None):
        own = json.loads(path.read_text())
    path.write_text(json.dumps({**own, "after_boot": own["after_boot"] - 100}))
    with locks.marked(path, 0, "", None):
        assert json.loads(path.read_text()) == own


def test_a_mark_holds_after_a_step_of_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux then gives another time for the machine's start, and with it for the process's."""
    path, started = tmp_path / "mark", psutil.boot_time()
    with locks.marked(path, 0, "", None):
        monkeypatch.setattr(psutil, "boot_time", lambda: started + 3600)
        monkeypatch.setattr("psutil._psplatform.boot_time", psutil.boot_time)
        with pytest.raises(locks.InUseError):
            locks.marked(path, 0, "", None).__enter__()


def test_a_mark_that_was_taken_over_stays(tmp_path: Path) -> None:
    path = tmp_path / "mark"
    with locks.marked(path, 0, "", None):
        path.write_text("another's")
    assert path.read_text() == "another's"


def test_a_mark_that_does_not_fit_on_the_disk_keeps_nobody_out(tmp_path: Path) -> None:
    path, before = tmp_path / "mark", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        with pytest.raises(OSError):
            locks.marked(path, 0, "", None).__enter__()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not path.exists()


def test_a_lock_ends_although_a_child_has_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    childs = locks._open_lock(tmp_path / "lock")
    with monkeypatch.context() as patch:
        patch.setattr(locks, "_open_lock", lambda path: os.dup(childs))
        with locks.locked(tmp_path / "lock", 0, ""):
            pass
    try:
        with locks.locked(tmp_path / "lock", 0, "") as problem:
            assert problem is None
    finally:
        os.close(childs)


def test_waiting_for_a_lock_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("vae_dist"), "propagate", True)
    monkeypatch.setattr(locks, "SILENT_SECONDS", 0)
    waiting = locks.locked(tmp_path / "lock", 0.2, "another process downloads")
    caplog.set_level("INFO", "vae_dist")
    with locks.locked(tmp_path / "lock", 0, ""), pytest.raises(locks.InUseError):
        waiting.__enter__()
    assert f"another process downloads (it holds {tmp_path / 'lock'})" in caplog.text


class Disk:
    """A file system of its own, in memory."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def leave(self, kilobytes: int) -> None:
        """Fill it, leaving so much free."""
        (self.place / "filling").unlink(missing_ok=True)
        free = shutil.disk_usage(self.place).free
        (self.place / "filling").write_bytes(bytes(max(free - 1024 * kilobytes, 0)))

    def mount(self, *options: str) -> None:
        subprocess.run(["mount", "-t", "tmpfs", *options, "tmpfs", self.place], check=True, capture_output=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    small = Disk(tmp_path / "disk")
    small.place.mkdir()
    try:
        small.mount("-o", "size=8m")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("only root can mount a small disk")
    yield small
    subprocess.run(["umount", "--lazy", small.place], check=True)


def state_of(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "filling"}


READERS: dict[str, tuple[Callable[[Path, Sequence[str]], object], list[str]]] = {
    "evaluate": (evaluate, ["evaluate.importance_samples=2"]),
    "encode": (encode, ["encode.shard_images=500"]),
    "sample": (sample, ["sample.count=4", "sample.files=true"]),
    "compare": (lambda run, arguments: compare([run], arguments), []),
    "report": (report, []),
}


@pytest.mark.parametrize("command", READERS)
def test_readers_of_a_run_keep_its_files_on_a_full_or_read_only_disk(
    command: str, disk: Disk, make_config: MakeConfig, tmp_path: Path
) -> None:
    read, settings = READERS[command]
    run_dir = train(make_config("name=a", "train.steps=20"))
    settings = [f"data.root={make_config().data.root}", "tracking.wandb=disabled", "train.threads=1", *settings]
    if command == "compare":
        evaluate(run_dir, [*settings, "evaluate.importance_samples=0"])
    settings.append(f"output={disk.place / 'out'}")
    read(run_dir, settings)
    before = {path: content for path, content in state_of(disk.place).items() if path.name != "metrics.jsonl"}
    assert before
    failures = 0
    for free in (0, 4, 16, 128, 4096):
        disk.leave(free)
        try:
            read(run_dir, settings)
            break
        except UserError as error:
            failures += 1
            assert re.search(r"can't write.*disk/out.*\(No space left on device\); make room", str(error))
            after = state_of(disk.place)
            assert {path.name for path in after} - {path.name for path in before} <= {"metrics.jsonl"}
            if command == "evaluate":
                for record in (disk.place / "out/metrics.jsonl").read_bytes().splitlines():
                    json.loads(record)
            if command != "evaluate":  # an evaluation's picture is a file of its own, written before its metrics
                assert before.items() <= after.items()
    assert failures > 0
    disk.mount("-o", "remount,ro")
    with pytest.raises(UserError, match=r"\(Read-only file system\); output=FOLDER writes elsewhere"):
        read(run_dir, settings)


def test_read_only_runs_are_compared_elsewhere_and_evaluated_once(
    disk: Disk, make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = train(make_config(f"runs_dir={disk.place}", "name=a", "train.steps=5"))
    before = state_of(run_dir)
    disk.mount("-o", "remount,ro")
    settings = ["tracking.wandb=disabled", "evaluate.importance_samples=2", f"output={tmp_path / 'out'}"]
    compare([run_dir], [*settings, f"data.root={make_config().data.root}"])
    monkeypatch.setattr("vae_dist.reports.comparison.evaluate", None)
    compare([run_dir], [*settings, f"data.root={make_config().data.root}"])
    assert state_of(run_dir) == before


def test_a_full_disk_ends_a_training_and_loses_no_file(disk: Disk, make_config: MakeConfig) -> None:
    settings = [f"runs_dir={disk.place}", "name=a", "checkpoint.every=10"]
    ends = set()
    for free in (0, 4, 8, 16, 64, 128, 256):
        disk.leave(free)
        with pytest.raises((UserError, RunError), match=r"No space left on device\)?; make room") as ended:
            train(make_config(*settings))
        ends.add(type(ended.value))
    assert ends == {UserError, RunError}  # at the start, and in the middle of the training
    disk.leave(1024)
    run_dir = train(make_config(*settings, "train.steps=10"))
    checkpoints = state_of(run_dir / "checkpoints")
    for free in (0, 4, 8):
        disk.leave(free)
        with pytest.raises((UserError, RunError), match=r"No space left on device\)?; make room"):
            train(make_config(*settings, "train.steps=15"))
        assert state_of(run_dir / "checkpoints") == checkpoints
        assert config.read(run_dir / "config.yaml").train.steps in (10, 15)
    disk.mount("-o", "remount,ro")
    with pytest.raises(UserError, match=r"\(Read-only file system\); choose another runs_dir"):
        train(make_config(*settings))


def test_a_folder_that_can_not_be_written_to_is_removed_again(disk: Disk) -> None:
    disk.leave(0)
    with pytest.raises(UserError, match="make room"):
        make_folder(disk.place / "some/where", "choose another")
    assert not (disk.place / "some").exists()


def test_a_record_is_whole_and_on_a_line_of_its_own(disk: Disk) -> None:
    path = disk.place / "rows"
    path.write_text('{"step": 1}\n{"st')  # as a process that was killed leaves it
    disk.leave(0)
    before = path.read_bytes()
    with pytest.raises(OSError, match="No space left"):
        append(path, "x" * 2**16)
    assert path.read_bytes() == before
    disk.leave(1024)
    append(path, "2")
    append(path, "3")
    assert path.read_text() == '{"step": 1}\n{"st\n2\n3\n'


@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.ENOSPC, "make room"), (errno.EDQUOT, "make room"), (errno.EFBIG, "ulimit -f"), (errno.ENOENT, "back"),
     (errno.EACCES, "elsewhere"), (errno.EROFS, "elsewhere"), (errno.ENOTDIR, "elsewhere")],
)  # fmt: skip
def test_advice_fits_the_error(number: int, words: str) -> None:
    assert words in advice(OSError(number, os.strerror(number)), "go elsewhere")


NAMES = [
    "[a]", "{b: c}", "a=b", "%s%d", "#1", "x y", "ü🙂", "-x", "{time}", "*", "?", "'q'", '"q"', "a,b", "$HOME", "!x",
    "a;b", "&a", "null", "\\n", "<b>", "(a)", "[/]", "|", "...", "name=b",
]  # fmt: skip


@pytest.mark.slow
def test_a_run_is_trained_and_read_under_a_path_of_any_characters(
    smoke_arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = "/".join(NAMES)  # relative, and more than one of these characters begins an argument
    Path("run=1.yaml").write_text(json.dumps({"runs_dir": odd, "data": {"root": f"{odd}/data"}}, ensure_ascii=False))
    readable = ["tracking.wandb=disabled", "evaluate.importance_samples=2", f"data.root={odd}/data"]
    settings = [*smoke_arguments[2:], "name=a", "train.steps=10"]
    run_config = config.load([smoke_arguments[0], "run=1.yaml", *settings])
    assert run_config == config.load([smoke_arguments[0], *settings, *readable[2:], f"runs_dir={odd}"])
    run_dir = train(run_config)
    assert run_dir == Path(odd, "a") and (run_dir / "metrics.jsonl").exists()

    for argument in (f"{odd}/a", f"{odd}/a/best", str(find(run_dir, tmp_path).folder)):
        (run,), rest = config.split_runs([argument, *readable])
        assert (run, rest) == (Path(argument), readable)
        evaluate(run, rest)
    evaluate(None, [*readable, f"runs_dir={odd}"])  # the newest there
    compare([run], [*readable, f"output={odd}/out"])
    assert evaluate(run, [*readable, f"output={odd}/out"])["step"] == 10
    assert str(run_dir / "report.html") == str(report(run, readable))
    shown_path = subject_of(opened(run_dir)).path  # as the report shows it
    with monkeypatch.context() as patched:
        patched.chdir(REPOSITORY)
        typed = invocation.command("eval", shown_path)
    assert typed.startswith("make ")
    dry = f"make -n -C {REPOSITORY} PYTHON=true {typed.removeprefix('make ')}"
    shown = subprocess.run(dry, shell=True, capture_output=True, text=True)
    command = shlex.split(shown.stdout.splitlines()[-2 if "Leaving" in shown.stdout else -1])
    assert command[2:] == [str(run_dir)]
    branch = train(config.load([smoke_arguments[0], *smoke_arguments[1:], "name=b", "train.steps=15",
                                f"checkpoint.resume={run_dir}", "train.validate_every=99"]))  # fmt: skip
    assert (branch / "checkpoints/step_00000015").is_dir()


def test_a_study_in_a_folder_of_any_characters_is_compared_there(smoke_arguments: list[str]) -> None:
    odd = "[a, b]/{c}=1,2"
    settings = [*smoke_arguments, f"runs_dir={odd}", "seed=1,2", "name=s", "train.steps=2"]
    planned = config.load_study([*settings, "evaluate.importance_samples=1"])
    assert len(planned.configs) == 2 and {planned.runs_dir for planned in planned.configs} == {odd}
    assert study(planned) == Path(odd) / "s-seed"
    assert (Path(odd) / "s-seed/table.md").exists()


def test_a_leading_tilde_is_a_home_for_every_path_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    keys = ("runs_dir", "output", "data.root", "checkpoint.resume")
    (home / "a=b.yaml").write_text("".join(f"{key}: ~/x/{key}\n" for key in keys))
    for arguments in (["~/a=b.yaml"], [f"{key}=~/x/{key}" for key in keys]):
        values = config.flatten(config.load(arguments))
        assert [values[key] for key in keys] == [str(home / "x" / key) for key in keys]
    assert config.take(["runs_dir=~"], "runs_dir")[0] == str(home)
    assert config.load_reader(config.load(["name=a"]), ["output=~/o"]).output == str(home / "o")
    assert config.split_runs(["~/r", "~root/r"])[0] == [home / "r", Path("~root").expanduser() / "r"]
    assert config.load(["data.root=a~/~"]).data.root == "a~/~"
    for unset in (False, True):
        monkeypatch.delenv("HOME") if unset else monkeypatch.setenv("HOME", "")
        monkeypatch.setattr("pwd.getpwuid", lambda user: {}[user])  # nor is there an entry in the list of users
        for refused in (lambda: config.load(["output=~/x"]), lambda: config.split_run(["~/x"])):
            with pytest.raises(UserError, match=r"~/x can't be found: .*; give the whole path"):
                refused()
    with pytest.raises(UserError, match=r"runs_dir=~nobody-of-that-name/x can't be found"):
        config.load(["runs_dir=~nobody-of-that-name/x"])


def test_an_existing_path_is_a_path_and_any_other_text_a_setting(tmp_path: Path) -> None:
    for name in ("lr=0.1", "-x", "sample.count=3", "a=b/runs"):
        Path(name).mkdir(parents=True)
    runs, rest = config.split_runs(["lr=0.1", "lr=0.1/best", "-x", "sample.count=3", "sample.count=4", "a=b/runs/c"])
    assert [str(run) for run in runs] == ["lr=0.1", "lr=0.1/best", "-x", "sample.count=3", "a=b/runs/c"]
    assert rest == ["sample.count=4"]
    Path("seed=1.yaml").write_text("seed: 7")
    Path("-dash.yaml").write_text("seed: 8")
    assert config.load(["seed=1.yaml"]).seed == 7
    assert config.load(["-dash.yaml"]).name == "dash-{time}"
    for missing in ("configs/a=1.yaml", "a=b/c.yaml"):
        with pytest.raises(UserError, match=f"config file {missing}: No such file"):
            config.load([missing])
    Path("'q'").mkdir()
    assert config.load(["data.root='q'"]).data.root == "'q'"
    assert config.load(["data.root='p'"]).data.root == "p"  # quotes around text, as ever


@pytest.mark.parametrize("key", ["runs_dir", "output", "data.root", "tracking.notes", "checkpoint.resume"])
def test_a_value_survives_being_written_as_an_argument(key: str) -> None:
    for value in (*NAMES, "", " ", "'", "a'b\"", "1e5", "no", "./~x"):
        assert config.flatten(config.load([config.argument(key, value)]))[key] == value


@pytest.mark.parametrize("text", ["[draft] of mine", "[1, 2]", "{mine}", "~"])
def test_text_that_yaml_would_take_for_something_else_is_kept(text: str) -> None:
    if text != "~":  # typed, it is null
        assert config.load([f"tracking.notes={text}"]).tracking.notes == text
    assert config.load([config.argument("tracking.notes", text)]).tracking.notes == text


def test_characters_that_the_encoding_of_paths_lacks_are_one_message(tmp_path: Path) -> None:
    (tmp_path / "some.yaml").write_text("runs_dir: ü🙂\n", encoding="utf-8")
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, str(REPOSITORY / "vae_dist/train.py"), "some.yaml"]
    ended = subprocess.run(command, env={**os.environ, **ascii_only}, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1
    assert "PYTHONUTF8=1" in ended.stderr


def test_two_processes_that_take_over_one_mark_do_not_both_hold_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other has read the dead mark too, and removes ours right after it is made."""
    path = tmp_path / "mark"
    dead = hold(path)
    dead.kill()
    dead.communicate()
    others: list[subprocess.Popen[bytes]] = []

    def meanwhile(seconds: float) -> None:
        if not others:
            path.unlink()
            others.append(hold(path))

    monkeypatch.setattr("vae_dist.locks.time.sleep", meanwhile)
    with pytest.raises(locks.InUseError, match=r"process \d+ on"):
        locks.marked(path, 0, "", None).__enter__()
    assert json.loads(path.read_text())["process"] == others[0].pid
    others[0].kill()
    others[0].communicate()
