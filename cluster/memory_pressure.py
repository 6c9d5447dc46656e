"""How short of memory a machine is, and what follows from it: readings in, a decision out. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from planner.refusal import gb

# Shares of the machine's memory (or its container's) that are available without swapping.
WARN_SHARE = 0.08
STOP_SHARE = 0.04
# Written to swap, in bytes a second. A Mac with much compressed memory writes a little all the time.
WARN_SWAP_BYTES_S = 8e6
STOP_SWAP_BYTES_S = 64e6
# Time that tasks stood still for memory (https://docs.kernel.org/accounting/psi.html), as a share of it.
WARN_STALL_SHARE = 0.10  # some task
STOP_STALL_SHARE = 0.20  # all tasks
EASE = 1.5  # by so much a value must be better than its limit before pressure is over
CALM_READINGS = 3  # in a row
TRIM_AGAIN_READINGS = 10


class Level(IntEnum):
    """Pressure; names are those of the status."""

    NORMAL = 0
    WARNING = 1  # MLX's cache is emptied
    CRITICAL = 2  # and no new request starts

    @property
    def word(self) -> str:
        return self.name.lower()


@dataclass(frozen=True, slots=True)
class Reading:
    """What the system says at one time."""

    total_bytes: int
    available_bytes: int
    swap_used_bytes: int = 0
    swapped_out_bytes: int = 0  # ever
    some_stall_share: float = 0.0
    full_stall_share: float = 0.0
    system_level: Level = Level.NORMAL  # macOS' own verdict


@dataclass(frozen=True, slots=True)
class Pressure:
    """The verdict, and what it remembers."""

    level: Level = Level.NORMAL
    reason: str = ""  # with numbers; empty where normal
    must_trim: bool = False
    num_calm: int = 0
    num_since_trim: int = 0

    @property
    def is_admitting(self) -> bool:
        """New requests may start."""
        return self.level is not Level.CRITICAL


def decide(before: Pressure, last: Reading | None, now: Reading, elapsed_s: float) -> Pressure:
    """The pressure after one more reading, `elapsed_s` after the last.

    It rises at once, and falls after CALM_READINGS in a row that are better by EASE: a ring at the limit must
    not start and stop requests every second.
    """
    swap_bytes_s = 0.0
    if last is not None and elapsed_s > 0:
        swap_bytes_s = max(0, now.swapped_out_bytes - last.swapped_out_bytes) / elapsed_s
    level, reason = _judge(now, swap_bytes_s, ease=1.0)
    num_calm = 0
    if level < before.level:
        eased, eased_reason = _judge(now, swap_bytes_s, ease=EASE)
        num_calm = before.num_calm + 1 if eased < before.level else 0
        if num_calm >= CALM_READINGS:
            level, reason, num_calm = eased, eased_reason, 0
        else:
            level, reason = before.level, eased_reason or f"{_available(now)}, and it is recovering"
    since_trim = before.num_since_trim + 1
    must_trim = level > before.level or (level is not Level.NORMAL and since_trim >= TRIM_AGAIN_READINGS)
    return Pressure(level, reason, must_trim, num_calm, 0 if must_trim else since_trim)


def _judge(now: Reading, swap_bytes_s: float, *, ease: float) -> tuple[Level, str]:
    """The level by the worst of all signs, and that sign in words; limits are stricter by `ease`."""
    signs: list[tuple[Level, str]] = [(Level.NORMAL, "")]
    share = now.available_bytes / max(1, now.total_bytes)
    for level, limit in ((Level.CRITICAL, STOP_SHARE), (Level.WARNING, WARN_SHARE)):
        if share < limit * ease:
            signs.append((level, _available(now)))
            break
    for level, limit in ((Level.CRITICAL, STOP_SWAP_BYTES_S), (Level.WARNING, WARN_SWAP_BYTES_S)):
        if swap_bytes_s > limit / ease:
            text = f"{gb(swap_bytes_s)} a second are written to swap, {gb(now.swap_used_bytes)} lie there"
            signs.append((level, text))
            break
    if now.full_stall_share > STOP_STALL_SHARE / ease:
        stalled = f"all tasks stood still for memory {now.full_stall_share:.0%} of the time"
        signs.append((Level.CRITICAL, stalled))
    elif now.some_stall_share > WARN_STALL_SHARE / ease:
        stalled = f"tasks stood still for memory {now.some_stall_share:.0%} of the time"
        signs.append((Level.WARNING, stalled))
    if now.system_level is not Level.NORMAL:
        signs.append((now.system_level, f"macOS reports memory pressure; {_available(now)}"))
    return max(signs, key=lambda sign: sign[0])


def _available(now: Reading) -> str:
    return f"{gb(now.available_bytes)} of {gb(now.total_bytes)} are available"
