"""Real processes that change the weights while they load them: the tokens are those of one process."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import openai
import pytest
from mlx_lm.convert import convert

from planner.plan import Plan
from tests.reference import greedy, greedy_of
from tests.ring_processes import RingProcesses
from tests.tiny_adapters import adapted, write_adapter
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
    load = {"quantize": {"bits": 8, "group_size": 32}, "cache_dir": str(tmp_path / "cache")}
    with RingProcesses(tmp_path, model, LAYERS, load=load) as ring:
        status = ring.wait_ok()
        check(ring, tmp_path / "q")
        assert len(list((tmp_path / "cache").glob("*/manifest.json"))) == len(LAYERS)
        ring.kill(1)
        ring.wait_status(lambda s: s.status != "ok")
        ring.start(1)  # its layers come from the cache now
        ring.wait_ok()
        check(ring, tmp_path / "q")
        plan = Plan.from_json(status.plan_json)
        measured = {r.rank: r.node.footprint for r in ring.wait_status(lambda s: len(s.ranks) == 3).ranks}
    for stage in plan.assignments:
        part = measured[stage.rank]
        own = part.layers_bytes + part.embed_bytes + part.norm_bytes + part.head_bytes + part.other_bytes
        assert abs(stage.weight_bytes - own) <= 0.01 * own


def test_adapters_over_three_nodes_equal_mlx_lm(tmp_path: Path) -> None:
    model = write_checkpoint("qwen3", tmp_path / "model", num_layers=NUM_LAYERS)
    folders: dict[str, Path | None] = {
        "": None,
        "sql": write_adapter(model, tmp_path / "sql"),
        "poet": write_adapter(model, tmp_path / "poet", kind="dora", keys=["mlp.down_proj"], seed=2),
    }
    load = {"adapters": [{"name": name, "path": name} for name in folders if name]}
    with (
        RingProcesses(tmp_path, model, LAYERS, with_api=True, load=load) as ring,
        ThreadPoolExecutor(len(folders)) as pool,
    ):
        url = ring.wait_api()

        def answer(name: str) -> tuple[list[int], list[float]]:
            replies = ring.generate(PROMPTS[1], 16, adapter=name, logprobs=True)
            got = [t for reply in replies for t in reply.tokens]
            return [t.id for t in got], [t.logprob for t in got]

        answers = dict(zip(folders, pool.map(answer, folders), strict=True))  # all at once, interleaved
        expected = {name: greedy_of(adapted(model, path), PROMPTS[1], 16) for name, path in folders.items()}
        assert answers == expected
        assert len({str(tokens) for tokens, _ in answers.values()}) == 3
        with pytest.raises(grpc.RpcError, match="there is no adapter 'nobody' here; there are: sql, poet"):
            ring.generate([1], 1, adapter="nobody")

        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        with client:
            assert [m.id for m in client.models.list()] == ["model", "sql", "poet"]
            for name in ("model", "sql", "poet"):
                done = client.completions.create(
                    model=name,
                    prompt=PROMPTS[1],
                    max_tokens=16,
                    temperature=0,
                    extra_body={"return_token_ids": True, "ignore_eos": True},
                )
                tokens = expected["" if name == "model" else name][0]
                assert (done.model, done.choices[0].model_extra["token_ids"]) == (name, tokens)
            with pytest.raises(openai.NotFoundError, match="the served models are 'model', 'sql', 'poet'"):
                client.completions.create(model="nobody", prompt="x")
