"""Whose turn it is to enter the ring, of those that run. Pure.

While no prompt is read, answers are spread evenly over the frames in flight, so that no stage waits. While
one is, its chunks keep the stages busy, and all answers go together in as few frames as can carry them:
weights are read once for all of them, and the rest of each round is the prompt's. Several prompts that are
shorter than a chunk are read in one frame, the same number of tokens of each: no row is padded behind.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from itertools import islice

from cluster.prompt_points import next_end
from cluster.request import Request
from cluster.room import Limits

FULL_TOKENS = 128  # of a prompt: so many keep a device busy, and gain little by others beside them


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
    For whom others wait is served as soon as any of these would be.
    """
    prompts = [request for request in active if request.is_prompt_due]
    if num_read % 2 == 0:
        return min(prompts, key=_came, default=None)
    behind = dict[int, tuple[int, int]]()  # by session, who of those that wait for it has least to read
    for request in active:
        if (wait := request.wait) is not None:
            shortest = request.priority, len(request.prompt)
            behind[wait.session] = min(behind.get(wait.session, shortest), shortest)

    def least_left(request: Request) -> tuple[int, ...]:
        own = _least_left(request)
        if (shortest := behind.get(request.session)) is None:
            return own
        return min(own, (shortest[0], shortest[1] - request.num_sent, request.session))

    return min(prompts, key=least_left, default=None)


def prompts_with(first: Request, active: Collection[Request], limits: Limits) -> tuple[list[Request], int]:
    """Whose prompts are read on where it is the first one's turn, and by how many tokens each.

    Together no more than a chunk, and as much of it as can be: of fewer tokens at once, if more prompts have
    so many. Each time one of them comes to the end of its part. Who came first is among them; who has least
    left, unless others like it are more.
    """
    most = chunk_tokens(active, limits)
    num_tokens = next_part(first, _lone_chunk(first, most, limits))
    if num_tokens >= FULL_TOKENS or not _may_share(first, limits):
        return [first], num_tokens
    parts = [(next_part(other, most), other) for other in active if _goes_with(first, other, limits)]
    parts = [(part, other) for part, other in parts if part < FULL_TOKENS]
    if first.session == min(request.session for request in active if request.is_prompt_due):
        lengths = [min(part, num_tokens) for part, _ in parts]
    else:
        parts = [(part, other) for part, other in parts if other.priority == first.priority]
        lengths = [part for part, _ in parts]
    num_rows, num_tokens = _largest(lengths, most, limits.max_rows)
    able = [other for part, other in parts if part >= num_tokens and other is not first]
    able.sort(key=_least_left)
    is_with = next_part(first, most) >= num_tokens
    return ([first, *able] if is_with else able)[:num_rows], num_tokens


def next_part(request: Request, most: int) -> int:
    """Tokens of its prompt that go next, where at most so many can."""
    num_prompt = len(request.prompt) + request.is_pooled  # its last token goes with the others
    return next_end(request.num_sent, num_prompt, most, request.points) - request.num_sent


def rows_with(first: Request, active: Collection[Request], limits: Limits) -> list[Request]:
    """Those whose tokens go with the first one's: their even share of the frames that answers have."""
    if not _is_known(first):
        return [first]
    share = _even_share(_writing(active).values(), num_row_frames(active, limits))
    company = _company(first)
    together = (r for r in active if r.is_row_due and _is_known(r) and _company(r) == company)
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
    needed = _num_frames(_writing(active).values(), limits.max_rows)
    return max(1, min(needed, limits.max_in_flight - 1))


def _writing(active: Collection[Request]) -> Counter[tuple[str, int]]:
    """How many answers are written, by who may share frames."""
    return Counter(_company(request) for request in active if request.is_writing)


def _company(request: Request) -> tuple[str, int]:
    """Only those with the same one share frames."""
    return request.adapter, request.lane


def _num_frames(numbers: Iterable[int], rows: int) -> int:
    """Frames of so many rows for `numbers` answers that share none with each other."""
    return sum(-(-number // rows) for number in numbers)


def _even_share(numbers: Collection[int], num_frames: int) -> int:
    """Rows of a frame where so many frames carry all of `numbers`, or each number a frame at least."""
    share = max(1, -(-sum(numbers) // num_frames))
    while _num_frames(numbers, share) > max(num_frames, len(numbers)):
        share += 1
    return share


def _lone_chunk(request: Request, most: int, limits: Limits) -> int:
    """Of a prompt by itself."""
    if request.is_scored:
        return min(most, scored_chunk(limits))
    return pooled_chunk(limits) if request.is_pooled else most


def _largest(lengths: Sequence[int], most: int, max_rows: int) -> tuple[int, int]:
    """How many rows, and of how many tokens each, come to most tokens; lengths: what each row has."""
    rows, tokens = 1, 0
    for i, length in enumerate(sorted(lengths, reverse=True)):
        num_rows = min(i + 1, max_rows, most // length)
        if num_rows * length > rows * tokens:
            rows, tokens = num_rows, length
    return rows, tokens


def _may_share(request: Request, limits: Limits) -> bool:
    """Its prompt can be read with others': it is read for its answer, whose draws wait for no grammar."""
    is_plain = not (request.is_scored or request.is_pooled or request.sampling.grammar)
    return limits.reads_together and is_plain


def _goes_with(first: Request, request: Request, limits: Limits) -> bool:
    """It is due as well; one token is drawn after both or neither, and its row is not padded by far."""
    return (
        request.is_prompt_due
        and _may_share(request, limits)
        and _company(request) == _company(first)
        and request.is_last_due == first.is_last_due
        and abs(request.num_sent - first.num_sent) <= limits.prefill_chunk
    )


def _is_known(request: Request) -> bool:
    """All that it has in the ring are parts of its prompt, and others need not wait for its grammar there."""
    return not request.windows and not (request.num_in_flight and request.sampling.grammar)


def _came(request: Request) -> tuple[int, ...]:
    return (request.session,)


def _least_left(request: Request) -> tuple[int, ...]:
    return request.priority, len(request.prompt) - request.num_sent, request.session
