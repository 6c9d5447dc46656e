"""Rung 3: the generated source itself, thread by thread on a CPU, against the reference.

A sanitizer has to be in the process before all else: `sanitized` starts the same command again with it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import mlx.core as mx

from kernels import backend
from kernels.emulator import build, launch
from kernels.ladder.case import Case, as_list, relative_error

MAX_REQUESTED = 1.3  # bytes requested of the weights over the different ones among them
Sanitizer = Literal["address", "thread"]
_SUPPRESSIONS = "called_from_lib:libmlx.so\nrace:libmlx\nrace:mlx/core\nrace:pthread_cond\ndeadlock:libmlx\n"


@dataclass(frozen=True, slots=True)
class Result:
    """What a case came to. `trouble` is empty where all is well."""

    case: Case
    num_launches: int
    error: float  # the largest of all outputs
    requested: float | None  # of the weights, over the different bytes among them
    trouble: str = ""


def emulate(case: Case, mode: build.Mode = "watched") -> Result:
    """In three orders of threads, the first twice: all bits must be the same. Once with a sanitizer."""
    arrays = list(case.inputs())
    with mx.stream(mx.cpu):  # where no product of float32 is rounded to less
        wanted = as_list(case.reference(*arrays))
        mx.eval(wanted)
    # A sanitizer looks at every order at once
    orders = (*launch.ORDERS, launch.ORDERS[0]) if mode == "watched" else launch.ORDERS[:1]
    runs: list[list[mx.array]] = []
    launches: list[launch.Launch] = []
    try:
        with backend.forced("emulated"):
            for order in orders:
                with launch.options(order=order, seed=len(runs) + 1, mode=mode) as log:
                    runs.append(as_list(case.run(*arrays)))
                    mx.eval(runs[-1])
                launches = launches or log.launches
    except build.EmulatorError as trouble:
        return Result(case, len(launches), float("inf"), None, str(trouble))
    errors = [relative_error(a, b) for a, b in zip(runs[0], wanted, strict=True)]
    requested = _requested(case, launches)
    return Result(
        case, len(launches), max(errors), requested, _trouble(case, runs, wanted, max(errors), requested)
    )


def _trouble(
    case: Case, runs: list[list[mx.array]], wanted: list[mx.array], error: float, requested: float | None
) -> str:
    for other in runs[1:]:
        if not all(_same_bits(a, b) for a, b in zip(runs[0], other, strict=True)):
            return "the bits depend on the order of threads"
    if case.is_exact and not all(_same_bits(a, b) for a, b in zip(runs[0], wanted, strict=True)):
        return "not the reference's bits"
    if not error <= case.tolerance:
        return f"off by {error:.1e} of the largest value, {case.tolerance:.0e} is allowed"
    if requested is not None and requested > MAX_REQUESTED:
        return f"asks for {requested:.2f} times the bytes of its weights"
    return ""


def _same_bits(a: mx.array, b: mx.array) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bool(mx.array_equal(_bits(a), _bits(b)).item())


def _bits(a: mx.array) -> mx.array:
    return a.reshape(-1).view(mx.uint8) if a.dtype != mx.bool_ else a.reshape(-1)


def _requested(case: Case, launches: Sequence[launch.Launch]) -> float | None:
    traffic = [entry.traffic[name] for entry in launches for name in case.once if name in entry.traffic]
    touched = sum(t.touched_bytes for t in traffic)
    return sum(t.requested_bytes for t in traffic) / touched if touched else None


def runtime(sanitizer: Sanitizer) -> str | None:
    """What is to be loaded first for the sanitizer; None where the compiler has none."""
    path = build.compiler()
    if path is None or sys.platform != "linux" or "clang" in os.path.realpath(path):
        return None
    own = {"address": "libasan.so", "thread": "libtsan.so"}[sanitizer]
    found = [
        _library(path, name) for name in (own, "libstdc++.so.6")
    ]  # it looks for exceptions when it starts
    return " ".join(found) if all(map(os.path.isabs, found)) else None


def _library(compiler: str, name: str) -> str:
    """Where it lies; the name alone where the compiler does not have it."""
    command = [compiler, f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def environment(sanitizer: Sanitizer) -> dict[str, str]:
    """Of a process that runs kernels with the sanitizer, which ends it with 66 at its first find."""
    library = runtime(sanitizer)
    assert library is not None
    folder = build.cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    suppressions = folder / "sanitizer.suppressions"
    suppressions.write_text(_SUPPRESSIONS, encoding="utf-8")
    return os.environ | {
        "LD_PRELOAD": library,
        "ASAN_OPTIONS": "detect_leaks=0:exitcode=66:detect_stack_use_after_return=0",
        "TSAN_OPTIONS": f"suppressions={suppressions}:exitcode=66:halt_on_error=1:"
        "ignore_noninstrumented_modules=1:report_signal_unsafe=0",
        "OMP_NUM_THREADS": "1",
    }


def sanitized(sanitizer: Sanitizer, arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """This ladder's `emulate ARGUMENTS` in a process with the sanitizer."""
    command = [sys.executable, "-m", "kernels.ladder", "emulate", *arguments, "--inside", sanitizer]
    env = environment(sanitizer)
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)
