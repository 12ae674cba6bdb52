"""What one sees: messages and a progress bar on stderr, results on stdout.

Nothing of it is in the way of the work. What stdout or stderr can't take is dropped, and what their encoding lacks is
escaped; `log.txt` has the messages all the same. Text is shown as it is and never taken for markup.
"""

import io
import logging
import os
import platform
import re
import select
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import IO, Any, NamedTuple, NoReturn, Protocol, cast

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from vae_dist.errors import RunError, StoppedError, UserError

logger = logging.getLogger("vae_dist")
progress_logger = logging.getLogger("vae_dist.progress")

LINE_SECONDS = 10  # between two progress lines where there is no terminal
PATIENCE_SECONDS = 2  # before a bar shows up
STALL_SECONDS = 2  # for a reader that has stopped reading, once, before it is left behind
KEPT_MESSAGES = 1000  # of those said before there is a place for them

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")  # a terminal obeys them, or can't show them


class _Descriptor(io.RawIOBase):
    """stdout or stderr below its buffer. What it can't take is dropped."""

    def __init__(self, descriptor: int, name: str) -> None:
        self._descriptor = descriptor
        self.name = name

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def write(self, data: Any) -> int:
        _write(self._descriptor, bytes(data))
        return len(data)


class _Stream(io.TextIOBase):
    """stdout or stderr, whatever `sys` has in that place at the moment, as a file that does not fail.

    A pipe without a reader, a closed terminal or a full disk loses text, and nothing else. A reader that has stopped
    reading, such as a terminal after Ctrl-S, holds up a thread of its own and not its caller.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._writing: Thread | None = None

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(self._target(), "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        with suppress(AttributeError, OSError, ValueError):
            return bool(self._target().isatty())
        return False

    def write(self, text: str) -> int:
        self.put(text, STALL_SECONDS)
        return len(text)

    def put(self, text: str, seconds: float | None) -> None:
        """Write, and wait for the end of it for so long, without a bound for None."""
        with suppress(Exception):  # there is none; it is closed; it takes no more; a caller's can do anything
            target = self._target()
            target.flush()  # what others have printed comes first
            data = _encoded(text, self.encoding, getattr(target, "errors", None))
            if target is getattr(sys, f"__{self._name}__"):
                self._write_aside(target.fileno(), data, seconds)
            else:  # a caller's, which may lead to a notebook
                target.write(data.decode(self.encoding, "surrogateescape"))
                target.flush()

    def _write_aside(self, descriptor: int, data: bytes, seconds: float | None) -> None:
        if self._writing is not None:
            self._writing.join(0 if seconds is not None else None)
            if self._writing.is_alive():
                return
        self._writing = Thread(target=_write, args=[descriptor, data], daemon=True)
        try:
            self._writing.start()
        except RuntimeError:  # Python is about to end, or the machine has no more threads
            _write(descriptor, data)
        else:
            self._writing.join(seconds)

    def _target(self) -> Any:
        stream = getattr(sys, self._name)
        return getattr(stream, "rich_proxied_file", stream)  # a bar on a terminal catches what others print


def _encoded(text: str, encoding: str, errors: str | None) -> bytes:
    try:
        return text.encode(encoding, errors or "strict")
    except UnicodeError:
        return text.encode(encoding, "backslashreplace")


def _write(descriptor: int, data: bytes) -> None:
    """Write all of it, or as much as can be."""
    with suppress(OSError):
        while data:
            try:
                data = data[os.write(descriptor, data) :]
            except BlockingIOError:  # whoever else has it open wants it so
                select.select([], [descriptor], [])


_stdout = _Stream("stdout")
_messages = Console(file=cast(IO[str], _Stream("stderr")), soft_wrap=True, highlight=False, markup=False, emoji=False)
_results = Console(file=cast(IO[str], _stdout), soft_wrap=True, highlight=False, markup=False, emoji=False)


class Speaker(Protocol):
    """One of the processes of a run, as far as messages go."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    def should_log(self, text: str) -> bool: ...


