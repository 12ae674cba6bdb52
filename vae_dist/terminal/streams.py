"""stdout and stderr as streams that never fail and never block their caller for long.

Text that they can't take is dropped, characters that their encoding lacks are escaped, and markup is not interpreted.
"""

import io
import os
import select
import sys
from contextlib import suppress
from threading import Thread
from typing import IO, Any, cast

from rich.console import Console

from vae_dist.terminal.notebook import is_notebook

STALL_SECONDS = 2  # to wait, once, for a reader that has stopped reading
USUAL_COLUMNS, LEAST_COLUMNS = 80, 20  # of a terminal; in fewer, rich would leave out text without a word


class _Descriptor(io.RawIOBase):
    """The file descriptor of stdout or stderr. Text that it can't take is dropped."""

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
    """The current `sys.stdout` or `sys.stderr`, as a file that does not fail.

    A pipe without a reader, a closed terminal or a full disk loses text, and nothing else. A reader that has stopped
    reading, such as a terminal after Ctrl-S, blocks a thread of its own and not the caller.
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
        """Write, and wait at most `seconds` until it is written; None waits without a bound."""
        with suppress(Exception):  # it is missing, closed or full; a caller's can raise anything
            target = self._target()
            target.flush()  # earlier prints come first
            data = _encoded(text, self.encoding, getattr(target, "errors", None))
            if target is getattr(sys, f"__{self._name}__"):
                self._write_in_thread(target.fileno(), data, seconds)
            else:  # a caller's, such as a notebook's
                target.write(data.decode(self.encoding, "surrogateescape"))
                target.flush()

    def _write_in_thread(self, descriptor: int, data: bytes, seconds: float | None) -> None:
        if self._writing is not None:
            self._writing.join(0 if seconds is not None else None)
            if self._writing.is_alive():
                return
        self._writing = Thread(target=_write, args=[descriptor, data], daemon=True)
        try:
            self._writing.start()
        except RuntimeError:  # Python is exiting, or no more threads can be made
            _write(descriptor, data)
        else:
            self._writing.join(seconds)

    def _target(self) -> Any:
        # A notebook shows what is written to stderr as if it had failed.
        stream = getattr(sys, "stdout" if is_notebook() else self._name)
        return getattr(stream, "rich_proxied_file", stream)  # while a bar is shown, rich redirects prints


def _encoded(text: str, encoding: str, errors: str | None) -> bytes:
    try:
        return text.encode(encoding, errors or "strict")
    except UnicodeError:
        return text.encode(encoding, "backslashreplace")


def _write(descriptor: int, data: bytes) -> None:
    """Write everything, or as much as possible."""
    with suppress(OSError):
        while data:
            try:
                data = data[os.write(descriptor, data) :]
            except BlockingIOError:  # another process has made it non-blocking
                select.select([], [descriptor], [])


def _width() -> int | None:
    """Return the usual columns if COLUMNS says too few, such as 0 for unknown; None to let rich look."""
    columns = os.environ.get("COLUMNS", "")
    return USUAL_COLUMNS if columns.isdecimal() and int(columns) < LEAST_COLUMNS else None


stdout = _Stream("stdout")
messages, results = (
    Console(
        file=cast(IO[str], stream),
        width=_width(),
        soft_wrap=True,
        highlight=False,
        markup=False,
        emoji=False,
        force_jupyter=False,  # a notebook gets the text
        force_terminal=False if is_notebook() else None,  # a kernel sets FORCE_COLOR, which counts as a terminal
    )
    for stream in (_Stream("stderr"), stdout)
)


def say(text: str) -> None:
    """Print a command's output, however long the reader takes."""
    stdout.put(f"{text.rstrip()}\n", None)


def guard_standard_streams() -> None:
    """Keep prints of libraries, and of Python at exit, from failing, as ours do not fail."""
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
