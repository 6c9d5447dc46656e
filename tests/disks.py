"""A small file system of its own, which fills up soon. Needs root on Linux; skipped elsewhere."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: int = 1) -> Iterator[None]:
    """`folder` is one, until the block ends."""
    if shutil.which("mount") is None:
        pytest.skip("mount is not installed")
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("no file system of our own may be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)
