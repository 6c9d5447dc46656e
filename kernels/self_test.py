"""The test that kernels pass before a node uses them: right beside the reference, and faster than MLX.

Each form of block or matrix among a shard's layers (a Subject) is tried with the shard's own weights, by
classes of token counts; a class keeps the kernels only where they were right and faster at both of its ends.
Whatever goes wrong means MLX's operations, with a reason. A start tests for some time only, the classes of
one token first; the others wait until the node has nothing to do (`try_next`). One thread, the one that owns
MLX.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mlx import nn

from kernels import backend, measure
from kernels import failure as failures
from kernels.exl3_subject import exl3_subjects
from kernels.exl3_trials import Exl3Layer
from kernels.expert_subject import expert_subjects
from kernels.measure import MIN_GAIN, Subject, Times, Used
from kernels.shared_subject import shared_subjects
from kernels.verdicts import NOT_YET, Timed, Verdict, Verdicts, this_machine

logger = logging.getLogger(__name__)

ENDLESS = 256  # tokens that stand for the end of a class without one
BUDGET_S = 20.0  # of a start: no further class is begun after so long
EMULATED_BUDGET_S = 300.0  # in tests, whose machines have other things to do
MAX_ERROR = 1e30  # JSON has no infinity
NO_KERNEL = "there are no kernels for so many"


class WantedElsewhereError(Exception):
    """Raised by on_step: there is something else to do now. The class that is being tried stays untested."""


@dataclass(frozen=True, slots=True)
class Untested:
    """A class of a subject without a verdict."""

    subject: Subject
    first: int
    last: int


@dataclass(slots=True)
class Report:
    """What a self-test found. blocks: by the form's description; reasons: of layers that no kernel knows."""

    backend: str
    num_layers: int  # of experts
    blocks: dict[str, tuple[Verdict, ...]] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)
    tested: set[str] = field(default_factory=set)  # forms; of the others the verdicts were kept
    took_s: float = 0.0
    taken: list[Used] = field(default_factory=list)  # what the layers do from then on
    num_matrices: int = 0  # of EXL3
    untested: list[Untested] = field(default_factory=list)  # what there was no time for, in order
    kept: Verdicts | None = None

    @property
    def num_tested(self) -> int:
        """Forms of which a class was tried here."""
        return len(self.tested)

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
        """Whether any layer uses kernels for any number of tokens, or may yet."""
        verdicts = [one for found in self.blocks.values() for one in found]
        return any(one.is_taken for one in verdicts) or bool(self.untested)


def self_test(
    layers: Sequence[nn.Module],
    folder: Path | None,
    *,
    matrices: Sequence[Exl3Layer] = (),
    budget_s: float | None = None,
    on_step: Callable[[], None] = lambda: None,
) -> Report:
    """Test the forms of layers that `switch.take_over` took, and of EXL3 matrices; the verdicts decide then.

    folder: where verdicts are kept; None: nowhere. Layers and matrices must have been called once, so that
    they know their forms. on_step is called after each piece of work. budget_s: None for what a start takes.
    """
    where = backend.current()
    report = Report(where or "", len(layers), num_matrices=len(matrices))
    if where is None:
        return report
    if budget_s is None:
        budget_s = EMULATED_BUDGET_S if where == "emulated" else BUDGET_S
    started = time.monotonic()
    report.kept = Verdicts(folder, this_machine(where))
    experts, report.reasons = expert_subjects(layers)
    # a shared expert is judged beside what its experts alone are best with
    subjects: list[Subject] = [*experts, *shared_subjects(experts), *exl3_subjects(matrices)]
    for subject in subjects:
        known = {one.first: one for one in report.kept.find(subject.name) or ()}
        verdicts = [known.get(first) or _unjudged(subject, first, last) for first, last in subject.classes]
        report.blocks[subject.name] = tuple(verdicts)
        report.taken += subject.use(verdicts)
    report.untested = _in_order(subjects, report)
    began = time.monotonic()
    while report.untested and time.monotonic() - began < budget_s:
        try_next(report, on_step)
    report.took_s = time.monotonic() - started
    for name, found in report.blocks.items():
        for one in found:
            _log(name, one)
    return report


def _unjudged(subject: Subject, first: int, last: int) -> Verdict:
    if not subject.has_kernels(first):
        return Verdict(first, last, False, NO_KERNEL)
    return Verdict(first, last, False, NOT_YET, is_final=False)


def _in_order(subjects: Sequence[Subject], report: Report) -> list[Untested]:
    """What has no verdict: of each form the fewest tokens first, so that no form waits for all of another."""
    found = [
        (number, Untested(subject, one.first, one.last))
        for subject in subjects
        for number, one in enumerate(report.blocks[subject.name])
        if one.is_untested
    ]
    return [one for _, one in sorted(found, key=lambda pair: pair[0])]


def try_next(report: Report, on_step: Callable[[], None] = lambda: None) -> Verdict:
    """Test the next class that is untested, keep the verdict and do what it says from now on.

    Where another node of this machine has tested it meanwhile, that counts. on_step may raise
    WantedElsewhereError, which comes through and changes nothing.
    """
    one = report.untested[0]
    subject, kept = one.subject, report.kept
    found = None
    if kept is not None:
        found = next((v for v in kept.find(subject.name) or () if v.first == one.first), None)
    if found is None:
        found = judge(subject, one.first, one.last, is_timed=report.backend != "emulated", on_step=on_step)
        report.tested.add(subject.name)
        if kept is not None and found.is_final:
            kept.keep(subject.name, [found], subject.form)
    del report.untested[0]
    verdicts = tuple(found if v.first == one.first else v for v in report.blocks[subject.name])
    report.blocks[subject.name] = verdicts
    subject.use(verdicts)
    return found


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
    """Compare with the reference, and time what is right. Raises nothing of what a kernel may raise.

    What on_step raises as WantedElsewhereError comes through.
    """
    try:
        error, num_launches = measure.error_of(subject, num_tokens)
        on_step()
        if error > (limit := subject.tolerance):
            failure = f"wrong by {error:.1e} of the largest value; {limit:.0e} is allowed"
            return Trial(num_tokens, min(error, MAX_ERROR), num_launches, failure=failure)
        times = measure.times_of(subject, num_tokens, on_step) if is_timed else None
        return Trial(num_tokens, error, num_launches, times)
    except WantedElsewhereError:
        raise
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
        timed=tuple(_timed(one.num_tokens, one.times) for one in trials if one.times is not None),
    )


def _timed(num_tokens: int, times: Times) -> Timed:
    return Timed(num_tokens, times.ours_us, times.mlx_us)


def sizes_of(first: int, last: int, *, is_timed: bool) -> list[int]:
    """The numbers of tokens at which a class is tried."""
    return sorted({first, last or (ENDLESS if is_timed else first)})


def judge(
    subject: Subject, first: int, last: int, *, is_timed: bool, on_step: Callable[[], None] = lambda: None
) -> Verdict:
    """Of one class. Without timing, what is right is taken."""
    if not subject.has_kernels(first):
        return Verdict(first, last, False, NO_KERNEL)
    sizes = sizes_of(first, last, is_timed=is_timed)
    return decide(first, last, [try_size(subject, one, is_timed=is_timed, on_step=on_step) for one in sizes])


def _log(name: str, one: Verdict) -> None:
    size = f"{one.first} tokens" if one.first == one.last else f"{one.first} to {one.last or '...'} tokens"
    if one.is_taken:
        logger.info("kernels for %s (%s): error %.1e, %.2f x MLX", size, name, one.error, one.ratio)
    else:
        logger.info("MLX's operations for %s (%s): %s", size, name, one.reason)
