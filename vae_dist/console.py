"""What one sees: messages and a progress bar on stderr, results on stdout, all of it from the main process alone."""

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, NoReturn

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from vae_dist.errors import RunError, StoppedError, UserError

logger = logging.getLogger("vae_dist")
progress_logger = logging.getLogger("vae_dist.progress")

_messages = Console(stderr=True, soft_wrap=True, highlight=False)
_results = Console(soft_wrap=True, highlight=False)

LINE_SECONDS = 10  # between two progress lines where there is no terminal
PATIENCE_SECONDS = 2  # before a bar shows up


class _ConsoleHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        style = "bold yellow" if record.levelno >= logging.WARNING else ""
        _messages.print(Text(self.format(record), style=style))


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
            logger.warning("%s can't be written (%s)", self.baseFilename, sys.exc_info()[1])


def start(is_main: bool) -> None:
    """Send messages to the terminal on the main process, and nowhere on the others."""
    logger.handlers.clear()
    logger.propagate = False
    if is_main:
        handler = _ConsoleHandler()
        if _messages.is_terminal:  # the bar shows what these lines say
            handler.addFilter(lambda record: record.name != progress_logger.name)
        logger.addHandler(handler)
    else:
        logger.addHandler(logging.NullHandler())
    logger.setLevel(logging.INFO)


@contextmanager
def logged_to(path: Path) -> Iterator[None]:
    """Append all messages to a file too."""
    handler = _LogFile(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    logger.addHandler(handler)
    try:
        yield
    except (RunError, StoppedError) as error:  # the door says it on the terminal
        level = logging.WARNING if isinstance(error, StoppedError) else logging.ERROR
        handler.handle(logger.makeRecord(logger.name, level, "", 0, str(error), (), None))
        raise
    finally:
        logger.removeHandler(handler)
        with suppress(OSError):
            handler.close()


def table(title: str, rows: Mapping[str, object]) -> None:
    """Print results, one a row."""
    result = Table(title=title, title_justify="left", show_header=False)
    for name, value in rows.items():
        result.add_row(name, _figure(value))
    _results.print(result)


class Figure(NamedTuple):
    """A row of a table of results; none where there is no value."""

    name: str
    value: float | None
    standard_error: float | None = None
    remark: str = ""


def figures(title: str, rows: Sequence[Figure], note: str, warning: str | None = None) -> None:
    """Print results with their standard errors, below them how they were come by, and what speaks against them."""
    result = Table(title=title, title_justify="left", show_header=False)
    for justify in ("left", "right", "left", "left"):
        result.add_column(justify=justify)
    for row in rows:
        if row.value is not None:
            error = "" if row.standard_error is None else f"± {row.standard_error:.2g}"
            result.add_row(row.name, _figure(row.value), error, row.remark)
    _results.print(result)
    _results.print(Text(note))
    if warning is not None:
        _results.print(Text(warning, style="bold yellow"))


@contextmanager
def progress(subject: str, total: int, *, is_main: bool) -> Iterator[Callable[[int], None]]:
    """Show how far a computation is, by what is called with the parts that are done; nothing is shown of a short one.

    A bar on a terminal, which goes when it is done; plain lines, some seconds apart, anywhere else.
    """
    bar = Progress(
        TextColumn(subject),
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
    result = Table(title=title, title_justify="left")
    for name in names:
        result.add_column(name.replace(" ", "\n"), justify="right", overflow="fold")
    for row in rows:
        result.add_row(*map(Text, row))
    _results.print(result)
    for note in notes:
        _results.print(Text(note, style="bold yellow"))


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
        epoch, loss, images_per_second = self._epoch(step), row["train/loss"], row["train/images_per_second"]
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


def run(door: Callable[[], None]) -> NoReturn:
    """Run a command and exit: 0 when it is done, 2 for input that can't be used, 1 for a run that can't go on, and 130
    or 143 when it was asked to stop. Each has one message and no traceback.
    """
    try:
        door()
    except UserError as error:
        _end(("error: ", "bold red"), str(error), 2)
    except RunError as error:
        _end(("the run has ended: ", "bold red"), str(error), 1, speaker=error.speaker)
    except StoppedError as error:
        _end("", str(error), error.exit_code)
    except KeyboardInterrupt:
        _end("", "interrupted", 130)
    sys.exit(0)


def _end(title: str | tuple[str, str], message: str, code: int, speaker: int = 0) -> NoReturn:
    if os.environ.get("RANK", "0") == str(speaker):
        _messages.print(Text.assemble(title, message))
    sys.exit(code)
