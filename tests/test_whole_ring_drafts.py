"""A real ring with a draft model: the same tokens as without, some of them guessed, and refusals in words."""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path

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


@pytest.fixture(scope="module")
def misled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RingProcesses]:
    """A ring whose draft model is never right: the demo model's last layer, and then its first."""
    folder = tmp_path_factory.mktemp("misled")
    draft = write_pruned(DEMO, folder / "draft", [8, 0])
    with RingProcesses(
        folder,
        DEMO,
        [(0, 5), (5, 9)],
        concurrency=2,
        context=512,
        faults=dict.fromkeys(range(2), "layer_delay_ms=4"),
        with_api=True,
        speculation={"method": "draft", "draft_model": str(draft)},
    ) as made:
        made.wait_ok()
        yield made


def num_passes(ring: RingProcesses) -> int:
    return ring.node_status(0).drafter.num_passes


def answered(ring: RingProcesses, sampling: ring_pb2.Sampling, num_tokens: int = NUM_TOKENS) -> list[int]:
    request = head_pb2.GenerateRequest(prompt=PROMPT, max_tokens=num_tokens, sampling=sampling)
    with ring.channel() as channel:
        replies = head_pb2_grpc.HeadStub(channel).Generate(request, timeout=120.0)
        return [token.id for reply in replies for token in reply.tokens]


def alone(sampling: ring_pb2.Sampling, num_tokens: int = NUM_TOKENS) -> list[int]:
    """One token at a time, in this process."""
    shard = load_shard(DEMO, 0, NUM_LAYERS)
    sampler, state, tokens = Sampler(sampling, VOCAB_SIZE), shard.new_state(), list(PROMPT)
    for _ in range(num_tokens):
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
    expected = alone(sampling)
    for _ in range(6):  # the first of them may fall into a pause
        assert answered(ring, sampling) == expected
        if ring.wait_ok().num_guessed_right > before.num_guessed_right:
            return
    pytest.fail("no guess was right")


def test_one_that_agrees_is_asked_in_every_answer_and_never_pauses(tmp_path: Path) -> None:
    """The draft model is the model: with a temperature, and so the same noise, it is right each time."""
    draft = write_pruned(DEMO, tmp_path / "draft", range(NUM_LAYERS))
    sampling = ring_pb2.Sampling(temperature=0.3, seed=7)
    speculation = {"method": "draft", "draft_model": str(draft)}
    with RingProcesses(
        tmp_path, DEMO, [(0, 5), (5, 9)], concurrency=1, faults=WAITS, speculation=speculation
    ) as ring:
        ring.wait_ok()
        for number in range(4):
            before, drafted = num_passes(ring), ring.wait_ok().num_drafted
            assert answered(ring, sampling) == alone(sampling)
            if number:  # the first one learned what a trip takes
                assert num_passes(ring) - before > NUM_TOKENS / 2
                assert ring.wait_ok().num_drafted - drafted > NUM_TOKENS / 2
        assert ring.wait_ok().num_draft_pauses == 0


@pytest.mark.parametrize("heat", [0.0, 0.8])
def test_one_that_disagrees_pauses_and_computes_nothing_meanwhile(misled: RingProcesses, heat: float) -> None:
    """The answers are those without; its passes are a few for each trial, and none in a pause."""
    sampling = ring_pb2.Sampling(temperature=heat, seed=5)
    before, pauses = num_passes(misled), misled.wait_ok().num_draft_pauses
    num_tokens, passes = 0, []
    for _ in range(3):
        began = num_passes(misled)
        assert answered(misled, sampling, 160) == alone(sampling, 160)
        passes.append(num_passes(misled) - began)
        num_tokens += 160
    assert num_passes(misled) - before < 0.1 * num_tokens, passes
    began, paused = num_passes(misled), misled.wait_ok().num_draft_pauses
    assert paused > pauses
    for _ in range(2):  # shorter than what is left of the pause
        answered(misled, sampling, 8)
    assert num_passes(misled) == began
    assert misled.wait_ok().num_draft_pauses == paused


def test_the_metrics_count_what_is_drafted_and_its_pauses(misled: RingProcesses) -> None:
    answered(misled, ring_pb2.Sampling(), 80)
    wanted = misled.wait_ok()
    url = misled.wait_api()

    def is_told() -> bool:  # by the HTTP process a moment later
        with urllib.request.urlopen(f"{url}/metrics") as page:
            lines = page.read().decode().splitlines()
        told = dict(line.rsplit(" ", 1) for line in lines if line.startswith("macrame_head_draft"))
        return (
            float(told["macrame_head_drafted_tokens_total"]) == wanted.num_drafted
            and float(told["macrame_head_draft_pauses_total"]) == wanted.num_draft_pauses > 0
        )

    wait_for(is_told)


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
    assert told[1] == {"model": "", "weight_bytes": 0, "kv_bytes": 0, "num_passes": 0}
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
