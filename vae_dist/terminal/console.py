"""Messages on stderr and in `log.txt`, and the exit codes of commands.

`log.txt` gets every message, even if the terminal is gone.
"""

import logging
import os
import platform
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn, Protocol

from rich.text import Text

from vae_dist.errors import RunError, StoppedError, UserError, plain
from vae_dist.terminal.notebook import is_notebook
from vae_dist.terminal.streams import guard_standard_streams, messages

logger = logging.getLogger("vae_dist")

PROGRESS = "vae_dist.progress"  # the logger of progress lines
KEPT_MESSAGES = 1000  # of those logged before their destination is known


class Process(Protocol):
    """This process among those of its run, as messages need it."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    def should_log(self, text: str) -> bool: ...


class _Formatter(logging.Formatter):
    def formatMessage(self, record: logging.LogRecord) -> str:
        return plain(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:
        return "\n".join(map(plain, super().formatException(ei).splitlines()))


class _ConsoleHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        is_warning = record.levelno >= logging.WARNING
        place = f"{_place()}: " if is_warning and _rank_and_size()[0] > 0 else ""
        messages.print(Text(place + self.format(record), style="bold yellow" if is_warning else ""))


class _Memory(logging.Handler):
    """Keeps messages until their destination is known."""

    def __init__(self) -> None:
        super().__init__()
        self._records: deque[logging.LogRecord] = deque(maxlen=KEPT_MESSAGES)

    def emit(self, record: logging.LogRecord) -> None:
        self._records.append(record)

    def flush_to(self, handle: Callable[[logging.LogRecord], object]) -> None:
        while self._records:
            handle(self._records.popleft())


class _LogFile(logging.FileHandler):
    """The handler of `log.txt`. If the file can't be written, it logs one warning."""

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


_unshown = _Memory()  # logged before this process's rank is known
_unlogged = _Memory()  # logged by the main process before `log.txt` is opened
_process: Process | None = None
_starts = 0


def start(process: Process) -> None:
    """Show messages on the terminal: all of the main process's, and the warnings that only another process logs."""
    global _process, _starts
    _process, _starts = process, _starts + 1
    _unlogged.flush_to(lambda record: None)  # of an earlier run in this process
    _show(process.rank == 0, _unlogged)


def start_alone() -> None:
    """Show messages on the terminal in a command whose processes never join, if there are several."""
    _show(_rank_and_size()[0] == 0)


def _show(is_main: bool, *others: logging.Handler) -> None:
    handler = _ConsoleHandler()
    handler.setFormatter(_Formatter())
    handler.setLevel(logging.INFO if is_main else logging.WARNING)
    handler.addFilter(_is_shown)
    _install(handler, *others)
    _unshown.flush_to(logger.handle)


def _install(*handlers: logging.Handler) -> None:
    logger.handlers = list(handlers)
    logger.propagate = False
    logger.setLevel(logging.INFO)


def _is_shown(record: logging.LogRecord) -> bool:
    if record.name == PROGRESS and (messages.is_terminal or is_notebook()):
        return False  # the bar shows the same
    key = f"{_starts} {record.getMessage()}"
    return record.levelno < logging.WARNING or _process is None or _process.should_log(key)


@contextmanager
def logged_to(path: Path) -> Iterator[None]:
    """Append all messages to a file too, from `start` on."""
    handler = _LogFile(path, encoding="utf-8", errors="backslashreplace", delay=True)
    handler.setFormatter(_Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    logger.removeHandler(_unlogged)
    _unlogged.flush_to(handler.handle)
    logger.addHandler(handler)
    try:
        yield
    except Exception as error:  # `run` prints it on the terminal, or Python does
        level = logging.WARNING if isinstance(error, StoppedError) else logging.ERROR
        is_bug = not isinstance(error, UserError | RunError | StoppedError)
        trace = (type(error), error, error.__traceback__) if is_bug else None
        handler.handle(logger.makeRecord(logger.name, level, "", 0, "%s", (error,), trace))
        raise
    finally:
        logger.removeHandler(handler)
        with suppress(OSError):
            handler.close()


def run(command: Callable[[], None]) -> NoReturn:
    """Run a command and exit with 0, or 2 for unusable input, 1 for a failed run, 130 or 143 after a request to stop.

    Each of these prints one message and no traceback. A message that can't be printed does not change the exit code.
    """
    guard_standard_streams()
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # torch prints a stack trace for each attempt to connect
    for request in (signal.SIGHUP, signal.SIGUSR1):  # outside of a training, which saves first
        if signal.getsignal(request) is signal.SIG_DFL:
            signal.signal(request, lambda number, frame: os._exit(143))
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
            messages.print(f"{_place()} has failed:")
        if _is_in_group():
            sys.excepthook(*sys.exc_info())
            _exit(1)
        raise
    _show_kept()
    sys.exit(0)


def _end(title: str, message: str | Exception, code: int, reporting_rank: int | None) -> NoReturn:
    """Exit with a message. One process prints it for all if they end alike; otherwise each prints its own."""
    _show_kept()
    rank, size = _rank_and_size()
    if reporting_rank is None and size > 1 and _process is None and isinstance(message, Exception):
        from vae_dist.distributed import failures

        reporting_rank = 0 if failures.all_fail_alike(message) else None
    if size == 1 or reporting_rank in (None, rank):
        place = f"{_place()}: " if reporting_rank is None and size > 1 else ""
        messages.print(Text.assemble((title, "bold red"), plain(f"{place}{message}")))
    _exit(code)


def _exit(code: int) -> NoReturn:
    """Exit; without Python's own end if this process could not leave its group: it would wait for the others there."""
    if _is_in_group():
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)
    sys.exit(code)


def _is_in_group() -> bool:
    """Return whether this process is still in a group of processes, see `caller`: after an error, on GPUs."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def _show_kept() -> None:
    """Show messages from before the processes joined, if they never did."""
    handler = _ConsoleHandler()
    handler.setFormatter(_Formatter())
    _unshown.flush_to(handler.handle)


def _rank_and_size() -> tuple[int, int]:
    """Return this process's rank and the number of processes: the launcher's, if they have not joined yet."""
    if _process is not None:
        return _process.rank, _process.size
    rank, size = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE"))
    return (int(rank), int(size)) if rank.isdecimal() and size.isdecimal() and int(size) > 1 else (0, 1)


def _place() -> str:
    """Return this process's rank and host as text; empty for a single process."""
    rank, size = _rank_and_size()
    return f"process {rank} of {size} on {platform.node()}" if size > 1 else ""
