"""Where this user's caches lie: proofs of cuts, shards, measured speeds. Any thread."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def user_cache_dir() -> Path:
    """Where this user's programs cache: XDG_CACHE_HOME, else as the system has it."""
    given = os.environ.get("XDG_CACHE_HOME")
    if given:
        return Path(given) / "macrame"
    home = Path.home()
    return (home / "Library" / "Caches" if sys.platform == "darwin" else home / ".cache") / "macrame"


def verdict_folder() -> Path:
    """Where verdicts on kernels are kept."""
    return user_cache_dir() / "kernels"
