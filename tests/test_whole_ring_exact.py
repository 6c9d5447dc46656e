"""Real processes, real gRPC: the ring's tokens are mlx-lm's tokens, and the log-probabilities bit for bit."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from tests.reference import greedy
from tests.ring_processes import RingProcesses
from tests.tiny_models import write_checkpoint
from tests.zoo.checkpoint import write_zoo_checkpoint

DEMO = Path(__file__).parent.parent / "deploy" / "demo" / "model"
PROMPTS = ([72, 101, 108, 108, 111], list(range(40, 61)), [7], [200, 3, 3, 3, 90, 14, 61, 8, 2])
NUM_LAYERS = 5
LONG = partial(pytest.param, marks=pytest.mark.long)
CUTS = {1: [], 2: [2], 3: [1, 4], 5: [1, 2, 3, 4]}


def ranges(num_layers: int, cuts: Sequence[int]) -> list[tuple[int, int]]:
    bounds = [0, *cuts, num_layers]
    return list(itertools.pairwise(bounds))


def check(ring: RingProcesses, model: Path, prompt: Sequence[int], max_tokens: int = 24) -> None:
    replies = ring.generate(prompt, max_tokens, logprobs=True)
    got = [(t.id, t.logprob) for reply in replies for t in reply.tokens]
    tokens, logprobs = greedy(model, prompt, max_tokens)
    assert [t for t, _ in got] == tokens
    assert [p for _, p in got] == logprobs
    last = replies[-1]
    assert (last.finish_reason, last.prompt_tokens, last.completion_tokens) == (
        "length",
        len(prompt),
        max_tokens,
    )


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint("llama", tmp_path_factory.mktemp("llama") / "llama", num_layers=NUM_LAYERS)


@pytest.fixture(scope="module")
def llama_ring(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RingProcesses]:
    """Three stages that serve four at once, for all tests that leave them as they are."""
    directory = tmp_path_factory.mktemp("ring")
    with RingProcesses(directory, llama, ranges(NUM_LAYERS, CUTS[3]), concurrency=4) as ring:
        ring.wait_ok()
        yield ring


def test_three_stages_of_a_plain_model(llama: Path, llama_ring: RingProcesses) -> None:
    for prompt in PROMPTS:
        check(llama_ring, llama, prompt)


@pytest.mark.parametrize(
    "arch", [LONG("qwen3"), LONG("gemma3_text"), "gpt_oss", LONG("deepseek_v3"), LONG("mamba2")]
)
def test_three_stages(arch: str, tmp_path: Path) -> None:
    model = write_checkpoint(arch, tmp_path / arch, num_layers=NUM_LAYERS)
    with RingProcesses(tmp_path, model, ranges(NUM_LAYERS, CUTS[3])) as ring:
        ring.wait_ok()
        for prompt in PROMPTS:
            check(ring, model, prompt)


@pytest.mark.parametrize(
    "name",
    [*map(LONG, ["deepseek_v41", "gemma3n", "gemma4_text", "kimi_k3", "rwkv7"]), "qwen3_next"],
)
def test_carries_that_are_more_than_one_array(name: str, tmp_path: Path) -> None:
    """With those above, twelve architectures; cut between layers that share caches, dicts and objects."""
    model = write_zoo_checkpoint(name, tmp_path / name)
    with RingProcesses(tmp_path, model, [(0, 3), (3, 5), (5, 7)]) as ring:
        ring.wait_ok()
        for prompt in ([7], list(range(40, 61)), [100, 3, 3, 3, 90, 14, 61, 8, 2]):
            check(ring, model, prompt, 12)


@pytest.mark.long
@pytest.mark.parametrize("num_stages", [1, 2, 5])
@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma3_text", "gpt_oss", "deepseek_v3", "mamba2"])
def test_other_numbers_of_stages(arch: str, num_stages: int, tmp_path: Path) -> None:
    model = write_checkpoint(arch, tmp_path / arch, num_layers=NUM_LAYERS)
    with RingProcesses(tmp_path, model, ranges(NUM_LAYERS, CUTS[num_stages])) as ring:
        ring.wait_ok()
        for prompt in PROMPTS:
            check(ring, model, prompt)


@pytest.mark.long
@pytest.mark.parametrize("cuts", [[], [4], [2, 7], [1, 3, 4, 8]])
def test_demo_model(cuts: list[int], tmp_path: Path) -> None:
    with RingProcesses(tmp_path, DEMO, ranges(9, cuts), context=1024) as ring:
        ring.wait_ok()
        for prompt in PROMPTS:
            check(ring, DEMO, prompt)


def test_four_users_at_once_equal_each_alone(llama: Path, llama_ring: RingProcesses) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda prompt: llama_ring.tokens(prompt, 40), [*PROMPTS, *PROMPTS]))
    for prompt, answer in zip([*PROMPTS, *PROMPTS], answers, strict=True):
        assert answer == greedy(llama, prompt, 40)[0]


MANY = 10  # users, of a ring with four frames in flight


def many(architecture: str, tmp_path: Path) -> None:
    """Users who come and go, three to a frame: each gets what it would get alone."""
    model = write_checkpoint(architecture, tmp_path / "model", num_layers=NUM_LAYERS)
    prompts = [[(7 * i + 13 * user) % 251 for i in range(2 + 5 * user)] for user in range(MANY)]
    lengths = [10 + 9 * (user * 3 % MANY) for user in range(MANY)]
    with (
        RingProcesses(tmp_path, model, ranges(NUM_LAYERS, CUTS[3]), concurrency=MANY) as ring,
        ThreadPoolExecutor(MANY) as pool,
    ):
        ring.wait_ok()
        answers = list(pool.map(ring.tokens, prompts, lengths))
        stats = ring.node_status(2).stats
    for prompt, length, answer in zip(prompts, lengths, answers, strict=True):
        assert answer == greedy(model, prompt, length)[0]
    assert stats.num_steps < 0.95 * sum(lengths)  # chunks included: they did share forward passes


def test_users_who_share_forward_passes_equal_each_alone(tmp_path: Path) -> None:
    many("qwen3_moe", tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("architecture", ["llama", "gpt_oss", "gemma3_text", "deepseek_v3", "mamba2"])
def test_more_that_share_forward_passes(architecture: str, tmp_path: Path) -> None:
    many(architecture, tmp_path)


def burst(architecture: str, lengths: Sequence[int], tmp_path: Path) -> None:
    """Users who come while frames are in the ring: their prompts are read together."""
    model = write_checkpoint(architecture, tmp_path / "model", num_layers=NUM_LAYERS)
    prompts = [[(7 * i + 13 * user + 1) % 251 for i in range(length)] for user, length in enumerate(lengths)]
    with (
        RingProcesses(
            tmp_path,
            model,
            ranges(NUM_LAYERS, CUTS[3]),
            concurrency=len(prompts),
            faults={1: "layer_delay_ms=20"},
        ) as ring,
        ThreadPoolExecutor(len(prompts)) as pool,
    ):
        ring.wait_ok()
        answers = list(pool.map(lambda prompt: ring.tokens(prompt, 12), prompts))
        chunks = ring.node_status(2).stats.chunk_tokens
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer == greedy(model, prompt, 12)[0]
    assert max(chunks) > max(lengths)  # tokens of several prompts in one pass
    assert len(chunks) < len(prompts)


EQUAL, RANDOM = [24] * 12, [9, 40, 23, 31, 12, 55, 40, 17, 29, 8, 40, 23]


@pytest.mark.parametrize("lengths", [LONG(EQUAL), RANDOM])
def test_a_burst_whose_prompts_are_read_together_equals_each_alone(
    lengths: list[int], tmp_path: Path
) -> None:
    burst("gpt_oss", lengths, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("lengths", [EQUAL, RANDOM])
@pytest.mark.parametrize("architecture", ["llama", "qwen3_moe", "gemma3_text", "deepseek_v3", "mamba2"])
def test_more_bursts(architecture: str, lengths: list[int], tmp_path: Path) -> None:
    burst(architecture, lengths, tmp_path)


def test_a_long_prompt_is_prefilled_in_chunks(tmp_path: Path) -> None:
    model = write_checkpoint("gemma3_text", tmp_path / "model", num_layers=NUM_LAYERS)
    prompt = [(7 * i) % 251 for i in range(1300)]
    with RingProcesses(tmp_path, model, ranges(NUM_LAYERS, CUTS[3]), context=2048) as ring:
        ring.wait_ok()
        check(ring, model, prompt, 12)
        # 512, 512 and 260 tokens, where a copy is kept, 15, the last one; and each drawn one but the last
        assert ring.node_status(2).stats.num_steps == 3 + 2 + 11


def test_the_head_may_own_no_layers_and_stages_may_be_in_any_order(llama: Path, tmp_path: Path) -> None:
    layers = [None, (3, 5), (0, 3)]
    with RingProcesses(tmp_path, llama, layers) as ring:
        status = ring.wait_ok()
        assert {r.rank: r.state for r in status.ranks} == {0: "ready", 1: "ready", 2: "ready"}
        check(ring, llama, PROMPTS[0])


def test_a_seed_draws_alike_on_any_plan_and_in_any_company(
    llama: Path, llama_ring: RingProcesses, tmp_path: Path
) -> None:
    sampling = {"temperature": 1.0, "top_p": 0.95, "seed": 1234}
    answers = []
    with RingProcesses(tmp_path, llama, ranges(NUM_LAYERS, CUTS[2])) as two, ThreadPoolExecutor(3) as pool:
        two.wait_ok()
        for ring in (two, llama_ring):
            answers.append(ring.tokens(PROMPTS[0], 32, **sampling))
            answers += pool.map(lambda _, r=ring: r.tokens(PROMPTS[0], 32, **sampling), range(3))
            other = ring.tokens(PROMPTS[0], 32, **sampling | {"seed": 1235})
    assert all(answer == answers[0] for answer in answers)
    assert other != answers[0]
