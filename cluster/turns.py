"""Whose turn it is to enter the ring, of those that run. Pure.

While no prompt is read, answers are spread evenly over the frames in flight, so that no stage waits. While
one is, its chunks keep the stages busy, and all answers go together in as few frames as can carry them:
weights are read once for all of them, and the rest of each round is the prompt's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from itertools import islice

from cluster.request import Request
from cluster.room import Limits


def due(
    active: Collection[Request], limits: Limits, *, num_rows: int, num_chunks: int, num_read: int
) -> Request | None:
    """Whose token or chunk goes next; None: nobody's does now.

    active: whoever was sent last is last. num_rows, num_chunks: frames in flight with tokens of answers, and
    with parts of prompts, of which one at least is on its way while a prompt is read. num_read: chunks that
    were sent so far.
    """
    chunk = next_chunk(active, num_read)
    row = next((request for request in active if request.is_due), None)
    if chunk is None:
        return row
    if row is not None and num_chunks:
        # Those that wait for others to share a frame with do not wait for further chunks as well.
        return row if num_rows < num_row_frames(active, limits) else None
    most = (limits.max_lone_chunks if is_reading(active) else 0) or limits.max_chunks
    return chunk if not most or num_chunks < most else None


def is_reading(active: Collection[Request]) -> bool:
    """Nobody's answer is written: prompts are read, and nothing else."""
    return not any(request.is_writing for request in active)


def max_frames(active: Collection[Request], limits: Limits) -> int:
    """How many frames may be in the ring. Parts of prompts keep a device busy only where the next one is
    built while it computes, so that each stage has two of them.
    """
    return max(limits.max_in_flight, limits.max_lone_chunks) if is_reading(active) else limits.max_in_flight


def next_chunk(active: Collection[Request], num_read: int) -> Request | None:
    """Whose prompt is read on. Every other chunk is of who came first, so that a long prompt is not kept
    waiting by short ones; the others go by priority and to who has least left, so that it does not keep them.
    """
    prompts = [request for request in active if request.is_chunk_due]
    return min(prompts, key=_least_left if num_read % 2 else _came, default=None)


def rows_with(first: Request, active: Collection[Request], limits: Limits) -> list[Request]:
    """Those whose tokens go with the first one's: their even share of the frames that answers have.

    One whose last chunk is still on its way goes by itself: were that to fail, it would for all of the frame.
    """
    if first.num_in_flight:
        return [first]
    num_writing = sum(request.is_writing for request in active)
    share = -(-num_writing // num_row_frames(active, limits))
    together = (r for r in active if r.is_row_due and not r.num_in_flight and r.adapter == first.adapter)
    return list(islice(together, min(share, limits.max_rows)))


def chunk_tokens(active: Collection[Request], limits: Limits) -> int:
    """How much of a prompt goes at once: less while answers are written."""
    return limits.prefill_chunk if is_reading(active) else limits.shared_chunk or limits.prefill_chunk


def scored_chunk(limits: Limits) -> int:
    """Of a prompt whose tokens are scored: in float32, and more than once, within the memory of any chunk."""
    return max(1, limits.prefill_chunk // 8)


def pooled_chunk(limits: Limits) -> int:
    """Of a prompt that becomes a vector: the same whatever others do, so that its numbers are, too."""
    return limits.shared_chunk or limits.prefill_chunk


def num_row_frames(active: Collection[Request], limits: Limits) -> int:
    """In how many frames at once the tokens of answers go."""
    if not any(request.is_chunk_due for request in active):
        return limits.max_in_flight
    writing = Counter(request.adapter for request in active if request.is_writing)
    needed = sum(-(-num // limits.max_rows) for num in writing.values())
    return max(1, min(needed, limits.max_in_flight - 1))


def _came(request: Request) -> tuple[int, ...]:
    return (request.session,)


def _least_left(request: Request) -> tuple[int, ...]:
    return request.priority, len(request.prompt) - request.num_sent, request.session
