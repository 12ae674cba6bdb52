"""Errors that are not bugs. A command prints their message without a traceback.

An error of one process is printed by that process, with its rank and host. An error that is known to be raised on every
process is printed by one of them.
"""

import re
from typing import Self

# Controls, lone surrogates, line ends, and marks that change the direction of writing: a terminal obeys them, or can't
# show them.
UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def plain(text: object) -> str:
    """Return text as one line, with its characters of UNPRINTABLE spelled out."""
    return UNPRINTABLE.sub(lambda match: ascii(match[0])[1:-1], str(text))


class _EndError(Exception):
    reporting_rank: int | None = None  # the process that prints it for all of them; None: each that raises it

    def __str__(self) -> str:
        """Return the message as one plain line: Python prints it too, and a name in it may come from others."""
        return plain(super().__str__())

    def on_every_process(self, reporting_rank: int = 0) -> Self:
        """Mark this error as one that every process of the run raises and `reporting_rank` prints."""
        self.reporting_rank = reporting_rank
        return self


class UserError(_EndError):
    """Input that can't be used. The message is one line that says what to do; the exit code is 2."""


class RunError(_EndError):
    """A run that can't continue. The message says why and what to do; the exit code is 1."""


class StoppedError(_EndError):
    """The run was asked to stop and has saved its state. All processes raise this together."""

    reporting_rank = 0

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code