def _plain(text: object) -> str:
    """Text with what a terminal would obey, or could not show, spelled out."""
    return _CONTROLS.sub(lambda found: ascii(found[0])[1:-1], str(text))


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return _plain(super().format(record))


class _ConsoleHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        is_warning = record.levelno >= logging.WARNING
        place = f"{_place()}: " if is_warning and not _is_main() else ""
        _messages.print(Text(place + self.format(record), style="bold yellow" if is_warning else ""))


class _Memory(logging.Handler):
    """Keeps messages until there is a place for them."""

    def __init__(self) -> None:
        super().__init__()
        self._records: deque[logging.LogRecord] = deque(maxlen=KEPT_MESSAGES)

    def emit(self, record: logging.LogRecord) -> None:
        self._records.append(record)

    def hand_over(self, handle: Callable[[logging.LogRecord], object]) -> None:
        while self._records:
            handle(self._records.popleft())


class _LogFile(logging.FileHandler):
    """`log.txt`. Where it can't be written, one warning says so."""

    _failed = False

    def emit(self, record: logging.LogRecord) -> None:
        try:
            super().emit(record)
        except OSError:  # it could not be opened
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:
        if not self._failed:
            self._failed = True
            error = sys.exc_info()[1]
            logger.warning("%s can't be written (%s)", self.baseFilename, getattr(error, "strerror", None) or error)


_unshown = _Memory()  # said before it is known which process this is
_unlogged = _Memory()  # said by the main process before its log is opened
_speaker: Speaker | None = None
_starts = 0


def start(reporting_rank: Speaker) -> None:
    """Send messages to the terminal: all of the main process, and of the others warnings that the main one has not."""
    global _speaker, _starts
    _speaker, _starts = reporting_rank, _starts + 1
    handler = _ConsoleHandler()
    handler.setFormatter(_Formatter())
    handler.setLevel(logging.INFO if reporting_rank.rank == 0 else logging.WARNING)
    handler.addFilter(_is_shown)
    _unlogged.hand_over(lambda record: None)  # of an earlier run in this process
    _install(handler, _unlogged)
    _unshown.hand_over(logger.handle)


def _install(*handlers: logging.Handler) -> None:
    logger.handlers = list(handlers)
    logger.propagate = False
    logger.setLevel(logging.INFO)


def _is_shown(record: logging.LogRecord) -> bool:
    if record.name == progress_logger.name and _messages.is_terminal:
        return False  # the bar shows what these lines say
    told_apart = f"{_starts} {record.getMessage()}"
    return record.levelno < logging.WARNING or _speaker is None or _speaker.should_log(told_apart)


