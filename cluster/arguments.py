"""The argument parser of every command: a usage error ends with exit code 3 and one line."""

from __future__ import annotations

import argparse
from typing import NoReturn

from cluster.errors import EXIT_USAGE


class Parser(argparse.ArgumentParser):
    """argparse, but for the exit code and the length of its complaints."""

    def error(self, message: str) -> NoReturn:
        """Print one line and end the process."""
        self.exit(EXIT_USAGE, f"{self.prog}: {message}; see {self.prog} --help\n")
