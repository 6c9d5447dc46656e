"""Who reads, or has read, what a prompt begins with, of those that run: it waits for the one, or begins at
once beside the other. Pure.

Read by both at once it would take both longer than if one reads it and the other begins with that.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Collection

from cluster.kept import MIN_COMMON, common
from cluster.prompt_points import END_TOKENS
from cluster.request import PromptWait, Request
from cluster.room import Limits

MIN_SPARED = 128  # tokens to be spared by it; prompts of fewer are read together


def find_wait(
    request: Request, limits: Limits, active: Collection[Request], num_read: int = 0
) -> PromptWait | None:
    """What a request that has not begun waits for: the most that another one is about to read for both.

    Where the other's caches cannot be shortened, it is to be copied there. Nobody waits for one that waits
    itself, or whose priority is lower, nor for what one that runs has read. num_read: so much of its prompt
    is known to be.
    """
    if limits.trim_window < 0 or not request.can_begin_beside:
        return None
    num_read = max(num_read, request.num_cached)
    if (beside := find_read(request, limits, active, num_read)) is not None:
        num_read = beside[1]
    best: tuple[Request, int] | None = None
    for other in active:
        is_reader = other is not request and other.wait is None and not other.reads_all
        if not is_reader or other.adapter != request.adapter or other.priority > request.priority:
            continue
        least = max(num_read + MIN_SPARED, other.num_sent + 1, best[1] + 1 if best else 0)
        most = min(len(other.prompt), len(request.prompt)) - 1
        if most < least or other.prompt[least - 1] != request.prompt[least - 1]:
            continue  # most of those that run are told by one token
        point = common(other.prompt, request.prompt, most)
        if not limits.can_shorten(other.num_reserved):
            point = max((p for p in other.points if point - END_TOKENS <= p <= point), default=point)
        if point >= least:
            best = other, point
    if best is None:
        return None
    other, point = best
    if not limits.can_shorten(other.num_reserved) and point not in other.points:
        insort(other.points, point)
    return PromptWait(other.session, point)


def find_read(
    request: Request, limits: Limits, active: Collection[Request], num_read: int = 0
) -> tuple[Request, int] | None:
    """Who of those that run has read most of a request's prompt, and how much: more than `num_read` tokens.

    What was sent of the other's prompt is read on each stage before this request's first frame comes, but for
    its last token, which may wait there for a grammar. Nobody whose caches may come to be such as cannot be
    shortened.
    """
    best, num_read = None, max(num_read, MIN_COMMON - 1)
    for other in active:
        if not other.is_open or other.is_pooled or other.adapter != request.adapter:
            continue
        most = min(other.num_sent, len(other.prompt) - 1, len(request.prompt) - 1)
        if not limits.can_shorten(other.num_reserved) or most <= num_read:
            continue
        if other.prompt[num_read] != request.prompt[num_read]:
            continue  # no better: most of those that run are told by one token
        if (num_common := common(other.prompt, request.prompt, most)) > num_read:
            best, num_read = other, num_common
    return None if best is None else (best, num_read)
