"""What ends a script in one line; every part raises its own kinds of it, and cli.py prints them."""


class UserError(Exception):
    """Something that the user can mend; its message is one line that says how."""


class ExportError(UserError, ValueError):
    """A network cannot be written as asked; one line with the reason or the remedy."""


class StoppedError(Exception):
    """Training was asked to stop and has saved its state; the message says how to resume."""

    def __init__(self, message: str, exit_status: int):
        super().__init__(message)
        self.exit_status = exit_status