@contextmanager
def logged_to(path: Path) -> Iterator[None]:
    """Append all messages to a file too, those since `start` first."""
    handler = _LogFile(path, encoding="utf-8", errors="backslashreplace", delay=True)
    handler.setFormatter(_Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    logger.removeHandler(_unlogged)
    _unlogged.hand_over(handler.handle)
    logger.addHandler(handler)
    try:
        yield
    except Exception as error:  # `run` says it on the terminal, or Python does
        level = logging.WARNING if isinstance(error, StoppedError) else logging.ERROR
        is_bug = not isinstance(error, UserError | RunError | StoppedError)
        trace = (type(error), error, error.__traceback__) if is_bug else None
        handler.handle(logger.makeRecord(logger.name, level, "", 0, "%s", (error,), trace))
        raise
    finally:
        logger.removeHandler(handler)
        with suppress(OSError):
            handler.close()


def say(text: str) -> None:
    """Print what the user has asked for, as long as it takes."""
    _stdout.put(f"{text.rstrip()}\n", None)


def table(title: str, rows: Mapping[str, object]) -> None:
    """Print results, one a row."""
    result = Table(title=_plain(title), title_justify="left", show_header=False)
    for name, value in rows.items():
        result.add_row(_plain(name), _plain(_figure(value)))
    _results.print(result)


class Figure(NamedTuple):
    """A row of a table of results; none where there is no value."""

    name: str
    value: float | None
    standard_error: float | None = None
    remark: str = ""


def figures(title: str, rows: Sequence[Figure], note: str, warning: str | None = None) -> None:
    """Print results with their standard errors, below them how they were come by, and what speaks against them."""
    result = Table(title=_plain(title), title_justify="left", show_header=False)
    for justify in ("left", "right", "left", "left"):
        result.add_column(justify=justify)
    for row in rows:
        if row.value is not None:
            error = "" if row.standard_error is None else f"± {row.standard_error:.2g}"
            result.add_row(_plain(row.name), _figure(row.value), error, _plain(row.remark))
    _results.print(result)
    _results.print(_plain(note))
    if warning is not None:
        _results.print(Text(_plain(warning), style="bold yellow"))


@contextmanager
def progress(subject: str, total: int, *, is_main: bool) -> Iterator[Callable[[int], None]]:
    """Show how far a computation is, by what is called with the parts that are done; nothing is shown of a short one.

    A bar on a terminal, which goes when it is done; plain lines, some seconds apart, anywhere else.
    """
    bar = Progress(
        TextColumn(_plain(subject), markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        TextColumn("left"),
        console=_messages,
        transient=True,
        disable=not (is_main and _messages.is_terminal),
    )
    task = bar.add_task("", total=total)
    started = time.monotonic()
    done, line_due = 0, started + LINE_SECONDS

    def advance(parts: int) -> None:
        nonlocal done, line_due
        done += parts
        bar.advance(task, parts)
        now = time.monotonic()
        if now > started + PATIENCE_SECONDS:
            bar.start()
        if is_main and now > line_due:
            line_due = now + LINE_SECONDS
            left = (now - started) / done * (total - done)
            progress_logger.info("%s: %d%%, %s left", subject, 100 * done // total, _minutes(left))

    try:
        yield advance
    finally:
        bar.stop()


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def columns(title: str, names: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str] = ()) -> None:
    """Print results in columns, and below them what has to be said of them."""
    result = Table(title=_plain(title), title_justify="left")
    for name in names:
        result.add_column(_plain(name).replace(" ", "\n"), justify="right", overflow="fold")
    for row in rows:
        result.add_row(*map(_plain, row))
    _results.print(result)
    for note in notes:
        _results.print(Text(_plain(note), style="bold yellow"))


def _figure(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.4f}" if abs(value) >= 1 else f"{value:.4g}"


class TrainingProgress:
    """One bar on a terminal; plain lines, some seconds apart, anywhere else. Only the main process shows it."""

    def __init__(self, is_main: bool, start: int, last_step: int, steps_per_epoch: int) -> None:
        self._first = start
        self._last_step = last_step
        self._steps_per_epoch = steps_per_epoch
        self._started = time.monotonic()
        self._line_due = 0.0
        self._last: dict[str, float] = {}
        self._is_main = is_main
        self._bar = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            TextColumn("loss {task.fields[loss]:.2f}"),
            TextColumn("{task.fields[speed]:,.0f} images/s"),
            TimeRemainingColumn(),
            console=_messages,
            disable=not (is_main and _messages.is_terminal),
        )
        self._task = self._bar.add_task(
            "", total=last_step, completed=start, epoch=self._epoch(start), loss=float("nan"), speed=0.0
        )

    def __enter__(self) -> "TrainingProgress":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()

    def restart_clock(self, step: int) -> None:
        """Guess the time that is left by the steps from here on."""
        self._first, self._started = step, time.monotonic()

    def show(self, step: int, row: Mapping[str, float]) -> None:
        """Bring bar or lines up to a row of training figures."""
        self._last |= row
        epoch = self._epoch(step)
        loss, images_per_second = (row.get(f"train/{name}", float("nan")) for name in ("loss", "images_per_second"))
        self._bar.update(self._task, completed=step, epoch=epoch, loss=loss, speed=images_per_second)
        now = time.monotonic()
        if now >= self._line_due or step == self._last_step:
            self._line_due = now + LINE_SECONDS
            seconds = (now - self._started) / max(step - self._first, 1) * (self._last_step - step)
            left = f"{int(seconds) // 60}:{int(seconds) % 60:02d} left"
            progress_logger.info(
                "epoch %s, step %d/%d, loss %.2f, %s images/s, %s",
                epoch, step, self._last_step, loss, f"{images_per_second:,.0f}", left,
            )  # fmt: skip

    def note(self, step: int, figures: Mapping[str, float]) -> None:
        """A line about a validation."""
        self._last |= figures
        if figures:
            logger.info("step %d: %s", step, ", ".join(f"{name} {value:.2f}" for name, value in figures.items()))

    def table(self, title: str) -> None:
        """The run's last figures, once it is done."""
        if self._is_main:
            table(f"{title} (nats per image)", self._last)

    def _epoch(self, step: int) -> str:
        epochs = -(-self._last_step // self._steps_per_epoch)
        return f"{min(step // self._steps_per_epoch + 1, epochs)}/{epochs}"


def run(command: Callable[[], None]) -> NoReturn:
    """Run a command and exit: 0 when it is done, 2 for input that can't be used, 1 for a run that can't go on, and 130
    or 143 when it was asked to stop. Each has one message and no traceback. What becomes of the messages does not
    change the exit code.
    """
    _guard_standard_streams()
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # torch traces each attempt to connect, which may be many
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # outside of a training, which saves first
        signal.signal(signal.SIGHUP, lambda number, frame: os._exit(143))
    _install(_unshown)
    try:
        command()
    except UserError as error:
        _end("error: ", error, 2, error.reporting_rank)
    except RunError as error:
        _end("the run has ended: ", error, 1, error.reporting_rank)
    except StoppedError as error:
        _end("", error, error.exit_code, error.reporting_rank)
    except KeyboardInterrupt:
        _end("", "interrupted", 130, reporting_rank=0)
    except Exception:
        _show_kept()
        if _place():
            _messages.print(f"{_place()} has failed:")
        raise
    _show_kept()
    sys.exit(0)


def _end(title: str, message: str | Exception, code: int, reporting_rank: int | None) -> NoReturn:
    """Exit with a message, which this process prints unless it is another one that does so for all."""
    _show_kept()
    rank, size = _rank_and_size()
    if reporting_rank is None and size > 1 and _speaker is None and isinstance(message, Exception):
        from vae_dist.distributed import failures

        reporting_rank = 0 if failures.all_fail_alike(message) else None
    if size == 1 or reporting_rank in (None, rank):
        place = f"{_place()}: " if reporting_rank is None and size > 1 else ""
        _messages.print(Text.assemble((title, "bold red"), _plain(f"{place}{message}")))
    sys.exit(code)


def _show_kept() -> None:
    """Show what was said before the processes have joined, where they never have."""
    handler = _ConsoleHandler()
    handler.setFormatter(_Formatter())
    _unshown.hand_over(handler.handle)


def _rank_and_size() -> tuple[int, int]:
    """This process's rank among those of its run: by its launcher's word where they have not joined yet."""
    if _speaker is not None:
        return _speaker.rank, _speaker.size
    rank, size = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE"))
    return (int(rank), int(size)) if rank.isdecimal() and size.isdecimal() and int(size) > 1 else (0, 1)


def _is_main() -> bool:
    return _rank_and_size()[0] == 0


def _place() -> str:
    """Which of several processes this is; nothing where it is the only one."""
    rank, size = _rank_and_size()
    return f"process {rank} of {size} on {platform.node()}" if size > 1 else ""


def _guard_standard_streams() -> None:
    """Let what libraries print, and Python at exit, fail no more than what is printed here."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # started with `2>&-`: the next file to be opened would be taken for stderr
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            guarded = io.TextIOWrapper(
                io.BufferedWriter(_Descriptor(stream.fileno(), stream.name)),
                encoding=stream.encoding,
                errors="backslashreplace" if stream.errors == "strict" else stream.errors,
                line_buffering=stream.line_buffering,
                write_through=stream.write_through,
            )
            setattr(sys, name, guarded)
            setattr(sys, f"__{name}__", guarded)
