"""Messages to users, over real pipes, terminals and processes, also when these are closed or stall."""

import errno
import fcntl
import io
import logging
import os
import platform
import pty
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import REPOSITORY
from tests.forked import ForkServer
from tests.image_folders import numbered, packing, write_images
from tests.test_mnist import idx
from vae_dist.errors import RunError, StoppedError, UserError
from vae_dist.runs.lookup import find
from vae_dist.terminal import console, streams, tables
from vae_dist.terminal.tables import MetricRow

TRAIN = str(REPOSITORY / "vae_dist/train.py")
ENDLESS = ["train.steps=1000000", "train.validate_every=1000000", "checkpoint.every=1000000", "train.log_every=1"]


def command(smoke: list[str], *arguments: str) -> list[str]:
    return [sys.executable, TRAIN, *smoke, "name=a", *arguments]


def read_until(descriptor: int, text: bytes, file: Path | None = None, seconds: float = 60) -> None:
    """Read until the text has come, or until it is in a file."""
    output, deadline = b"", time.monotonic() + seconds
    while text not in output:
        assert time.monotonic() < deadline, output
        if select.select([descriptor], [], [], 0.05)[0]:
            output += os.read(descriptor, 4096)
        if file is not None:
            output = file.read_bytes() if file.exists() else b""


def saved_step() -> int:
    return find(Path("runs/a"), Path("runs")).state.step


@contextmanager
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        try:
            os.close(end)
        except OSError as error:
            assert error.errno == errno.EBADF  # the test has closed it


