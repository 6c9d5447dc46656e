"""The bench's arithmetic, on answers and statuses made by hand."""

from __future__ import annotations

import json
import random
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest

from cluster.bench_client import Answer
from cluster.bench_figures import Percentiles, Run, decode_tok_s, figures, percentile


def answer(sent_at: float, *arrivals: tuple[float, int], num_prompt: int = 10) -> Answer:
    return Answer(num_prompt, sent_at, list(arrivals), is_whole=True)


def stage(busy_ms: float, *, steps: tuple[float, ...] = (), hops: tuple[float, ...] = ()) -> dict[str, Any]:
    return {"busy_ms": busy_ms, "recent_step_ms": list(steps), "recent_hop_ms": list(hops)}


def run_of(*answers: Answer, is_whole: bool = True) -> Run:
    before, after = [stage(100.0), stage(0.0)], [stage(600.0, steps=(2.0, 4.0), hops=(0.5,)), stage(250.0)]
    return figures(2, answers, before, after, cpu_s=0.9, is_whole=is_whole)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9, 0.99, 1.0])
def test_percentiles_are_numpys(share: float) -> None:
    draw = random.Random(1)
    for count in range(1, 60):
        values = sorted(draw.expovariate(1.0) for _ in range(count))
        assert percentile(values, share) == pytest.approx(float(np.quantile(values, share)))


def test_of_nothing_there_are_no_percentiles() -> None:
    assert Percentiles.of([]) == Percentiles(None, None, None)
    assert Percentiles.of([3.0]) == Percentiles(3.0, 3.0, 3.0)


def test_a_run_of_two_users() -> None:
    run = run_of(
        answer(10.0, (10.5, 1), (10.6, 1), (10.8, 1)),
        answer(10.1, (10.4, 1), (10.5, 1), (11.0, 1), num_prompt=30),
    )
    assert (run.num_requests, run.output_tokens, run.is_whole) == (2, 6, True)
    assert run.wall_s == pytest.approx(1.0)  # from 10.0 to 11.0
    assert run.aggregate_tok_s == pytest.approx(6.0)
    assert run.ttft_ms.p50 == pytest.approx(400.0)  # 500 and 300
    assert run.ttft_s == pytest.approx(0.4)
    assert run.prefill_tok_s == pytest.approx((10 / 0.5 + 30 / 0.3) / 2)
    assert run.gap_ms.p50 == pytest.approx(150.0)  # 100, 200, 100, 500
    assert run.gap_ms.p99 == pytest.approx(500.0 - 0.03 * 300.0)
    assert run.decode_tok_s == pytest.approx((2 / 0.3 + 2 / 0.6) / 2)
    assert run.stage_busy == pytest.approx([0.5, 0.25])
    assert run.stage_ms == [3.0, 0.0]
    assert run.hop_ms == Percentiles(0.5, 0.5, 0.5)
    assert run.cpu_ms_per_token == pytest.approx(150.0)
    assert run.acceptance is None
    assert json.loads(json.dumps(asdict(run)))["gap_ms"].keys() == {"p50", "p90", "p99"}


def test_tokens_that_come_together_are_one_arrival() -> None:
    drafted = answer(0.0, (1.0, 2), (1.5, 3), (2.0, 1))
    assert decode_tok_s(drafted) == pytest.approx(4.0)  # 3 + 1 tokens in the second after the first two
    run = run_of(drafted)
    assert run.output_tokens == 6
    assert run.gap_ms == Percentiles(pytest.approx(500.0), pytest.approx(500.0), pytest.approx(500.0))


def test_answers_of_one_token_have_no_gap() -> None:
    run = run_of(answer(0.0, (1.0, 1)))
    assert run.decode_tok_s == 0.0
    assert run.gap_ms.p50 is None


def test_an_interrupted_run_counts_what_came() -> None:
    waiting, broken = Answer(10, sent_at=0.2), Answer(10, 0.0, [(0.5, 1), (1.0, 1)])
    run = run_of(waiting, broken, is_whole=False)
    assert (run.num_requests, run.output_tokens, run.is_whole) == (0, 2, False)
    assert run.wall_s == pytest.approx(1.0)
    with pytest.raises(ValueError, match="no token came"):
        run_of(waiting, is_whole=False)


def test_of_guesses_the_share_of_right_ones() -> None:
    stages = [stage(0.0)]
    run = figures(*(1, [answer(1.0, (1.5, 2))], stages, stages), cpu_s=0.1, is_whole=True, guesses=(8, 6))
    assert run.acceptance == 0.75
