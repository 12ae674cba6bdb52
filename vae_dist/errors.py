"""The ends of a run that are no bugs. A door prints their message without a traceback, from one process alone."""


class UserError(Exception):
    """Input that can't be used. The message is one line that says what to do; the exit code is 2."""


class RunError(Exception):
    """The run can't go on. The message says why and what to do; the exit code is 1."""

    speaker = 0  # the process that prints it


class StoppedError(Exception):
    """Somebody asked the run to stop, and it has saved what it had."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code