@contextmanager
def full_pipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Standard output is a pipe without room; gives its end to read from, 4096 bytes at first."""
    with pipe() as (reader, writer):
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
        os.write(writer, bytes(4096))
        with open(os.dup(writer), "w") as stdout:
            monkeypatch.setattr(sys, "stdout", stdout)
            monkeypatch.setattr(sys, "__stdout__", stdout)
            yield reader


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [False, True])
def test_a_closed_pipe_changes_neither_training_nor_exit_code(stopped: bool, smoke_arguments: list[str]) -> None:
    """As with `| head`, and as with Ctrl-C that ends `| tee` first."""
    with pipe() as (reader, writer):
        started = command(smoke_arguments, *(ENDLESS if stopped else []))
        process = subprocess.Popen(started, stdout=writer, stderr=writer)
        os.close(writer)
        read_until(reader, b"first step" if stopped else b"process on cpu")
        os.close(reader)
    if stopped:
        process.send_signal(signal.SIGINT)
    assert process.wait(60) == (130 if stopped else 0)
    log = Path("runs/a/log.txt").read_text()
    if stopped:
        assert f"SIGINT: asked to stop; step {saved_step()} of" in log
    else:
        assert saved_step() == 40 and "step 40: validation/negative_elbo" in log


def test_a_stalled_reader_is_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with full_pipe(monkeypatch) as reader:
        monkeypatch.setattr(streams, "STALL_SECONDS", 0.1)
        started = time.monotonic()
        for line in ("first", "second", "third"):
            tables.columns(line, ["head"], [["cell"]])
        assert 0.1 <= time.monotonic() - started < 0.2
        os.read(reader, 4096)
        read_until(reader, b"first")
        streams.say("fourth")
        read_until(reader, b"fourth")


@pytest.mark.slow
def test_a_training_with_a_stalled_reader_runs_to_its_end(smoke_arguments: list[str]) -> None:
    with pipe() as (_, writer):
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
        os.write(writer, bytes(4096))  # no room is left
        process = subprocess.Popen(command(smoke_arguments), stdout=writer, stderr=writer)
        assert process.wait(60) == 0
    assert saved_step() == 40


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [False, True])
def test_a_closed_terminal_changes_neither_training_nor_exit_code(stopped: bool, smoke_arguments: list[str]) -> None:
    """As with a disowned job, which continues, and as with one that gets SIGHUP, which saves and ends."""
    child, leader = pty.fork()
    if child == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL if stopped else signal.SIG_IGN)
        os.execv(sys.executable, command(smoke_arguments, *ENDLESS, *([] if stopped else ["train.steps=300"])))
    read_until(leader, b"first step", Path("runs/a/log.txt"))
    os.close(leader)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == (143 if stopped else 0)
    log = Path("runs/a/log.txt").read_text()
    assert f"SIGHUP: asked to stop; step {saved_step()} of" in log if stopped else saved_step() == 300


def test_a_hangup_or_a_warning_outside_of_a_training_ends_with_the_promised_code() -> None:
    waiting = (
        "import time\nfrom vae_dist.terminal import console\n"
        "console.run(lambda: (print(1, flush=True), time.sleep(60)))"
    )
    numbers = (signal.SIGHUP, signal.SIGUSR1)  # the latter is SLURM's warning
    programs = [[sys.executable, "-c", waiting] for _ in numbers] + [["nohup", sys.executable, "-c", waiting]]
    *started, ignoring = [subprocess.Popen(each, cwd=REPOSITORY, stdout=subprocess.PIPE) for each in programs]
    for process, number in zip((*started, ignoring), (*numbers, signal.SIGHUP), strict=True):
        assert process.stdout is not None and process.stdout.readline()
        process.send_signal(number)
    assert [process.wait(10) for process in started] == [143, 143]
    with pytest.raises(subprocess.TimeoutExpired):
        ignoring.wait(0.2)
    ignoring.kill()
    for process in (*started, ignoring):
        process.communicate()


def test_a_packing_says_at_once_why_it_waits(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "pictures", numbered(3))
    target = packing(tmp_path / "packed", 64).target(folder)
    target.parent.mkdir()
    program = [sys.executable, "-m", "vae_dist", "pack", f"data.path={folder}", f"data.root={tmp_path}"]
    with open(target.with_name(f".{target.name}.lock"), "w") as lock, pipe() as (reader, writer):
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process packs
        process = subprocess.Popen(program, cwd=REPOSITORY, stderr=writer)
        try:
            read_until(reader, b"waiting up to")
        finally:
            process.kill()
            process.wait()


def test_a_pipe_that_does_not_block_gets_the_whole_text() -> None:
    text, received = os.urandom(2**20), bytearray()
    with pipe() as (reader, writer):
        os.set_blocking(writer, False)
        writing = threading.Thread(target=streams._write, args=[writer, text])
        writing.start()
        writing.join(0.1)  # until the pipe is full
        while len(received) < len(text) and select.select([reader], [], [], 5)[0]:
            received += os.read(reader, 2**16)
        writing.join(5)
    assert received == text


def test_a_command_s_output_waits_for_its_reader_as_long_as_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    with full_pipe(monkeypatch) as reader:
        monkeypatch.setattr(streams, "STALL_SECONDS", 0.01)
        saying = threading.Thread(target=streams.say, args=["the config"], daemon=True)
        saying.start()
        saying.join(0.3)
        waits = saying.is_alive()
        os.read(reader, 4096)
        read_until(reader, b"the config\n")
        saying.join(60)
    assert waits


def test_earlier_prints_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open(tmp_path / "output", "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        monkeypatch.setattr(sys, "__stdout__", stdout)
        print("of a library")
        streams.say("of a command")
        monkeypatch.undo()
    assert (tmp_path / "output").read_text() == "of a library\nof a command\n"


def test_a_caller_s_stream_gets_what_its_encoding_lacks_as_escapes(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.BytesIO()
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(file, "ascii"))
    streams.messages.print("caf\u00e9")
    assert file.getvalue() == b"caf\\xe9\n"


@pytest.mark.parametrize("arguments, code", [("--help", 0), ("--print-config", 0), ("model.latnt_dim=3", 2)])
@pytest.mark.parametrize("place", [">/dev/full 2>&1", ">&- 2>&- <&-", "2>&1 | true"])
def test_exit_codes_are_the_promised_ones_wherever_the_output_goes(arguments: str, code: int, place: str) -> None:
    line = f"{sys.executable} {TRAIN} {arguments} {place}; exit ${{PIPESTATUS[0]}}"
    ended = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (code, "", "")


SHOW = """
from vae_dist.terminal import console
from vae_dist.terminal import tables
from vae_dist.terminal.tables import MetricRow
from vae_dist.errors import UserError
def command():
    console.logger.warning("a warning \\u65e5 [red]")
    rows = [MetricRow("n\\u00e4me [b]", 1.0, 0.5)]
    tables.metrics("title \\u65e5 [/x]", rows, "note \\u65e5 :smile:", warning="\\x1b[31mred")
    print("left in the buffer by others \\u65e5", end="")
    raise UserError("[/home/\\u65e5] :pile_of_poo:")
