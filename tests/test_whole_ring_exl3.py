"""Real processes that hold an EXL3 model: tokens and log-probabilities of one process, as planned."""

from __future__ import annotations

import itertools
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.utils import load_model

from planner.plan import Plan
from shard_loader.weights import load_lazily
from tests.emulated import needs_compiler
from tests.reference import greedy_of
from tests.ring_processes import RingProcesses
from tests.test_exl3_loading import all_kinds
from tests.tiny_exl3 import write_exl3

NUM_LAYERS = 5
LAYERS = list(itertools.pairwise([0, 1, 4, NUM_LAYERS]))
PROMPTS = ([72, 101, 108, 108, 111], list(range(40, 61)))


@pytest.mark.long
@pytest.mark.parametrize("arch", ["llama", "qwen3_moe"])
def test_three_stages_give_the_tokens_of_one_process_and_of_the_decoded_weights(
    tmp_path: Path, arch: str
) -> None:
    exl3, plain = write_exl3(arch, tmp_path / "models", num_layers=NUM_LAYERS, kind_of=all_kinds)
    decoded = load_model(plain)[0]
    with RingProcesses(tmp_path, exl3, LAYERS) as ring:
        status = ring.wait_ok()
        for prompt in PROMPTS:
            replies = ring.generate(prompt, 16, logprobs=True)
            got = [(t.id, t.logprob) for reply in replies for t in reply.tokens]
            tokens, logprobs = greedy_of(load_lazily(exl3), prompt, 16)
            assert ([t for t, _ in got], [p for _, p in got]) == (tokens, logprobs)  # bit for bit
            close_tokens, close_logprobs = greedy_of(decoded, prompt, 16)
            assert tokens == close_tokens
            assert mx.allclose(mx.array(logprobs), mx.array(close_logprobs), atol=1e-4)
        plan = Plan.from_json(status.plan_json)
        measured = {r.rank: r.node.footprint for r in ring.wait_status(lambda s: len(s.ranks) == 3).ranks}
    for stage in plan.assignments:
        part = measured[stage.rank]
        own = part.layers_bytes + part.embed_bytes + part.norm_bytes + part.head_bytes + part.other_bytes
        assert abs(stage.weight_bytes - own) <= 0.03 * own


@pytest.mark.long
@pytest.mark.timeout(600)
@needs_compiler
@pytest.mark.parametrize("arch", ["llama", "qwen3_moe"])
def test_three_stages_with_kernels_give_the_same_tokens(tmp_path: Path, arch: str) -> None:
    exl3, plain = write_exl3(arch, tmp_path / "models", num_layers=NUM_LAYERS)
    decoded = load_model(plain)[0]
    env = {"MACRAME_KERNELS": "emulate"}
    with RingProcesses(tmp_path, exl3, LAYERS, env=env) as ring:
        ring.wait_ok(300)
        replies = ring.generate(PROMPTS[0], 8, logprobs=True)
        got = [t for reply in replies for t in reply.tokens]
        tokens, logprobs = greedy_of(decoded, PROMPTS[0], 8)
        assert [t.id for t in got] == tokens
        assert [t.logprob for t in got] == pytest.approx(logprobs, abs=1e-3)
        told = ring.node_status(1).kernels
    assert told.num_matrices > 0
    assert all(one.is_taken for one in told.verdicts)
