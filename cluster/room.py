"""What fits into the ring at once, running and kept. Pure; guarded by the lock that guards the scheduler."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from cluster.kept import KeptSessions
from cluster.lanes import join, lanes_of, taken
from cluster.request import Request
from planner.kv_profile import PREFILL_CHUNK_TOKENS as DEFAULT_PREFILL_CHUNK
from shard_loader.reach import Reach

MAX_SESSIONS = 256  # that run at once, however small they are
GROWTH_TOKENS = 64  # of an answer, at most, before the next look at what must go
_SLACK = 1e-9  # of sums of floats


def whole_context(_num_tokens: int) -> float:
    """Each session takes all that it ever could."""
    return 1.0


@dataclass(frozen=True, slots=True)
class Limits:
    """What the plan allows. Units: tokens, sessions, frames.

    share(tokens): what a session of so many takes of the plan's room, where a whole context takes 1.0.
    """

    context: int
    max_active: int  # whole contexts that the plan has room for
    max_in_flight: int  # frames in the ring at once
    prefill_chunk: int = DEFAULT_PREFILL_CHUNK  # tokens of a prompt in one frame
    max_chunks: int = 0  # of these, frames of prompts; 0: all
    max_lone_chunks: int = 0  # the same while nobody's answer is written; 0: no others
    vocab_size: int = 0  # 0: not checked
    max_rows: int = 1  # requests whose tokens may share a frame
    reads_together: bool = False  # and parts of their prompts as well
    share: Callable[[int], float] = whole_context
    trim_window: int = -1  # see KeptSessions.match; -1: no session is kept
    reach: Reach = Reach.NONE  # how far back the stages can take a session, for guesses that were wrong
    max_drafts: int = 0  # guesses in a frame; 0: none are made
    shared_chunk: int = 0  # tokens of a prompt in one frame while answers are written; 0: prefill_chunk
    has_ngrams: bool = True  # what came before in a text is taken to come again
    has_drafter: bool = False  # there is a draft model
    drafts_ahead: bool = False  # it can guess behind guesses, and go back without reading all again

    def __post_init__(self) -> None:
        for name in ("context", "max_active", "max_in_flight", "prefill_chunk", "max_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, and must be at least 1")
        if not 0 <= self.shared_chunk <= self.prefill_chunk:
            raise ValueError(f"shared_chunk is {self.shared_chunk}, and must be at most {self.prefill_chunk}")

    def can_shorten(self, num_tokens: int) -> bool:
        """Whether the caches of a session that holds at most so many can be cut at any token."""
        return num_tokens < self.trim_window


def why_never(limits: Limits, prompt: Sequence[int], max_tokens: int, *, is_pooled: bool = False) -> str:
    """Why a request could never run, in a sentence; empty where it can. is_pooled: it draws no token."""
    if not prompt:
        return "the prompt is empty; send at least one token"
    if max_tokens < 1 and not is_pooled:
        return f"max_tokens is {max_tokens}, and must be at least 1"
    if len(prompt) + max_tokens > limits.context:
        return (
            f"the context is {limits.context} tokens, but the prompt has {len(prompt)} and max_tokens "
            f"asks for {max_tokens} more; shorten the prompt or lower max_tokens"
        )
    if limits.vocab_size and max(prompt) >= limits.vocab_size:
        return f"token id {max(prompt)} is not in the vocabulary of {limits.vocab_size} tokens"
    return ""


def lane_for(limits: Limits, active: Collection[Request], num_tokens: int) -> int | None:
    """The lane of one more request, of so many tokens at most, that starts if all that is kept goes.

    None: there is no room for it.
    """
    share, rows = limits.share(num_tokens), _shares(limits, active, _reserved)
    if limits.max_rows == 1:
        number, after = 0, sum(other for _, other in rows) + share
    else:
        number, after = join(lanes_of(rows), share, limits.max_active + _SLACK)
    return number if len(active) < MAX_SESSIONS and after <= limits.max_active + _SLACK else None


def has_room(limits: Limits, active: Collection[Request], num_tokens: int) -> bool:
    """Whether there is a lane for one more."""
    return lane_for(limits, active, num_tokens) is not None


def too_much(
    limits: Limits, active: Collection[Request], kept: KeptSessions, share: float = 0.0
) -> list[int]:
    """The sessions to close so that what runs and what is kept fit together, least recently used first.

    What runs counts as far as it has come, with a prompt that is read as a whole. share: of one more to keep.
    """
    over = _taken(limits, active) + kept.share + share - limits.max_active - _SLACK
    closes = []
    for old in kept.oldest():
        if over <= 0:
            break
        over -= old.share
        closes.append(old.session)
    return closes


def fits_beside(limits: Limits, active: Collection[Request], share: float) -> bool:
    """Whether a session of so much may be kept beside what runs, if all else that is kept goes."""
    return _taken(limits, active) + share <= limits.max_active + _SLACK


def _taken(limits: Limits, active: Collection[Request]) -> float:
    """By what runs as far as it has come: each as the widest of its lane, or as itself where none share."""
    rows = _shares(limits, active, _held)
    return sum(share for _, share in rows) if limits.max_rows == 1 else taken(lanes_of(rows))


def _shares(
    limits: Limits, active: Collection[Request], tokens: Callable[[Request], int]
) -> list[tuple[int, float]]:
    return [(request.lane, limits.share(tokens(request))) for request in active]


def _held(request: Request) -> int:
    return min(request.num_reserved, max(request.num_sent, len(request.prompt)) + GROWTH_TOKENS)


def _reserved(request: Request) -> int:
    return request.num_reserved
