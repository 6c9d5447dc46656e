"""The chunk that a plan chooses is the chunk that its ring reads a prompt in, within the bytes it counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from planner.kv_profile import PREFILL_CHUNK_TOKENS
from planner.plan import Plan
from proto import control_pb2
from tests.reference import greedy
from tests.ring_processes import RingProcesses
from tests.tiny_models import write_checkpoint

LAYERS = [(0, 2), (2, 3), (3, 5)]
NUM_PROMPT, NUM_TOKENS = 2200, 8


def is_read(node: control_pb2.NodeStatus) -> bool:
    """Its request has ended, and what it took has been counted."""
    return node.num_sessions == 0 and node.memory.peak_kv_bytes > 0


@pytest.mark.parametrize("architecture", ["gemma3_text", pytest.param("llama", marks=pytest.mark.long)])
def test_a_ring_reads_a_prompt_in_the_chunk_of_its_plan(architecture: str, tmp_path: Path) -> None:
    model = write_checkpoint(architecture, tmp_path / "model", num_layers=LAYERS[-1][1])
    prompt = [(7 * i + 1) % 251 for i in range(NUM_PROMPT)]
    config: dict[str, Any] = {"concurrency": 1, "context": 4096, "chip": "Apple M4"}
    # Without points of the prompt at which a copy is kept: a chunk would end there as well.
    with RingProcesses(tmp_path, model, LAYERS, **config, prefix_cache=False) as ring:
        ring.wait_ok()
        answer = ring.tokens(prompt, NUM_TOKENS)
        chunks = [list(ring.node_status(rank).stats.chunk_tokens) for rank in range(len(LAYERS))]
        status = ring.wait_status(lambda s: all(is_read(r.node) for r in s.ranks))
    plan = Plan.from_json(status.plan_json)
    chunk = plan.chunk_tokens
    assert chunk > PREFILL_CHUNK_TOKENS  # so small a model waits for launches, and larger chunks have fewer
    rest = NUM_PROMPT - 1
    assert chunks == [[chunk] * (rest // chunk) + [rest % chunk]] * len(LAYERS)
    assert answer == greedy(model, prompt, NUM_TOKENS, chunk=chunk)[0]
    for part in plan.assignments:
        node = status.ranks[part.rank].node
        memory = node.memory
        assert 0 < memory.peak_kv_bytes <= 1.03 * part.kv_bytes
        assert 0 < memory.activation_bytes <= part.activation_bytes
        assert node.peak_bytes <= 1.05 * part.need_bytes
