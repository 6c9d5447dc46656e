"""Which EXL3 layers use the kernels: those whose own tensors give the right answer there, and sooner.

Each form of layer is tried once, for one row and for many, against MLX's operations on the same tensors; what
fails, differs or is slower leaves the layer as it is. For the thread that owns MLX.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import mlx.core as mx
import numpy as np
from mlx import nn

from kernels import backend
from kernels import failure as failures
from kernels.exl3 import EXPERT_KERNELS, KERNELS, OPERATIONS, Choice, Exl3Linear, Exl3SwitchLinear
from kernels.measure import MIN_GAIN

logger = logging.getLogger(__name__)

TOLERANCE = {mx.float32: 1e-3, mx.float16: 1e-3, mx.bfloat16: 8e-3}  # of the largest number of an answer
FEW, SOME, MANY = 1, 8, 64  # rows that are tried
TOP_K = 4  # experts of a row that is tried
REPEATS = 5

Layer = Exl3Linear | Exl3SwitchLinear


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was found for one form of layer."""

    form: str
    num_layers: int
    choice: Choice
    error: float  # the largest of a trial, as a part of the largest number of an answer
    reason: str = ""  # why a kernel is not used, or not for all numbers of rows

    @property
    def line(self) -> str:
        """For a log."""
        used = [f"to {self.choice.max_rows} rows in place"] if self.choice.max_rows else []
        used += ["more by float16"] if self.choice.is_unpacked else []
        return f"{self.form}: {', '.join(used) or 'MLX'}{f' ({self.reason})' if self.reason else ''}"


def choose(
    modules: Iterable[nn.Module], dtype: mx.Dtype, on_step: Callable[[], None] = lambda: None
) -> list[Verdict]:
    """Sets the choice of every EXL3 layer in `modules`, whose tensors must be evaluated. dtype: of its rows.

    Empty where there are no such layers, or no backend for kernels. on_step is called after each trial.
    """
    if backend.current() is None:
        return []
    forms: dict[str, list[Layer]] = {}
    for module in modules:
        for _, layer in module.named_modules():
            if isinstance(layer, (Exl3Linear, Exl3SwitchLinear)):
                forms.setdefault(layer.form, []).append(layer)
    verdicts = []
    for form, layers in forms.items():
        verdict = replace(_judged(layers[0], dtype, on_step), form=form, num_layers=len(layers))
        for layer in layers:
            layer.choice = verdict.choice
        logger.info("kernels: %s", verdict.line)
        verdicts.append(verdict)
    return verdicts


def _judged(layer: Layer, dtype: mx.Dtype, on_step: Callable[[], None]) -> Verdict:
    """Of one layer; it is left with MLX's operations."""
    wanted = KERNELS if isinstance(layer, Exl3Linear) else EXPERT_KERNELS
    if isinstance(layer, Exl3SwitchLinear) and len(layer.kinds) > 1:
        wanted = replace(wanted, max_rows=0)
    chosen, worst, reasons = OPERATIONS, 0.0, []
    for rows, candidate, kept in _candidates(wanted):
        try:
            error, reason = _trial(layer, rows, candidate, dtype)
        except Exception as failure:  # border: a kernel that fails is one that is not used
            error, reason = 0.0, failures.line(failure)
            logger.warning("a kernel for %s failed", layer.form, exc_info=True)
        finally:
            layer.choice = OPERATIONS
        on_step()
        worst = max(worst, error)
        if reason:
            reasons.append(f"{rows} rows: {reason}")
        else:
            chosen = Choice(max(chosen.max_rows, kept.max_rows), chosen.is_unpacked or kept.is_unpacked)
    return Verdict("", 0, chosen, worst, "; ".join(reasons))


def _candidates(wanted: Choice) -> Iterator[tuple[int, Choice, Choice]]:
    """Rows to try with a choice, and what is kept where that is right and fast: the later the more."""
    if wanted.max_rows:
        in_place = Choice(wanted.max_rows)
        yield FEW, in_place, Choice(TOP_K if wanted == EXPERT_KERNELS else FEW)
        yield SOME, in_place, in_place
    unpacked = Choice(0, wanted.is_unpacked)
    yield MANY, unpacked, unpacked


def _trial(layer: Layer, rows: int, choice: Choice, dtype: mx.Dtype) -> tuple[float, str]:
    """The error of an answer, and why the kernels are not to be used; "" where they are."""
    x = mx.random.normal((rows, layer.input_dims), key=mx.random.key(rows)).astype(dtype)
    call = _call_of(layer, x)
    layer.choice = OPERATIONS
    expected = call().astype(mx.float32)
    layer.choice = choice
    found = call().astype(mx.float32)
    size = mx.maximum(mx.abs(expected).max(), 1e-30)
    error = float(np.array(mx.abs(found - expected).max() / size))
    if not error <= TOLERANCE[dtype]:  # NaN is none
        return error, f"off by {error:.2g} of the largest number"
    if backend.current() == "emulated":
        return error, ""
    own_s = _fastest_s(call)
    layer.choice = OPERATIONS
    gain = _fastest_s(call) / own_s
    return error, "" if gain >= MIN_GAIN else f"{gain:.2f} x as fast as MLX's operations"


def _call_of(layer: Layer, x: mx.array) -> Callable[[], mx.array]:
    """A call with rows x (rows, input_dims), each for TOP_K experts where there are such."""
    if isinstance(layer, Exl3Linear):
        return partial(layer, x)
    scores = mx.random.uniform(shape=(x.shape[0], layer.num_experts), key=mx.random.key(1))
    chosen = mx.argsort(scores, axis=-1)[:, : min(TOP_K, layer.num_experts)]
    mx.eval(x, chosen)
    return partial(layer, x[:, None, None], chosen)


def _fastest_s(call: Callable[[], mx.array]) -> float:
    mx.eval(call())
    took = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        mx.eval(call())
        took.append(time.perf_counter() - started)
    return min(took)
