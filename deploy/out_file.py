"""The file that a command is to write: what is in its way is told before the work, not after."""

from __future__ import annotations

import os
from pathlib import Path

from cluster.errors import EXIT_USAGE, UserError


def check_out_file(path: Path, option: str) -> None:
    """Raises UserError where `path`, the value of `option`, is clearly no file that may be written."""
    folder = path.absolute().parent
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: give another {option}", EXIT_USAGE)
    if path.is_dir():
        raise UserError(f"{path} is a folder: give {option} the path of a file", EXIT_USAGE)
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise UserError(f"{path} may not be written: give another {option}", EXIT_USAGE)
