"""How far the stages can take a request back, by the reach of their caches (`Reach`). Pure."""

from __future__ import annotations

from cluster.request import Request
from cluster.room import Limits
from cluster.speculation import Window
from shard_loader.reach import Reach
from shard_loader.reach import can_forget as caches_can_forget


def position_after(request: Request, window: Window, reach: Reach) -> int:
    """Where the next frame begins when not all guesses of `window`, or of those that followed, were right."""
    return window.position if reach == Reach.MARK else request.num_known - 1


def can_forget(limits: Limits, num_tokens: int) -> bool:
    """Whether all stages can forget any of the last tokens while they hold so many."""
    return caches_can_forget(limits.reach, limits.trim_window, num_tokens)


def may_go_ahead(request: Request, limits: Limits) -> bool:
    """Whether guesses may follow others whose verdict is not back: the stages can forget all of them."""
    return bool(request.live) and not request.is_due and can_forget(limits, request.num_sent)


def kept_length(request: Request, limits: Limits) -> int:
    """With how many of its tokens a request's session can be kept, now that it ends; 0: not at all."""
    length = min(request.num_sent, request.num_known)
    void = request.num_read - length
    window = request.last_window
    if not void or can_forget(limits, request.num_read):
        return length
    if window is None or window.position + len(window.tokens) != request.num_read or len(window.tokens) == 1:
        return 0
    if limits.reach == Reach.PASS:
        return length if void < len(window.tokens) else 0
    return window.position if limits.reach == Reach.MARK and window.num_draws > 1 else 0
