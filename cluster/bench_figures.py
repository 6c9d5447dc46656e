"""The figures of `macrame bench`, from answers and from two statuses of every stage. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from cluster.bench_client import Answer


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Between neighbouring values on a straight line, as numpy has it; None where there are no values."""

    p50: float | None
    p90: float | None
    p99: float | None

    @staticmethod
    def of(values: Iterable[float]) -> Percentiles:
        ordered = sorted(values)
        return Percentiles(percentile(ordered, 0.5), percentile(ordered, 0.9), percentile(ordered, 0.99))


@dataclass(frozen=True, slots=True)
class Run:
    """One line of the bench: `concurrency` users at once."""

    concurrency: int
    num_requests: int  # answered whole
    is_whole: bool  # False: it was interrupted, and these are the figures until then
    wall_s: float  # from the first request to the last token
    output_tokens: int  # of all answers
    decode_tok_s: float  # of one user: tokens after the first arrival over the time after it; median
    prefill_tok_s: float  # prompt tokens over the time to the first token; median
    ttft_s: float  # median
    aggregate_tok_s: float  # all users' tokens over wall time
    ttft_ms: Percentiles  # from sending a request to its first token, with the wait in the queue
    gap_ms: Percentiles  # between two arrivals at a user; tokens that come together are one arrival
    hop_ms: Percentiles  # one way between neighbours, half of a measured round trip
    stage_ms: list[float]  # median compute time of a frame, in ring order
    stage_busy: list[float]  # share of the wall time that the compute thread worked, in ring order
    cpu_ms_per_token: float  # of all processes of the ring, per generated token
    acceptance: float | None  # share of guessed tokens that were right; null: none was guessed


def percentile(ordered: Sequence[float], share: float) -> float | None:
    """The value below which `share` of them lie, from sorted values; None where there are none."""
    if not ordered:
        return None
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def figures(
    concurrency: int,
    answers: Sequence[Answer],
    before: Sequence[Mapping[str, Any]],
    after: Sequence[Mapping[str, Any]],
    *,
    cpu_s: float,
    is_whole: bool,
    guesses: tuple[int, int] = (0, 0),
) -> Run:
    """A run's line. `before`, `after`: the `stats` of each stage in ring order; `cpu_s`: used in between.

    guesses: tokens guessed in between, and how many of them were right. Answers without a token are
    left out. Raises ValueError if no answer has one.
    """
    begun = [answer for answer in answers if answer.arrivals]
    if not begun:
        raise ValueError("no token came")
    wall_s = max(a.arrivals[-1][0] for a in begun) - min(a.sent_at for a in answers)
    num_tokens = sum(answer.num_tokens for answer in begun)
    ttfts_s = [answer.arrivals[0][0] - answer.sent_at for answer in begun]
    gaps_s = (later[0] - earlier[0] for a in begun for earlier, later in pairwise(a.arrivals))
    return Run(
        concurrency=concurrency,
        num_requests=sum(answer.is_whole for answer in answers),
        is_whole=is_whole,
        wall_s=wall_s,
        output_tokens=num_tokens,
        decode_tok_s=statistics.median(map(decode_tok_s, begun)),
        prefill_tok_s=statistics.median(a.num_prompt / s for a, s in zip(begun, ttfts_s, strict=True)),
        ttft_s=statistics.median(ttfts_s),
        aggregate_tok_s=num_tokens / wall_s,
        ttft_ms=Percentiles.of(1e3 * s for s in ttfts_s),
        gap_ms=Percentiles.of(1e3 * s for s in gaps_s),
        hop_ms=Percentiles.of(ms for stage in after for ms in stage["recent_hop_ms"]),
        stage_ms=[statistics.median(stage["recent_step_ms"] or [0.0]) for stage in after],
        stage_busy=[
            (later["busy_ms"] - earlier["busy_ms"]) / (1e3 * wall_s)
            for earlier, later in zip(before, after, strict=True)
        ],
        cpu_ms_per_token=1e3 * cpu_s / num_tokens,
        acceptance=guesses[1] / guesses[0] if guesses[0] else None,
    )


def decode_tok_s(answer: Answer) -> float:
    """Tokens after the first arrival over the time since then; 0.0 where nothing came after it."""
    (first_at, first), (last_at, _) = answer.arrivals[0], answer.arrivals[-1]
    return (answer.num_tokens - first) / (last_at - first_at) if last_at > first_at else 0.0
