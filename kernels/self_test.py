"""The test that kernels pass before a node uses them: right beside the reference, and faster than MLX.

Each form of block or matrix among a shard's layers (a Subject) is tried with the shard's own weights, by
classes of token counts; a class keeps the kernels only where they were right and faster at both of its ends.
Whatever goes wrong means MLX's operations, with a reason. One thread, the one that owns MLX.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mlx import nn

from kernels import backend, measure
from kernels import failure as failures
from kernels.exl3_subject import exl3_subjects
from kernels.exl3_trials import Exl3Layer
from kernels.expert_subject import expert_subjects
from kernels.measure import MIN_GAIN, Subject, Times, Used
from kernels.verdicts import Verdict, Verdicts, this_machine

logger = logging.getLogger(__name__)

ENDLESS = 256  # tokens that stand for the end of a class without one
BUDGET_S = 20.0  # no further class is begun after so long
EMULATED_BUDGET_S = 300.0  # in tests, whose machines have other things to do
MAX_ERROR = 1e30  # JSON has no infinity
NO_KERNEL = "there are no kernels for so many"
NO_TIME = "there was no time to test it"


@dataclass(slots=True)
class Report:
    """What a self-test found. blocks: by the form's description; reasons: of layers that no kernel knows."""

    backend: str
    num_layers: int  # of experts
    blocks: dict[str, tuple[Verdict, ...]] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)
    num_tested: int = 0  # forms; of the others the verdicts were kept
    took_s: float = 0.0
    taken: list[Used] = field(default_factory=list)  # what the layers do from then on
    num_matrices: int = 0  # of EXL3

    @property
    def num_calls(self) -> int:
        """Blocks and matrices that the kernels computed; any thread."""
        return sum(one.num_calls for one in self.taken)

    @property
    def failures(self) -> list[str]:
        """Why layers gave the kernels up meanwhile; any thread."""
        return sorted({one.failure for one in self.taken if one.failure})

    @property
    def is_used(self) -> bool:
        """Whether any layer uses kernels for any number of tokens."""
        return any(one.is_taken for verdicts in self.blocks.values() for one in verdicts)


def self_test(
    layers: Sequence[nn.Module],
    folder: Path | None,
    *,
    matrices: Sequence[Exl3Layer] = (),
    on_step: Callable[[], None] = lambda: None,
) -> Report:
    """Test the forms of layers that `switch.take_over` took, and of EXL3 matrices; the verdicts decide then.

    folder: where verdicts are kept; None: nowhere. Layers and matrices must have been called once, so that
    they know their forms. on_step is called after each piece of work.
    """
    where = backend.current()
    report = Report(where or "", len(layers), num_matrices=len(matrices))
    if where is None:
        return report
    started = time.monotonic()
    budget_s = EMULATED_BUDGET_S if where == "emulated" else BUDGET_S
    verdicts = Verdicts(folder, this_machine(where))
    experts, report.reasons = expert_subjects(layers)
    subjects: list[Subject] = [*experts, *exl3_subjects(matrices)]
    for subject in subjects:
        found = verdicts.find(subject.name) or ()
        if len(found) < len(subject.classes):
            left_s = budget_s - (time.monotonic() - started)
            is_timed = where != "emulated"
            found = judge(subject, kept=found, is_timed=is_timed, budget_s=left_s, on_step=on_step)
            report.num_tested += 1
            verdicts.keep(subject.name, [one for one in found if one.is_final])
        report.blocks[subject.name] = found
        _log(subject.name, found)
        report.taken += subject.use(found)
    report.took_s = time.monotonic() - started
    return report


@dataclass(frozen=True, slots=True)
class Trial:
    """What one number of tokens gave. times: None where nothing is timed; failure: empty where it ran."""

    num_tokens: int
    error: float = 0.0
    num_launches: int = 0
    times: Times | None = None
    failure: str = ""
    is_final: bool = True  # False: an exception, which may not come again

    @property
    def ratio(self) -> float:
        return 0.0 if self.times is None else self.times.ratio


def try_size(
    subject: Subject, num_tokens: int, *, is_timed: bool, on_step: Callable[[], None] = lambda: None
) -> Trial:
    """Compare with the reference, and time what is right. Raises nothing of what a kernel may raise."""
    try:
        error, num_launches = measure.error_of(subject, num_tokens)
        on_step()
        if error > (limit := subject.tolerance):
            failure = f"wrong by {error:.1e} of the largest value; {limit:.0e} is allowed"
            return Trial(num_tokens, min(error, MAX_ERROR), num_launches, failure=failure)
        times = measure.times_of(subject, num_tokens, on_step) if is_timed else None
        return Trial(num_tokens, error, num_launches, times)
    except Exception as error:  # border: a kernel that cannot be compiled or run is one that is not used
        logger.info("a kernel failed for %d tokens", num_tokens, exc_info=True)
        return Trial(num_tokens, failure=failures.line(error)[:400], is_final=False)


def decide(first: int, last: int, trials: Sequence[Trial]) -> Verdict:
    """Of the trials at a class' sizes: all must be right, and the least gain counts."""
    worst = max(trials, key=lambda trial: trial.error)
    failure = next((trial.failure for trial in trials if trial.failure), "")
    if failure:
        is_final = all(trial.is_final for trial in trials)
        return Verdict(
            first, last, False, failure, worst.error, num_launches=worst.num_launches, is_final=is_final
        )
    slowest = min(trials, key=lambda trial: trial.ratio)
    if slowest.times is None:
        return Verdict(first, last, True, error=worst.error, num_launches=worst.num_launches)
    is_faster = slowest.ratio >= MIN_GAIN
    return Verdict(
        first,
        last,
        is_faster,
        "" if is_faster else f"{slowest.ratio:.2f} times as fast as MLX's operations",
        error=worst.error,
        ours_us=slowest.times.ours_us,
        mlx_us=slowest.times.mlx_us,
        gb_s=slowest.times.gb_s,
        num_launches=slowest.num_launches,
    )


def sizes_of(first: int, last: int, *, is_timed: bool) -> list[int]:
    """The numbers of tokens at which a class is tried."""
    return sorted({first, last or (ENDLESS if is_timed else first)})


def judge(
    subject: Subject,
    *,
    is_timed: bool,
    kept: Sequence[Verdict] = (),
    budget_s: float = BUDGET_S,
    on_step: Callable[[], None] = lambda: None,
) -> tuple[Verdict, ...]:
    """A verdict for each class; those in `kept` stand. Without timing, what is right is taken."""
    deadline = time.monotonic() + budget_s
    known = {one.first: one for one in kept}
    found = []
    for first, last in subject.classes:
        if first in known:
            found.append(known[first])
            continue
        if not subject.has_kernels(first):
            found.append(Verdict(first, last, False, NO_KERNEL))
            continue
        if time.monotonic() > deadline:
            found.append(Verdict(first, last, False, NO_TIME, is_final=False))
            continue
        sizes = sizes_of(first, last, is_timed=is_timed)
        trials = [try_size(subject, size, is_timed=is_timed, on_step=on_step) for size in sizes]
        found.append(decide(first, last, trials))
    return tuple(found)


def _log(name: str, verdicts: Iterable[Verdict]) -> None:
    for one in verdicts:
        size = (
            f"{one.first} tokens" if one.first == one.last else f"{one.first} to {one.last or '...'} tokens"
        )
        if one.is_taken:
            logger.info("kernels for %s (%s): error %.1e, %.2f x MLX", size, name, one.error, one.ratio)
        else:
            logger.info("MLX's operations for %s (%s): %s", size, name, one.reason)