console.run(command)
"""


@pytest.mark.parametrize(("encoding", "day", "umlaut"), [("ascii", r"\u65e5", r"\xe4"), ("latin-1", r"\u65e5", "ä")])
def test_unencodable_text_is_escaped_and_markup_is_printed_as_text(encoding: str, day: str, umlaut: str) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    shown = subprocess.run([sys.executable, "-c", SHOW], cwd=REPOSITORY, env=environment, capture_output=True)
    out, err = (text.decode(encoding) for text in (shown.stdout, shown.stderr))
    assert shown.returncode == 2
    assert out.startswith(f"title {day} [/x]\n") and out.endswith(f"left in the buffer by others {day}")
    assert f"n{umlaut}me [b]" in out and "note \\u65e5 :smile:\n" in out
    assert err == f"a warning {day} [red]\nerror: [/home/{day}] :pile_of_poo:\n"


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_prints_of_libraries_do_not_fail(unbuffered: str) -> None:
    """Without a buffer print fails; with one Python fails at exit, with a message and code 120."""
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered, "PYTHONIOENCODING": "ascii"}
    with pipe() as (reader, writer):
        os.close(reader)
        shown = subprocess.run(
            [sys.executable, "-c", SHOW], cwd=REPOSITORY, env=environment, stdout=writer, stderr=subprocess.PIPE
        )
    assert shown.returncode == 2 and shown.stderr.count(b"\n") == 2  # the warning and the error


def test_nothing_that_a_terminal_would_obey_is_shown_or_logged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    console.start(Alone())
    with pytest.raises(RunError), console.logged_to(tmp_path / "log.txt"):
        console.logger.warning("a server says \x1b]0;title\x07 \udcff")
        raise RunError("no \x9b31m")
    with pytest.raises(ZeroDivisionError), console.logged_to(tmp_path / "log.txt"):
        raise ZeroDivisionError("a bug \x1b[2J")
    tables.metrics("\x1b[31mtitle", [MetricRow("\x1b[2J", 1.0)], "\x07")
    shown, log = capsys.readouterr(), (tmp_path / "log.txt").read_text()
    assert not {"\x1b", "\x07", "\x9b"} & set(shown.out + shown.err + log)
    assert r"a server says \x1b]0;title\x07 \udcff" in shown.err
    assert r"\x07 \udcff" in log and r"ERROR no \x9b31m" in log
    assert "ERROR a bug" in log and 'ZeroDivisionError("a bug' in log  # its traceback has lines


def test_a_name_of_others_begins_no_line_and_turns_no_text_round(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "a\n2026-01-01 00:00:00 INFO forged\u202egnp"
    console.start(Alone())
    with pytest.raises(UserError) as raised, console.logged_to(tmp_path / "log.txt"):
        console.logger.warning("skipping %s", name)
        raise UserError(f"no {name}")
    lines = [*capsys.readouterr().err.splitlines(), *(tmp_path / "log.txt").read_text().splitlines()]
    assert len(lines) == 3 and all(line.endswith(r"a\n2026-01-01 00:00:00 INFO forged\u202egnp") for line in lines)
    assert str(raised.value) == rf"no {name.encode('unicode_escape').decode()}"  # Python prints it too


@pytest.mark.parametrize("columns", ["0", "5"])
def test_columns_that_hold_no_text_hide_none(columns: str) -> None:
    environment = {**os.environ, "COLUMNS": columns}
    shown = subprocess.run(
        [sys.executable, "-c", SHOW], cwd=REPOSITORY, env=environment, capture_output=True, text=True
    )
    assert "± 0.5" in shown.stdout and shown.stderr.endswith(":pile_of_poo:\n")


class Alone:
    rank, size = 0, 1

    def should_log(self, text: str) -> bool:
        return True


def test_an_unwritable_log_is_one_warning_and_no_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    console.start(Alone())
    with console.logged_to(tmp_path / "missing/log.txt"):
        console.logger.info("first")
        console.logger.info("second")
    stderr = capsys.readouterr().err
    assert stderr.count("missing/log.txt can't be written") == 1 and "first" in stderr and "second" in stderr


def test_a_bug_leaves_its_traceback_in_the_log(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), console.logged_to(tmp_path / "log.txt"):
        1 / 0  # noqa: B018
    assert "1 / 0" in (tmp_path / "log.txt").read_text()


@pytest.mark.parametrize(
    ("error", "level"),
    [
        (UserError("the reason"), "ERROR"),
        (RunError("the reason"), "ERROR"),
        (StoppedError("the reason", 143), "WARNING"),
    ],
)
def test_an_end_that_is_no_bug_is_one_line_in_the_log(error: Exception, level: str, tmp_path: Path) -> None:
    with pytest.raises(type(error)), console.logged_to(tmp_path / "log.txt"):
        raise error
    (line,) = (tmp_path / "log.txt").read_text().splitlines()
    assert line.split(" ", 2)[2] == f"{level} the reason"


def test_messages_before_the_log_opens_are_in_it_once(tmp_path: Path) -> None:
    console.start(Alone())
    console.logger.warning("of an earlier run")
    console.start(Alone())
    console.logger.warning("early")
    for name in ("first", "second"):
        with console.logged_to(tmp_path / name):
            logging.getLogger("vae_dist.data.datasets").warning("later")
    assert [line.split(" ", 2)[2] for line in (tmp_path / "first").read_text().splitlines()] == [
        "WARNING early",
        "WARNING later",
    ]
    assert "early" not in (tmp_path / "second").read_text()


def test_a_warning_is_shown_once_in_each_run_of_a_program(capsys: pytest.CaptureFixture[str]) -> None:
    shown: set[str] = set()

    class Once(Alone):
        def should_log(self, text: str) -> bool:
            return text not in shown and not shown.add(text)  # type: ignore[func-returns-value]

    for _ in range(2):
        console.start(Once())
        console.logger.warning("too few images")
        console.logger.warning("too few images")
    assert capsys.readouterr().err == "too few images\n" * 2


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({"RANK": "8"}, ""),
        ({"LOCAL_RANK": "1", "RANK": "1", "WORLD_SIZE": ""}, ""),
        ({"RANK": "1", "WORLD_SIZE": "2"}, f"process 1 of 2 on {platform.node()}: "),
    ],
)
def test_every_process_prints_its_own_error(environment: dict[str, str], place: str, fork_server: ForkServer) -> None:
    """Whatever an earlier launcher has left in the environment."""
    (said,) = fork_server.run_group([{**os.environ, **environment}], TRAIN, "model.latnt_dim=3")
    assert said.returncode == 2 and said.stderr.startswith(f"error: {place}unknown key 'model.latnt_dim'")


def test_one_process_prints_its_error_and_the_others_learn_the_reason(fork_server: ForkServer, tmp_path: Path) -> None:
    """A data set that lies on the first machine and not on the second."""
    folder = tmp_path / "0/data/KMNIST/raw"
    folder.mkdir(parents=True)
    (tmp_path / "1").mkdir()
    for part in ("train", "t10k"):
        (folder / f"{part}-images-idx3-ubyte").write_bytes(idx(np.zeros((60, 28, 28), np.uint8)))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(idx(np.zeros(60, np.uint8)))
    settings = ["data.name=kmnist", "data.download=false", "data.validation_images=0", "train.batch_size=10"]
    settings += ["tracking.wandb=disabled", "device=cpu", "train.compile=false", f"runs_dir={tmp_path}/runs", "name=a"]
    for ended in fork_server.launch(2, TRAIN, *settings, folders=[tmp_path / "0", tmp_path / "1"]):
        assert ended.returncode == 2
        assert ended.stderr.count("\n") == 1
        assert ended.stderr.startswith(f"error: process 1 of 2 on {platform.node()}: kmnist is not in data/KMNIST/raw")


@pytest.mark.parametrize(("error", "code"), [("RunError", 1), ("UserError", 2), ("KeyError", 1)])
def test_a_process_that_could_not_leave_its_group_ends_at_once(error: str, code: int, fork_server: ForkServer) -> None:
    """Python's own end would wait for NCCL."""
    program = f"""if True:
        import atexit
        import torch
        from vae_dist.errors import RunError, UserError
        from vae_dist.terminal import console

        def fail():
            print("a result")
            raise {error}("the reason")

        torch.distributed.is_initialized = lambda: True
        atexit.register(print, "Python's end")
        console.run(fail)
    """
    ended = fork_server.run("-c", program, folders=[REPOSITORY])
    assert (ended.returncode, ended.stdout) == (code, "a result\n") and "the reason" in ended.stderr


