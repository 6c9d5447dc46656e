"""The test that kernels pass before a node uses them: right beside the reference, and faster than MLX.

Each form of block among a shard's layers is tried with the shard's own weights, by classes of token counts; a
class keeps the kernels only where they were right and faster at both of its ends. Whatever goes wrong means
MLX's operations, with a reason. One thread, the one that owns MLX.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx import nn

from kernels import backend, measure
from kernels.moe_spec import BlockSpec, Format
from kernels.switch import taken_of
from kernels.verdicts import Verdict, Verdicts, this_machine

logger = logging.getLogger(__name__)

# The first and last number of tokens; 0: no end. Sizes at which a class is tried: both ends.
CLASSES = ((1, 1), (2, 4), (5, 8), (9, 16), (17, 32), (33, 63), (64, 0))
ENDLESS = 256  # tokens that stand for the end of a class without one
MIN_GAIN = 1.02  # less is noise, and MLX's operations are kept
BUDGET_S = 20.0  # no further class is begun after so long
NO_TIME = "there was no time to test it"


@dataclass(frozen=True, slots=True)
class Tested:
    """Decides for layers of one form by its verdicts."""

    spec: BlockSpec
    verdicts: tuple[Verdict, ...]

    def takes(self, spec: BlockSpec, num_tokens: int) -> bool:
        return spec == self.spec and any(v.is_taken and v.covers(num_tokens) for v in self.verdicts)


@dataclass(slots=True)
class Report:
    """What a self-test found. blocks: by the form's description; reasons: of layers that no kernel knows."""

    backend: str
    num_layers: int
    blocks: dict[str, tuple[Verdict, ...]] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)
    num_tested: int = 0  # forms; of the others the verdicts were kept
    took_s: float = 0.0

    @property
    def is_used(self) -> bool:
        """Whether any layer uses kernels for any number of tokens."""
        return any(one.is_taken for verdicts in self.blocks.values() for one in verdicts)


def self_test(
    layers: Sequence[nn.Module],
    folder: Path | None,
    *,
    budget_s: float = BUDGET_S,
    on_step: Callable[[], None] = lambda: None,
) -> Report:
    """Test the forms of layers that `switch.take_over` took, and let the verdicts decide for each.

    folder: where verdicts are kept; None: nowhere. The layers must have been called once, so that they know
    their forms. on_step is called after each piece of work, of a second at most on a GPU.
    """
    where = backend.current()
    if where is None:
        return Report("", len(layers))
    started = time.monotonic()
    verdicts = Verdicts(folder, this_machine(where))
    report = Report(where, len(layers))
    for (spec, name), members in _by_form(layers, report).items():
        found = verdicts.find(name)
        if found is None:
            left_s = budget_s - (time.monotonic() - started)
            found = judge(spec, members, is_timed=where != "emulated", budget_s=left_s, on_step=on_step)
            report.num_tested += 1
            if all(one.reason != NO_TIME for one in found):
                verdicts.keep(name, found)
        report.blocks[name] = found
        _log(name, found)
        for layer in members:
            taken = taken_of(layer)
            assert taken is not None
            taken.choose(Tested(spec, found))
    report.took_s = time.monotonic() - started
    return report


def _by_form(layers: Iterable[nn.Module], report: Report) -> dict[tuple[BlockSpec, str], list[nn.Module]]:
    """The layers of each form; why others have none goes into the report."""
    found: dict[tuple[BlockSpec, str], list[nn.Module]] = {}
    for layer in layers:
        taken = taken_of(layer)
        if taken is None:
            continue
        for spec in taken.forms[:1]:  # a model calls a layer in one way
            found.setdefault((spec, describe(spec, layer)), []).append(layer)
        report.reasons += [reason for reason in taken.reasons if reason not in report.reasons]
    return found


def judge(
    spec: BlockSpec,
    layers: Sequence[Any],
    *,
    is_timed: bool,
    budget_s: float = BUDGET_S,
    on_step: Callable[[], None] = lambda: None,
) -> tuple[Verdict, ...]:
    """A verdict for each class. Without timing, what is right is taken."""
    deadline = time.monotonic() + budget_s
    found = []
    for first, last in CLASSES:
        if time.monotonic() > deadline:
            found.append(Verdict(first, last, False, NO_TIME))
            continue
        try:
            found.append(_judge_class(spec, layers, (first, last), is_timed, on_step))
        except Exception as error:  # border: a kernel that cannot be compiled or run is one that is not used
            logger.info("a kernel failed for %d to %d tokens", first, last, exc_info=True)
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]
            found.append(Verdict(first, last, False, reason))
    return tuple(found)


def _judge_class(
    spec: BlockSpec,
    layers: Sequence[Any],
    ends: tuple[int, int],
    is_timed: bool,
    on_step: Callable[[], None],
) -> Verdict:
    first, last = ends
    sizes = sorted({first, last or (ENDLESS if is_timed else first)})
    worst, num_launches = 0.0, 0
    for num_tokens in sizes:
        error, num_launches = measure.error_of(spec, layers[0], num_tokens)
        worst = max(worst, error)
        on_step()
    limit = measure.TOLERANCE[spec.dtype]
    if worst > limit:
        reason = f"wrong by {worst:.1e} of the largest value; {limit:.0e} is allowed"
        return Verdict(first, last, False, reason, _finite(worst), num_launches=num_launches)
    if not is_timed:
        return Verdict(first, last, True, error=worst, num_launches=num_launches)
    times = min(
        (measure.times_of(spec, layers, size, on_step) for size in sizes), key=lambda times: times.ratio
    )
    is_faster = times.ratio >= MIN_GAIN
    return Verdict(
        first,
        last,
        is_faster,
        "" if is_faster else f"{times.ratio:.2f} times as fast as MLX's operations",
        error=worst,
        ours_us=times.ours_us,
        mlx_us=times.mlx_us,
        gb_s=times.gb_s,
        num_launches=num_launches,
    )


def _finite(error: float) -> float:
    return min(error, 1e30)  # JSON has no infinity


def describe(spec: BlockSpec, layer: Any) -> str:
    """A form of block in a line; different forms have different ones."""
    parts = [
        f"{name} {_format(form, layer[f'{name}_proj'])}"
        for name, form in (("gate", spec.gate), ("up", spec.up), ("down", spec.down))
    ]
    activation = spec.activation
    kind = activation.kind
    if kind not in ("swiglu", "geglu"):
        kind += f" {activation.alpha:g} {activation.limit:g}"
    dtype = str(spec.dtype).removeprefix("mlx.core.")
    return (
        f"{spec.top_k} of {spec.num_experts} experts, {spec.hidden_size} x {spec.expert_size}, "
        f"{', '.join(parts)}, {kind}, {dtype}"
    )


def _format(form: Format, projection: Any) -> str:
    stored = projection.get("scales")
    dtype = str((projection["weight"] if stored is None else stored).dtype).removeprefix("mlx.core.")
    name = dtype if form.mode == "plain" else f"{form.mode}{form.bits}/{form.group_size} ({dtype})"
    return name + (" with bias" if projection.get("bias") is not None else "")


def _log(name: str, verdicts: Iterable[Verdict]) -> None:
    for one in verdicts:
        size = (
            f"{one.first} tokens" if one.first == one.last else f"{one.first} to {one.last or '...'} tokens"
        )
        if one.is_taken:
            logger.info("kernels for %s (%s): error %.1e, %.2f x MLX", size, name, one.error, one.ratio)
        else:
            logger.info("MLX's operations for %s (%s): %s", size, name, one.reason)
