"""The sources of a case's kernels, with no GPU: MLX prints them while a function is exported, and runs none.

For commands and tests: what MLX prints goes to the file descriptor of standard output, which is caught for as
long as that takes.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx

from kernels import backend
from kernels.ladder.case import Case, as_list
from kernels.source import Call, recorded, shown

_PRINTED = re.compile(r"Generated source code for `(\w+)`:\n```\n(.*?)\n```\n", flags=re.S)


def traced(case: Case) -> list[tuple[Call, str]]:
    """Each launch of the case and the source that MLX would hand to Metal for it."""
    arrays = list(case.inputs())
    mx.eval(arrays)
    with backend.forced("metal"), recorded() as calls, shown():
        text = _printed(lambda: _export(case, arrays))
    sources = _PRINTED.findall(text)
    names = [call.kernel.name for call in calls]
    if [name for name, _ in sources] != names:
        raise RuntimeError(f"{case.name}: MLX printed {[name for name, _ in sources]}, launched were {names}")
    return [(call, source) for call, (_, source) in zip(calls, sources, strict=True)]


def _export(case: Case, arrays: list[mx.array]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "case.mlxfn")
        mx.export_function(path, lambda *given: as_list(case.run(*given)), *arrays)


def _printed(act: Callable[[], None]) -> str:
    """What `act` prints in C and C++."""
    sys.stdout.flush()
    with tempfile.TemporaryFile() as caught:
        before = os.dup(1)
        os.dup2(caught.fileno(), 1)
        try:
            act()
        finally:
            ctypes.CDLL(None).fflush(None)
            os.dup2(before, 1)
            os.close(before)
        caught.seek(0)
        return caught.read().decode()
