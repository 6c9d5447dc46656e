"""A chat's second turn on a real ring: read from where the first one ended, and the tokens are the same."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.reference import greedy
from tests.ring_processes import RingProcesses
from tests.tiny_models import write_checkpoint
from tests.waiting import wait_for

NUM_LAYERS = 5
LAYERS = [(0, 1), (1, 4), (4, 5)]
PROMPT = [(7 * i) % 251 for i in range(40)]


def turns(architecture: str, tmp_path: Path) -> None:
    model = write_checkpoint(architecture, tmp_path / "model", num_layers=NUM_LAYERS)
    with RingProcesses(tmp_path, model, LAYERS, context=512) as ring:
        ring.wait_ok()
        prompt, known = PROMPT, 0
        for turn in range(3):
            replies = ring.generate(prompt, 12)
            answer = [token.id for reply in replies for token in reply.tokens]
            assert answer == greedy(model, prompt, 12)[0]
            assert replies[0].cached_tokens == known
            prompt, known = [*prompt, *answer, 3, 14, 15 + turn], len(prompt) + 11
        status = ring.wait_ok()
        assert status.num_kept >= 1  # and copies of prompts, where caches cannot be shortened
        assert (status.num_prompts, status.num_cached_prompts) == (3, 2)
        assert status.num_cached_tokens == 51 + 66


def test_a_chat_goes_on_where_it_was(tmp_path: Path) -> None:
    turns("qwen3", tmp_path)


@pytest.mark.long
@pytest.mark.parametrize(
    "architecture", ["llama", "gpt_oss", "gemma3_text", "deepseek_v3", "mamba2", "qwen3_moe"]
)
def test_chats_of_other_architectures(architecture: str, tmp_path: Path) -> None:
    turns(architecture, tmp_path)


def test_what_is_kept_goes_for_what_is_new_and_with_its_epoch(tmp_path: Path) -> None:
    model = write_checkpoint("llama", tmp_path / "model", num_layers=NUM_LAYERS)
    with RingProcesses(tmp_path, model, LAYERS, context=512, concurrency=1) as ring:
        ring.wait_ok()
        ring.tokens(PROMPT, 8)
        kept_bytes = ring.node_status(1).kv_bytes
        assert kept_bytes > 0
        assert ring.node_status(1).num_sessions == 0
        other = list(range(60, 100))
        assert ring.tokens(other, 450) == greedy(model, other, 450)[0]  # all of the room
        assert ring.generate(PROMPT, 8)[0].cached_tokens == 0
        ring.kill(1)
        ring.start(1)
        ring.wait_ok()
        wait_for(lambda: ring.wait_ok().num_kept == 0, 5.0)
        assert all(ring.node_status(rank).kv_bytes == 0 for rank in range(3))
        assert ring.tokens(PROMPT, 8) == greedy(model, PROMPT, 8)[0]


@pytest.mark.long
@pytest.mark.parametrize("architecture", ["mamba2", "gpt_oss", "gemma3_text"])
def test_chats_on_caches_that_cannot_be_shortened(architecture: str, tmp_path: Path) -> None:
    """Turns that leave out the end of the last one, a system prompt, two at once, and a node that dies."""
    model = write_checkpoint(architecture, tmp_path / "model", num_layers=NUM_LAYERS)
    with RingProcesses(tmp_path, model, LAYERS, context=512, concurrency=8) as ring:
        ring.wait_ok()
        assert known(ring, model, [*PROMPT, 3, 4, 5]) == 0
        assert known(ring, model, [*PROMPT[:-6], *range(60, 90)]) == 43 - 16
        other = [*PROMPT[:20], *range(100, 140)]
        assert known(ring, model, other) == 0  # it makes the copy at which
        assert known(ring, model, [*PROMPT[:20], *range(130, 170)]) == 20  # this one begins
        with ThreadPoolExecutor(4) as pool:
            prompts = [[*other[:-5], 150 + chat, *range(30 + chat)] for chat in range(4)]
            assert list(pool.map(lambda prompt: known(ring, model, prompt), prompts)) == [44] * 4
        status = ring.wait_ok()
        assert (status.num_prompts, status.num_cached_prompts) == (8, 6)
        ring.kill(2)
        ring.start(2)
        ring.wait_ok()
        wait_for(lambda: ring.wait_ok().num_kept == 0, 5.0)
        assert known(ring, model, other) == 0
        assert known(ring, model, other) == 44


@pytest.mark.parametrize("architecture", ["gpt_oss", pytest.param("llama", marks=pytest.mark.long)])
def test_prompts_that_come_at_once_and_begin_alike_are_read_once(architecture: str, tmp_path: Path) -> None:
    """Whether caches can be shortened or not."""
    model = write_checkpoint(architecture, tmp_path / "model", num_layers=NUM_LAYERS)
    system = [(11 * i) % 241 for i in range(700)]
    prompts = [[*system, 242 + chat, *range(9 * chat, 9 * chat + 20)] for chat in range(4)]
    with RingProcesses(tmp_path, model, LAYERS, context=1024, concurrency=16) as ring:
        ring.wait_ok()
        with ThreadPoolExecutor(len(prompts)) as pool:
            answers = list(pool.map(lambda prompt: ring.generate(prompt, 4), prompts))
        assert ring.wait_ok().num_active == 0
    cached = sorted(replies[0].cached_tokens for replies in answers)
    assert cached in ([0, 700, 700, 700], [0, 0, 700, 700]), "the first may be past it when the second comes"
    for prompt, replies in zip(prompts, answers, strict=True):
        assert [token.id for reply in replies for token in reply.tokens] == greedy(model, prompt, 4)[0]


def known(ring: RingProcesses, model: Path, prompt: list[int]) -> int:
    """How many of the prompt's tokens were not read again; its answer is the whole model's."""
    replies = ring.generate(prompt, 8)
    assert [token.id for reply in replies for token in reply.tokens] == greedy(model, prompt, 8)[0]
    return replies[0].cached_tokens