@pytest.mark.parametrize(
    ("end", "code", "last"),
    [
        ("raise UserError('why')", 2, "error: why\n"),
        ("raise RunError('why')", 1, "the run has ended: why\n"),
        ("raise StoppedError('why', 143)", 143, "why\n"),
        ("raise KeyboardInterrupt", 130, "interrupted\n"),
        ("return", 0, ""),
    ],
)
def test_what_was_said_before_the_processes_joined_comes_before_the_end(
    end: str, code: int, last: str, fork_server: ForkServer
) -> None:
    program = f"""if True:
        import logging
        from vae_dist.errors import RunError, StoppedError, UserError
        from vae_dist.terminal import console

        def command():
            logging.getLogger("vae_dist.data").warning("said early")
            {end}

        console.run(command)
    """
    ended = fork_server.run("-c", program, folders=[REPOSITORY])
    assert (ended.returncode, ended.stdout, ended.stderr) == (code, "", f"said early\n{last}")


def test_what_was_said_before_the_processes_joined_is_in_the_log(fork_server: ForkServer, tmp_path: Path) -> None:
    program = f"""if True:
        import logging
        from pathlib import Path
        from tests.test_console import Alone
        from vae_dist.terminal import console

        def command():
            logging.getLogger("vae_dist.data").warning("said early")
            console.start(Alone())
            with console.logged_to(Path({str(tmp_path / "log.txt")!r})):
                pass

        console.run(command)
    """
    ended = fork_server.run("-c", program, folders=[REPOSITORY])
    assert (ended.returncode, ended.stderr) == (0, "said early\n")
    assert (tmp_path / "log.txt").read_text().endswith("WARNING said early\n")


