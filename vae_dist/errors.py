"""The ends of a run that are no bugs. A command prints their message without a traceback.

An error of one process is printed by that process, with its rank and host. Only an error that is known to be raised on
every process is left to one of them.
"""

from typing import Self


class _EndError(Exception):
    reporting_rank: int | None = None  # the process that prints it for all of them; None: whichever raises it

    def on_every_process(self, reporting_rank: int = 0) -> Self:
        """This error, marked as one that every process of the run raises and that `reporting_rank` prints."""
        self.reporting_rank = reporting_rank
        return self


class UserError(_EndError):
    """Input that can't be used. The message is one line that says what to do; the exit code is 2."""


class RunError(_EndError):
    """The run can't go on. The message says why and what to do; the exit code is 1."""


class StoppedError(_EndError):
    """Somebody asked the run to stop, and it has saved what it had. The processes have agreed on that."""

    reporting_rank = 0

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code
