"""Whom a prompt waits for: one that runs, and reads what both begin with. Pure.

Read by both at once it would take both longer than if one reads it and the other begins with that.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Collection

from cluster.kept import common
from cluster.prompt_points import END_TOKENS
from cluster.request import PromptWait, Request
from cluster.room import Limits

MIN_SPARED = 128  # tokens to be spared by it; prompts of fewer are read together


def find_wait(
    request: Request, limits: Limits, active: Collection[Request], num_read: int = 0
) -> PromptWait | None:
    """What a request that has not begun waits for: the most that another one is about to read for both.

    Where the other's caches cannot be shortened, it is to be copied there. Nobody waits for one that waits
    itself, or whose priority is lower. num_read: what one that runs is known to have read of its prompt.
    """
    if limits.trim_window < 0 or request.is_open or request.reads_alone or _is_special(request):
        return None
    best: tuple[Request, int] | None = None
    for other in active:
        is_reader = other is not request and other.wait is None and not _is_special(other)
        if not is_reader or other.adapter != request.adapter or other.priority > request.priority:
            continue
        is_trimmed = other.num_reserved < limits.trim_window
        begun = max(request.num_cached, num_read, other.num_sent if is_trimmed and other.is_open else 0)
        least = max(begun + MIN_SPARED, other.num_sent + 1, best[1] + 1 if best else 0)
        most = min(len(other.prompt), len(request.prompt)) - 1
        if most < least or other.prompt[least - 1] != request.prompt[least - 1]:
            continue  # most of those that run are told by one token
        point = common(other.prompt, request.prompt, most)
        if not is_trimmed:
            point = max((p for p in other.points if point - END_TOKENS <= p <= point), default=point)
        if point >= least:
            best = other, point
    if best is None:
        return None
    other, point = best
    if other.num_reserved >= limits.trim_window and point not in other.points:
        insort(other.points, point)
    return PromptWait(other.session, point)


def _is_special(request: Request) -> bool:
    return request.is_scored or request.is_pooled
