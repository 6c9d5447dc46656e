"""The simulator by hand-made rings whose times can be told in the head."""

from __future__ import annotations

import pytest

from planner.simulator import LinkTimes, Passage, Request, RingTimes, StageTimes, simulate


def ring(*decode_ms: float, latency_ms: float = 0.0, in_flight: int | None = None) -> RingTimes:
    """Stages with those times; the same latency everywhere but to a head that has the first stage."""
    hops = [0.0, *[latency_ms] * len(decode_ms)]
    return RingTimes(
        tuple(StageTimes(ms) for ms in decode_ms),
        tuple(LinkTimes(ms) for ms in hops),
        len(decode_ms) + 1 if in_flight is None else in_flight,
    )


def test_a_single_user_waits_for_every_stage_and_hop() -> None:
    found = simulate(ring(2.0, 3.0, latency_ms=0.5), [Request(4)])
    assert found.tokens_ms == ((6.0, 12.0, 18.0, 24.0),)
    assert found.decode_tok_s() == pytest.approx(1e3 / 6)
    assert found.ttft_ms() == 6.0
    assert found.stage_busy == (8 / 24, 12 / 24)


def test_many_users_keep_the_slowest_stage_busy() -> None:
    found = simulate(ring(2.0, 5.0, 3.0), [Request(50)] * 4)
    assert found.aggregate_tok_s() == pytest.approx(200.0)
    assert found.stage_busy[1] > 0.97


def test_few_users_leave_it_idle() -> None:
    assert simulate(ring(5.0, 5.0, 5.0), [Request(50)] * 2).aggregate_tok_s() == pytest.approx(2e3 / 15)


def test_frames_in_flight_bound_what_many_users_get_over_long_hops() -> None:
    slow = ring(1.0, 1.0, latency_ms=9.0, in_flight=3)  # 20 ms round, 3 at a time
    assert simulate(slow, [Request(60)] * 30).aggregate_tok_s() == pytest.approx(150.0, rel=0.02)
    wide = ring(1.0, 1.0, latency_ms=9.0, in_flight=21)
    assert simulate(wide, [Request(60)] * 30).aggregate_tok_s() == pytest.approx(1000.0, rel=0.02)


def test_a_link_carries_one_frame_after_another() -> None:
    """1000 bytes at 0.004 ms a byte are 4 ms on the line, more than any stage's time."""
    links = (LinkTimes(), LinkTimes(20.0, 0.004, 1000), LinkTimes(1.0))
    found = simulate(RingTimes((StageTimes(1.0), StageTimes(2.0)), links, 30), [Request(60)] * 30)
    assert found.aggregate_tok_s() == pytest.approx(250.0, rel=0.01)
    assert found.ttft_ms() == pytest.approx(1 + 4 + 20 + 2 + 1)


def test_chunks_follow_each_other_and_the_last_token_comes_behind() -> None:
    stages = (StageTimes(1.0, (10.0, 10.0, 4.0)), StageTimes(2.0, (6.0, 6.0, 3.0)))
    links = tuple(LinkTimes(chunk_bytes=(0, 0, 0)) for _ in range(3))
    found = simulate(RingTimes(stages, links, 3), [Request(2, has_prompt=True)], is_traced=True)
    # stage 0: chunks end at 10, 20, 24, the last token at 25; stage 1: 16, 26, 29, then 2 ms
    assert found.tokens_ms == ((31.0, 34.0),)
    last = [p for p in found.trace if p.frame == 3]
    assert last[1] == Passage(
        0, 3, "stage 0", 0.0 + 16.0, 24.0, 25.0
    )  # entered when the first chunk was back
    assert last[3] == Passage(0, 3, "stage 1", 25.0, 29.0, 31.0)


def test_who_waited_longest_goes_first() -> None:
    """Users over one stage take turns; who comes while another is served is behind it, as at the head."""
    found = simulate(
        ring(1.0, in_flight=1), [Request(3), Request(3), Request(1, arrives_ms=0.5)], is_traced=True
    )
    assert [p.request for p in found.trace if p.station == "stage 0"] == [0, 0, 1, 2, 0, 1, 1]
    assert found.ttft_ms(2) == 3.5


def test_prompts_and_answers_share_the_ring() -> None:
    stages = (StageTimes(1.0, (50.0,)), StageTimes(1.0, (50.0,)))
    links = tuple(LinkTimes(chunk_bytes=(0,)) for _ in range(3))
    alone = simulate(RingTimes(stages, links, 3), [Request(100)])
    beside = simulate(
        RingTimes(stages, links, 3), [Request(100), Request(1, has_prompt=True, arrives_ms=20.0)]
    )
    assert alone.span_ms == pytest.approx(200)
    assert 250 <= beside.tokens_ms[0][-1] <= 350


def test_what_makes_no_ring_is_refused() -> None:
    stage, link = StageTimes(1.0), LinkTimes()
    with pytest.raises(ValueError, match="1 stages need one link more, not 1"):
        RingTimes((stage,), (link,), 2)
    with pytest.raises(ValueError, match="0 stages need one link more"):
        RingTimes((), (link,), 2)
    with pytest.raises(ValueError, match=r"the same number of chunks, not \[0, 1\]"):
        RingTimes((StageTimes(1.0, (2.0,)),), (link, link), 2)
    with pytest.raises(ValueError, match="max_in_flight = 0 must be at least 1"):
        RingTimes((stage,), (link, link), 0)
    with pytest.raises(ValueError, match="answer_tokens = 0 must be at least 1"):
        Request(0)