def test_a_table_that_is_too_wide_is_turned_in_as_many_parts_as_needed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams.results, "_width", 80)
    names = [f"metric {number}" for number in range(12)]
    values = [[f"{run}.{number:04d}" for number in range(12)] for run in range(20)]

    def printed(columns: int, rows: int) -> list[list[str]]:
        tables.columns("title", names[:columns], [row[:columns] for row in values[:rows]])
        lines = capsys.readouterr().out.splitlines()
        assert max(map(len, lines)) <= 80
        return [[cell.strip() for cell in line.strip("\u2502").split("\u2502")] for line in lines if "\u2502" in line]

    assert printed(5, 20) == [row[:5] for row in values]
    assert printed(12, 3) == [[name, *column] for name, *column in zip(names, *values[:3], strict=True)]
    lines = printed(12, 20)
    parts = [lines[start : start + 12] for start in range(0, len(lines), 12)]
    assert [[line[0] for line in part] for part in parts] == [names] * 3
    assert [list(row) for part in parts for row in list(zip(*part, strict=True))[1:]] == values


def test_a_large_standard_error_has_no_exponent(capsys: pytest.CaptureFixture[str]) -> None:
    errors = {"± 254": 253.7, "± 100": 99.6, "± 99": 99.4, "± 0.097": 0.0971, "± 2.5e+08": 2.5e8}
    tables.metrics("bits", [MetricRow(f"metric {index}", 1.0, error) for index, error in enumerate(errors.values())])
    rows = [line for line in capsys.readouterr().out.splitlines() if "metric" in line]
    assert [row.split("│")[3].strip() for row in rows] == list(errors)


def test_a_narrow_console_cuts_no_number(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams.results, "_width", 36)
    rows = [MetricRow("negative log-likelihood", -12341.6012, 0.00093, "nats, at most; 128 samples")]
    tables.metrics("title", rows, "protocol")
    tables.table("title", {"validation/best_negative_elbo": 12490.6849})
    lines = [line.split("\u2502") for line in capsys.readouterr().out.splitlines() if "\u2502" in line]
    found = ["".join(column).replace(" ", "") for part in (4, 2) for column in zip(*(
        line[1:-1] for line in lines if len(line) == part + 2
    ), strict=True)]  # fmt: skip
    assert found == [
        "negativelog-likelihood", "-12341.6012", "\u00b10.00093", "nats,atmost;128samples",
        "validation/best_negative_elbo", "12490.6849",
    ]  # fmt: skip


def test_no_cell_is_lost_of_a_table_whose_every_row_is_too_wide_in_both_ways(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams.results, "_width", 40)
    names = [f"a_setting_with_a_long_name_{number}" for number in range(28)]
    values = [[f"{run}/{'path' * 5}/{number}" for number in range(28)] for run in range(4)]
    tables.columns("title", names, values)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 40
    columns = zip(*(line.strip("\u2502").split("\u2502") for line in lines if "\u2502" in line), strict=True)
    shown = ["".join(cell.strip() for cell in column) for column in columns]
    assert shown == ["".join(names) * 4, "".join(map("".join, values))]
