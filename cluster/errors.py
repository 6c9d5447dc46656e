"""Exit codes of every command, and the error whose message is all that its user needs to read."""

from __future__ import annotations

EXIT_OK = 0
EXIT_ERROR = 1
EXIT_DOES_NOT_FIT = 2
EXIT_USAGE = 3
EXIT_UNREACHABLE = 4


class UserError(Exception):
    """One plain sentence that says what is wrong and what to do, with the exit code it ends with."""

    def __init__(self, message: str, exit_code: int = EXIT_ERROR) -> None:
        super().__init__(message)
        self.exit_code = exit_code
