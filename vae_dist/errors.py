"""Errors that are not bugs. A command prints their message without a traceback.

An error of one process is printed by that process, with its rank and host. An error that is known to be raised on every
process is printed by one of them.
"""

from typing import Self


class _EndError(Exception):
    reporting_rank: int | None = None  # the process that prints it for all of them; None: each that raises it

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
