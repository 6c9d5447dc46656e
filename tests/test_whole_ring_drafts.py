"""A real ring with a draft model: the same tokens as without, some of them guessed, and refusals in words."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import mlx.core as mx
import pytest

from cluster.sampler import Sampler
from deploy import status
from deploy.demo.run import CONFIG
from proto import head_pb2, head_pb2_grpc, ring_pb2
from shard_loader.weights import load_shard
from tests.pruned_model import write_pruned
from tests.ring_processes import RingProcesses
from tests.waiting import wait_for

pytestmark = pytest.mark.long

DEMO = CONFIG.parent / "model"
NUM_LAYERS, VOCAB_SIZE = 9, 4096
PROMPT = [(37 * i) % 4000 + 40 for i in range(24)]
NUM_TOKENS = 32
# A trip takes 360 ms of waiting: guesses are worth their time on any machine.
WAITS = dict.fromkeys(range(2), "layer_delay_ms=40")


@pytest.fixture(scope="module")
def ring(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RingProcesses]:
    folder = tmp_path_factory.mktemp("drafted")
    draft = write_pruned(DEMO, folder / "draft", [0, 1, 2, 3, 4, 5, 7, 8])
    with RingProcesses(
        folder,
        DEMO,
        [(0, 5), (5, 9)],
        concurrency=2,
        context=512,
        faults=WAITS,
        with_api=True,
        speculation={"method": "draft", "draft_model": str(draft)},
    ) as made:
        made.wait_ok()
        answered(made, ring_pb2.Sampling(), 8)  # it learns what a trip takes
        yield made


def answered(ring: RingProcesses, sampling: ring_pb2.Sampling, num_tokens: int = NUM_TOKENS) -> list[int]:
    request = head_pb2.GenerateRequest(prompt=PROMPT, max_tokens=num_tokens, sampling=sampling)
    with ring.channel() as channel:
        replies = head_pb2_grpc.HeadStub(channel).Generate(request, timeout=120.0)
        return [token.id for reply in replies for token in reply.tokens]


def alone(sampling: ring_pb2.Sampling) -> list[int]:
    """One token at a time, in this process."""
    shard = load_shard(DEMO, 0, NUM_LAYERS)
    sampler, state, tokens = Sampler(sampling, VOCAB_SIZE), shard.new_state(), list(PROMPT)
    for _ in range(NUM_TOKENS):
        logits = shard.forward(mx.array([tokens[state.position :]]), None, state)[0, -1]
        draw = sampler.draw(logits, len(tokens), tokens, len(PROMPT))
        mx.eval(draw.arrays(), state.arrays())
        tokens.append(draw.finish().id)
    return tokens[len(PROMPT) :]


@pytest.mark.parametrize(
    "sampling",
    [
        ring_pb2.Sampling(),
        ring_pb2.Sampling(temperature=0.5, top_p=0.9, seed=3),
        ring_pb2.Sampling(temperature=0.4, repetition_penalty=1.1, seed=4),
    ],
)
def test_answers_are_those_without_and_part_of_them_is_guessed(
    ring: RingProcesses, sampling: ring_pb2.Sampling
) -> None:
    before = ring.wait_ok()
    assert answered(ring, sampling) == alone(sampling)
    after = ring.wait_ok()
    assert after.num_guessed_right > before.num_guessed_right


def test_the_plan_and_the_status_name_it(ring: RingProcesses) -> None:
    assert '"drafter":{"model":' in ring.wait_ok().plan_json


def test_the_status_tells_its_bytes(ring: RingProcesses, capsys: pytest.CaptureFixture[str]) -> None:
    """What the plan says of its weights, and its caches, which the answers before left; in both forms."""
    answered(ring, ring_pb2.Sampling(), 8)
    planned = json.loads(ring.wait_ok().plan_json)["drafter"]
    url = ring.wait_api()
    told = {}

    def has_heard() -> bool:  # the HTTP process a moment later
        assert status.main(["--url", url, "--json"]) == 0
        told.update({n["rank"]: n["node"]["drafter"] for n in json.loads(capsys.readouterr().out)["nodes"]})
        return bool(told[0]["kv_bytes"])

    wait_for(has_heard)
    assert told[0]["model"] == planned["model"]
    assert told[0]["weight_bytes"] == pytest.approx(planned["weight_bytes"], rel=0.03)
    assert 0 < told[0]["kv_bytes"] <= planned["kv_bytes"]
    assert told[1] == {"model": "", "weight_bytes": 0, "kv_bytes": 0}
    assert status.main(["--url", url]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "the draft model" in line)
    assert re.search(
        r"^rank 0 \(n0\): the draft model \S+ has [\d.]+ MB of weights and [\d.]+ [kM]B of ", line
    )


def test_an_answer_that_is_given_up_leaves_room_for_the_next(ring: RingProcesses) -> None:
    request = head_pb2.GenerateRequest(prompt=PROMPT, max_tokens=400)
    with ring.channel() as channel:
        call = head_pb2_grpc.HeadStub(channel).Generate(request, timeout=120.0)
        for _ in range(4):
            next(call)
        call.cancel()
    assert answered(ring, ring_pb2.Sampling()) == alone(ring_pb2.Sampling())
