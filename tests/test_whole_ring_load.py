"""Real processes that change the weights while they load them: the tokens are those of one process."""

from __future__ import annotations

import itertools
from pathlib import Path

from mlx_lm.convert import convert

from planner.plan import Plan
from tests.reference import greedy
from tests.ring_processes import RingProcesses
from tests.tiny_models import write_checkpoint

NUM_LAYERS = 5
LAYERS = list(itertools.pairwise([0, 1, 4, NUM_LAYERS]))
PROMPTS = ([72, 101, 108, 108, 111], list(range(40, 61)))


def check(ring: RingProcesses, model: Path) -> None:
    """Greedy tokens and their log-probabilities, bit for bit those of `model` in mlx-lm."""
    for prompt in PROMPTS:
        replies = ring.generate(prompt, 16, logprobs=True)
        got = [(t.id, t.logprob) for reply in replies for t in reply.tokens]
        assert ([t for t, _ in got], [p for _, p in got]) == greedy(model, prompt, 16)


def test_quantised_on_load_over_three_nodes_equals_mlx_lm_convert(tmp_path: Path) -> None:
    wide = {"hidden_size": 256, "moe_intermediate_size": 128}
    model = write_checkpoint(
        "qwen3_moe", tmp_path / "model", num_layers=NUM_LAYERS, unstack_experts=True, overrides=wide
    )
    convert(str(model), str(tmp_path / "q"), quantize=True, q_bits=8, q_group_size=32)
    load = {"quantize": {"bits": 8, "group_size": 32}}
    with RingProcesses(tmp_path, model, LAYERS, load=load) as ring:
        status = ring.wait_ok()
        check(ring, tmp_path / "q")
        plan = Plan.from_json(status.plan_json)
        measured = {r.rank: r.node.footprint for r in ring.wait_status(lambda s: len(s.ranks) == 3).ranks}
    for stage in plan.assignments:
        part = measured[stage.rank]
        own = part.layers_bytes + part.embed_bytes + part.norm_bytes + part.head_bytes + part.other_bytes
        assert abs(stage.weight_bytes - own) <= 0.01 * own
