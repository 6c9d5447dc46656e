"""Rungs 5 and 6: every case on the GPU of this machine, Metal or CUDA, against the reference on the CPU."""

from __future__ import annotations

import time
from dataclasses import dataclass

import mlx.core as mx

from kernels.ladder.case import Case, as_list, relative_error

NUM_RUNS = 20


@dataclass(frozen=True, slots=True)
class Result:
    case: Case
    error: float
    time_ms: float  # of one run, the median of several that each wait for the GPU
    trouble: str = ""


def on_gpu(case: Case) -> Result:
    """Compiles and runs the case twice for its bits, then for its time."""
    arrays = list(case.inputs())
    with mx.stream(mx.cpu):
        wanted = as_list(case.reference(*arrays))
        mx.eval(wanted)
    first, second = as_list(case.run(*arrays)), as_list(case.run(*arrays))
    mx.eval(first, second)
    error = max(relative_error(a, b) for a, b in zip(first, wanted, strict=True))
    same = all(mx.array_equal(a, b, equal_nan=True).item() for a, b in zip(first, second, strict=True))
    exact = all(mx.array_equal(a, b).item() for a, b in zip(first, wanted, strict=True))
    if not same:
        trouble = "two runs differ"
    elif case.is_exact and not exact:
        trouble = "not the reference's bits"
    elif not error <= case.tolerance:
        trouble = f"off by {error:.1e} of the largest value, {case.tolerance:.0e} is allowed"
    else:
        trouble = ""
    return Result(case, error, _time_ms(case, arrays), trouble)


def _time_ms(case: Case, arrays: list[mx.array]) -> float:
    times = []
    for _ in range(NUM_RUNS):
        start = time.perf_counter()
        mx.eval(as_list(case.run(*arrays)))
        times.append(time.perf_counter() - start)
    return sorted(times)[NUM_RUNS // 2] * 1e3
