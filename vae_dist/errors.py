"""The one exception that is the user's to fix."""


class UserError(Exception):
    """Input that can't be used. The message is one line that says what to do; a door prints it and exits with 2."""
