from __future__ import annotations

from cluster.step_times import NUM_CHUNKS, NUM_DECODE_STEPS, StepTimes
from proto import control_pb2, ring_pb2


def frame(*rows: tuple[int, int], error: str = "") -> ring_pb2.Frame:
    """One slot for each (position, tokens)."""
    made = ring_pb2.Frame(kind=ring_pb2.STEP)
    for position, num_tokens in rows:
        made.slots.add(session=1, position=position, tokens=[7] * num_tokens, error=error)
    return made


def filled(times: StepTimes) -> control_pb2.StageStats:
    stats = control_pb2.StageStats()
    times.fill(stats)
    return stats


def test_decode_steps_and_chunks_are_kept_apart() -> None:
    times = StepTimes()
    times.add(frame((0, 512)), 90.0)
    times.add(frame((512, 3)), 4.0)
    times.add(frame((515, 1)), 2.5)
    stats = filled(times)
    assert (list(stats.decode_ms), list(stats.decode_position)) == ([2.5], [515])
    assert (list(stats.chunk_ms), list(stats.chunk_tokens), list(stats.chunk_position)) == (
        [90.0, 4.0],
        [512, 3],
        [0, 512],
    )


def test_rows_that_share_a_step_are_told_with_the_longest() -> None:
    times = StepTimes()
    shared = frame((3, 1), (9, 1))
    shared.is_batched = True
    times.add(shared, 3.0)
    stats = filled(times)
    assert (list(stats.decode_ms), list(stats.decode_position), list(stats.decode_rows)) == ([3.0], [9], [2])


def test_what_says_nothing_of_a_step_is_left_out() -> None:
    times = StepTimes()
    times.add(frame((3, 1), (9, 1)), 3.0)  # one after the other
    times.add(frame((3, 1), error="failed before"), 0.1)
    times.add(frame(), 0.1)
    assert filled(times) == control_pb2.StageStats()


def test_only_the_latest_are_kept() -> None:
    times = StepTimes()
    for position in range(200):
        times.add(frame((position, 1)), 1.0)
        times.add(frame((position, 2)), 1.0)
    stats = filled(times)
    assert list(stats.decode_position) == list(range(200 - NUM_DECODE_STEPS, 200))
    assert list(stats.chunk_position) == list(range(200 - NUM_CHUNKS, 200))
