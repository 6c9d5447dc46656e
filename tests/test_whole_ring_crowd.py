"""Small requests, of which far more run than whole contexts would: each has its handler in the head."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.reference import greedy
from tests.ring_processes import RingProcesses
from tests.tiny_models import write_checkpoint

NUM_USERS = 180


@pytest.mark.long
def test_many_small_requests_run_at_once(tmp_path: Path) -> None:
    model = write_checkpoint("llama", tmp_path / "model", num_layers=3)
    with RingProcesses(tmp_path, model, [(0, 3)], context=4096, concurrency=12, queue=1) as ring:
        ring.wait_ok()
        with ThreadPoolExecutor(NUM_USERS) as pool:
            answers = list(pool.map(lambda user: ring.tokens([user, 5, 9], 32), range(NUM_USERS)))
    for user in (0, 90, NUM_USERS - 1):
        assert answers[user] == greedy(model, [user, 5, 9], 32)[0]
