"""A real ring under 200 clients that come, leave and give up: every answer is that of its lone run, no leak.

MACRAME_SOAK_S says how long the longest one goes on, in seconds; 1800 unless told otherwise. Windowed and
recurrent models take a tenth of that. On a machine that does much else a process may get no processor for a
second, which breaks the ring: MACRAME_SOAK_BREAKS is how often it may, 0 unless told otherwise.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import time
from pathlib import Path

import pytest

from cluster.room import MAX_SESSIONS
from cluster.runtime import SPARE_WORKERS
from planner.plan import Plan
from tests.ring_processes import RingProcesses
from tests.soak_clients import Crowd
from tests.soak_requests import Alone, draw_asks
from tests.soak_watch import Watch, held
from tests.tiny_models import write_checkpoint
from tests.waiting import wait_for

pytestmark = pytest.mark.long

SOAK_S = float(os.environ.get("MACRAME_SOAK_S", "1800"))
MAX_BREAKS = int(os.environ.get("MACRAME_SOAK_BREAKS", "0"))
SHORT_S = 20.0
WARM_UP_S = 3.0
SPARE_S = 600.0  # to start, to answer all requests alone, and to end

NUM_LAYERS, CONTEXT, CONCURRENCY, QUEUE, NUM_CLIENTS = 5, 512, 8, 100, 200
LAYERS = list(itertools.pairwise([0, 1, 4, NUM_LAYERS]))

# What the second half of a soak may grow by, of each process.
MAX_GROWTH_MB = 8.0
MAX_GROWTH_THREADS, MAX_GROWTH_FILES = 12.0, 10.0
MAX_THREADS = QUEUE + MAX_SESSIONS + 4 * len(LAYERS) + SPARE_WORKERS + 40  # handlers come as they are needed
MIN_SLOPE_S = 120.0  # a shorter soak says nothing of a slope


@pytest.mark.timeout(SHORT_S + SPARE_S)
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "mamba2"])
def test_a_short_soak(architecture: str, tmp_path: Path) -> None:
    soak(architecture, tmp_path, SHORT_S, num_asks=60)


@pytest.mark.timeout(SOAK_S + SPARE_S)
def test_a_long_soak(tmp_path: Path) -> None:
    soak("llama", tmp_path, SOAK_S, num_asks=300)


@pytest.mark.timeout(SOAK_S / 10 + SPARE_S)
@pytest.mark.parametrize("architecture", ["gemma3_text", "gpt_oss", "mamba2"])
def test_soaks_of_other_caches(architecture: str, tmp_path: Path) -> None:
    soak(architecture, tmp_path, SOAK_S / 10, num_asks=150)


def soak(architecture: str, tmp_path: Path, duration_s: float, num_asks: int) -> None:
    model = write_checkpoint(architecture, tmp_path / "model", num_layers=NUM_LAYERS)
    alone = Alone(model)
    asks = draw_asks(random.Random(7), num_asks, alone)
    lone = {number: alone.answer(ask) for number, ask in enumerate(asks)}
    share = tmp_path / "share"
    share.write_text("0.9")
    with RingProcesses(
        tmp_path,
        model,
        LAYERS,
        context=CONTEXT,
        concurrency=CONCURRENCY,
        with_api=True,
        queue=QUEUE,
        faults={1: f"available_share={share}"},
    ) as ring:
        ring.wait_api()
        first = ring.wait_ok()
        plan = Plan.from_json(first.plan_json)
        until = time.monotonic() + WARM_UP_S
        asyncio.run(Crowd(ring.api_port, asks, lone, alone, NUM_CLIENTS, until, seed=0).run())
        quiet(ring)
        before = held(ring)
        until = time.monotonic() + duration_s
        crowd = Crowd(
            ring.api_port, asks, lone, alone, NUM_CLIENTS, until, seed=1, excuses_silence=MAX_BREAKS > 0
        )
        with Watch(ring, plan, every_s=max(1.0, duration_s / 180)) as watch:
            asyncio.run(crowd.run())
        tally = crowd.tally
        print(f"\n{architecture}, {duration_s:g} s: {dict(tally.counts)}, {tally.num_tokens} tokens")
        print(f"{tally.num_cached} prompt tokens not read again; ties: {tally.ties}")
        print(f"log-probabilities are at most {tally.max_far:.2g} from those of lone runs")
        print(watch.table())
        assert not tally.wrong, "\n".join(tally.wrong[:10])
        num_breaks = ring.wait_ok().epoch - first.epoch
        print(f"the ring broke {num_breaks} times")
        assert num_breaks <= MAX_BREAKS
        for kind in ("whole", "greedy", "drawn", "left in the middle", "told to come later"):
            assert tally.counts[kind], f"none {kind}: {tally.counts}"
        assert not watch.over_plan, watch.over_plan[:3]
        quiet(ring)
        empty(ring, share)
        after = held(ring)
        print(f"threads and files of each process: before {before}, after {after}")
        for name, (threads, files) in after.items():
            assert threads <= MAX_THREADS, (name, before, after)
            assert files <= before[name][1] + MAX_GROWTH_FILES, (name, before, after)
        if duration_s >= MIN_SLOPE_S:
            limits = {"rss MB": MAX_GROWTH_MB, "threads": MAX_GROWTH_THREADS, "files": MAX_GROWTH_FILES}
            for (name, measure), series in watch.series.items():
                assert series.growth() < limits.get(measure, float("inf")), (name, measure, series.growth())


def quiet(ring: RingProcesses) -> None:
    """Until nothing runs and nothing waits, on the head and on every stage."""
    ring.wait_status(lambda status: not status.num_active and not status.num_queued)
    wait_for(lambda: not any(ring.node_status(rank).num_sessions for rank in range(len(LAYERS))), 10.0)


def empty(ring: RingProcesses, share: Path) -> None:
    """A node that is short of memory has nothing kept; then no stage holds any KV."""
    share.write_text("0.001")
    wait_for(
        lambda: not any(ring.node_status(rank).kv_bytes for rank in range(len(LAYERS))), 60.0, "no KV is held"
    )
    assert ring.wait_ok().num_kept == 0
    share.write_text("0.9")
