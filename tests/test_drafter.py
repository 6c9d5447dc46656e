"""A draft model by itself: what it guesses, what it reads, what it forgets."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import cast

import mlx.core as mx
import pytest

from cluster.drafter import DraftCall, Drafter
from cluster.sampler import Sampler
from planner.draft_bytes import MAX_LOGIT_ROWS, READ_CHUNK_TOKENS, session_bytes
from planner.model_profile import read_model_profile
from proto import ring_pb2
from shard_loader.shard import ShardError
from shard_loader.weights import load_shard
from tests.reference import greedy
from tests.tiny_models import VOCAB_SIZE, write_checkpoint

LAYERS = 3
CONTEXT = 4096
PROMPT = [(7 * i) % 250 for i in range(40)]
GREEDY = ring_pb2.Sampling()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def make(arch: str) -> Path:
        if arch not in made:
            folder = tmp_path_factory.mktemp(arch)
            made[arch] = write_checkpoint(arch, folder, num_layers=LAYERS)
        return made[arch]

    return make


def drafter_of(
    folder: Path,
    *,
    vocab_size: int = VOCAB_SIZE,
    max_context: int = CONTEXT,
    num_contexts: float = 4,
    min_confidence: float | None = 0.0,
) -> Drafter:
    profile = read_model_profile(folder)

    return Drafter(
        load_shard(folder, 0, LAYERS),
        "the draft",
        vocab_size=vocab_size,
        max_context=max_context,
        kv_bytes=partial(session_bytes, profile),
        max_kv_bytes=int(num_contexts * session_bytes(profile, CONTEXT)),
        min_confidence=min_confidence,
    )


def counted(drafter: Drafter, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of all passes from now on."""
    lengths: list[int] = []
    forward = drafter.shard.forward

    def count(tokens: mx.array, carry: object, state: object) -> object:
        lengths.append(tokens.shape[1])
        return forward(tokens, carry, state)  # type: ignore[arg-type]

    monkeypatch.setattr(drafter.shard, "forward", count)
    return lengths


@pytest.mark.parametrize("arch", ["llama", "gemma3_text", "mamba2"])
def test_it_guesses_what_its_model_answers_whatever_was_right(
    arch: str, checkpoint: Callable[[str], Path]
) -> None:
    """Caches that keep every token, windows that have wrapped, and states that keep none."""
    folder = checkpoint(arch)
    drafter = drafter_of(folder)
    answer = greedy(folder, PROMPT, 40)[0]
    num_known = 0
    for num_right in itertools.islice(itertools.cycle([4, 0, 2, 3, 1]), 10):
        known = [*PROMPT, *answer[:num_known]]
        assert drafter.draft(DraftCall(1, known, 4, GREEDY, len(PROMPT))) == answer[num_known : num_known + 4]
        num_known += num_right + 1


def test_after_a_wrong_guess_only_the_new_token_is_read(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    drafter = drafter_of(checkpoint("llama"))
    lengths = counted(drafter, monkeypatch)
    guesses = drafter.draft(DraftCall(1, PROMPT, 4, GREEDY, len(PROMPT)))
    assert lengths == [len(PROMPT) - 1, 1, 1, 1, 1]
    lengths.clear()
    other = (guesses[2] + 1) % 250
    drafter.draft(DraftCall(1, [*PROMPT, *guesses[:2], other], 3, GREEDY, len(PROMPT)))
    assert lengths == [1, 1, 1]
    lengths.clear()
    drafter.draft(DraftCall(1, [*PROMPT, 5, 6], 1, GREEDY, len(PROMPT)))
    assert lengths == [2]


def test_a_long_prompt_is_read_in_pieces_and_not_guessed_after_until_then(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint("llama")
    drafter = drafter_of(folder)
    lengths = counted(drafter, monkeypatch)
    prompt = [(11 * i) % 250 for i in range(2 * READ_CHUNK_TOKENS + 50)]
    assert drafter.draft(DraftCall(1, prompt, 4, GREEDY, len(prompt))) == []
    assert drafter.draft(DraftCall(1, prompt, 4, GREEDY, len(prompt))) == []
    assert lengths == [READ_CHUNK_TOKENS] * 2
    assert drafter.draft(DraftCall(1, prompt, 4, GREEDY, len(prompt))) == greedy(folder, prompt, 4)[0]
    assert lengths == [READ_CHUNK_TOKENS] * 2 + [49, 1, 1, 1, 1]


def test_what_is_missing_is_read_on_when_there_is_time(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint("llama")
    drafter = drafter_of(folder)
    prompt = [(11 * i) % 250 for i in range(2 * READ_CHUNK_TOKENS + 50)]
    guessing = drafter.begin(DraftCall(1, prompt, 4, GREEDY, len(prompt)))
    assert guessing.step()
    assert guessing.ids == []
    while guessing.step():
        pass
    lengths = counted(drafter, monkeypatch)
    assert drafter.draft(DraftCall(1, prompt, 4, GREEDY, len(prompt))) == greedy(folder, prompt, 4)[0]
    assert lengths == [1, 1, 1, 1]


def test_a_few_tokens_are_read_together_with_the_first_draw(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    drafter = drafter_of(checkpoint("llama"))
    lengths = counted(drafter, monkeypatch)
    drafter.draft(DraftCall(1, PROMPT[:MAX_LOGIT_ROWS], 2, GREEDY, 4))
    assert lengths == [MAX_LOGIT_ROWS, 1]


SAMPLING = [
    ring_pb2.Sampling(temperature=0.9, seed=7),
    ring_pb2.Sampling(temperature=1.1, top_p=0.9, top_k=40, min_p=0.01, seed=8),
    ring_pb2.Sampling(temperature=0.8, seed=9, repetition_penalty=1.4, presence_penalty=0.5),
    ring_pb2.Sampling(repetition_penalty=1.3, frequency_penalty=0.4, min_tokens=9, stop_ids=[3, 4]),
    ring_pb2.Sampling(temperature=1.0, seed=2, logit_bias={5: 8.0, 6: -4.0}, top_logprobs=2),
]


def last_stage(folder: Path, sampling: ring_pb2.Sampling, num_tokens: int) -> list[int]:
    """What a ring whose model is the draft model draws."""
    shard = load_shard(folder, 0, LAYERS)
    sampler, state, tokens = Sampler(sampling, VOCAB_SIZE), shard.new_state(), list(PROMPT)
    for _ in range(num_tokens):
        logits = shard.forward(mx.array([tokens[state.position :]]), None, state)[0, -1]
        draw = sampler.draw(logits, len(tokens), tokens, len(PROMPT))
        mx.eval(draw.arrays())
        tokens.append(draw.finish().id)
    return tokens[len(PROMPT) :]


@pytest.mark.parametrize("sampling", SAMPLING)
def test_it_draws_with_the_last_stages_filters_and_randomness(
    sampling: ring_pb2.Sampling, checkpoint: Callable[[str], Path]
) -> None:
    """A draft model that is the model itself is always right, at any temperature."""
    folder = checkpoint("llama")
    drafter, answer = drafter_of(folder), last_stage(folder, sampling, 16)
    for num_known in range(0, 12, 3):
        known = [*PROMPT, *answer[:num_known]]
        assert (
            drafter.draft(DraftCall(1, known, 4, sampling, len(PROMPT))) == answer[num_known : num_known + 4]
        )


@pytest.mark.parametrize("width", [VOCAB_SIZE - 20, VOCAB_SIZE + 64])
def test_another_padding_of_the_vocabulary_changes_no_draw(
    width: int, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """Rows that no text uses: the noise is made for as many as the ring's model has."""
    folder = checkpoint("llama")
    config = json.loads((folder / "config.json").read_text()) | {"vocab_size": width}
    weights = cast("dict[str, mx.array]", mx.load(str(folder / "model.safetensors")))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        rows = weights[name]
        weights[name] = mx.concatenate([rows, mx.zeros((64, rows.shape[1]))])[:width]
    (tmp_path / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(tmp_path / "model.safetensors"), weights, {"format": "mlx"})
    sampling = ring_pb2.Sampling(temperature=0.7, seed=5, logit_bias=dict.fromkeys(range(200), 100.0))
    call = DraftCall(1, PROMPT, 8, sampling, len(PROMPT))
    guesses = drafter_of(tmp_path).draft(call)
    assert guesses == drafter_of(folder).draft(call)
    assert len(guesses) == 8


def test_ids_that_the_rings_model_has_not_are_never_guessed(tmp_path: Path) -> None:
    folder = write_checkpoint("llama", tmp_path, num_layers=LAYERS, overrides={"vocab_size": 400})
    drafter = drafter_of(folder, vocab_size=100)
    prompt = [token % 100 for token in PROMPT]
    for seed in range(5):
        guesses = drafter.draft(
            DraftCall(seed, prompt, 6, ring_pb2.Sampling(temperature=2.0, seed=seed), len(prompt))
        )
        assert len(guesses) == 6
        assert max(guesses) < 100


def test_a_window_ends_before_a_guess_that_is_not_likely(checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("llama")
    tokens, logprobs = greedy(folder, PROMPT, 8)
    least = sorted(mx.exp(mx.array(logprobs)).tolist())[2]  # two of eight are less likely
    first = next(i for i, logprob in enumerate(logprobs) if logprob < mx.log(mx.array(least)).item() - 1e-4)
    drafter = drafter_of(folder, min_confidence=least - 1e-4)
    assert drafter.draft(DraftCall(1, PROMPT, 8, GREEDY, len(PROMPT))) == tokens[:first]


def test_a_ring_longer_than_the_draft_models_context_is_not_guessed(
    checkpoint: Callable[[str], Path],
) -> None:
    drafter = drafter_of(checkpoint("llama"), max_context=len(PROMPT) + 4)
    assert len(drafter.draft(DraftCall(1, PROMPT, 4, GREEDY, len(PROMPT)))) == 4
    assert drafter.draft(DraftCall(1, [*PROMPT, 1], 4, GREEDY, len(PROMPT))) == []


def test_the_threshold_is_for_greedy_guesses(checkpoint: Callable[[str], Path]) -> None:
    """A random model is sure of nothing."""
    drafter = drafter_of(checkpoint("llama"), min_confidence=None)
    assert drafter.draft(DraftCall(1, PROMPT, 4, GREEDY, len(PROMPT))) == []
    drawn = ring_pb2.Sampling(temperature=1.0, seed=3)
    assert len(drafter.draft(DraftCall(2, PROMPT, 4, drawn, len(PROMPT)))) == 4


def test_memory_is_bounded_and_those_used_longest_ago_go(checkpoint: Callable[[str], Path]) -> None:
    drafter = drafter_of(checkpoint("llama"), num_contexts=2 / 16)  # of 256 tokens each: two sessions
    limit = drafter.readings.max_kv_bytes
    for session in range(1, 6):
        assert len(drafter.draft(DraftCall(session, PROMPT, 2, GREEDY, len(PROMPT)))) == 2
        assert drafter.kv_bytes <= limit
    assert drafter.num_sessions == 2
    assert drafter.kv_bytes == limit
    long = [1] * 600
    assert drafter.draft(DraftCall(9, long, 2, GREEDY, len(long))) == []
    assert drafter.num_sessions == 2, "what can never fit takes nothing from the others"
    assert drafter.nbytes == drafter.shard.footprint.total_bytes + drafter.kv_bytes


def test_closed_sessions_go_first_and_are_begun_with_before(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint("llama")
    drafter = drafter_of(folder, num_contexts=2 / 16)
    guesses = drafter.draft(DraftCall(1, PROMPT, 2, GREEDY, len(PROMPT)))
    drafter.draft(DraftCall(2, PROMPT[::-1], 2, GREEDY, len(PROMPT)))
    drafter.close(1)
    drafter.close(77)  # never heard of
    assert drafter.num_sessions == 1
    lengths = counted(drafter, monkeypatch)
    drafter.draft(
        DraftCall(3, [*PROMPT, *guesses, 5, 6], 1, GREEDY, len(PROMPT) + 4)
    )  # the next turn of that chat
    assert lengths == [3]
    assert 1 not in drafter.readings
    lengths.clear()
    drafter.close(2)
    drafter.draft(DraftCall(4, PROMPT[:20], 1, GREEDY, 20))
    assert drafter.num_sessions == 2
    assert 2 not in drafter.readings


def test_an_epoch_ends_them_all(checkpoint: Callable[[str], Path]) -> None:
    drafter = drafter_of(checkpoint("llama"))
    drafter.draft(DraftCall(1, PROMPT, 2, GREEDY, len(PROMPT)))
    assert drafter.kv_bytes > 0
    drafter.drop_all()
    assert (drafter.kv_bytes, drafter.num_sessions) == (0, 0)
    assert len(drafter.draft(DraftCall(1, PROMPT, 2, GREEDY, len(PROMPT)))) == 2


def test_memory_stays_as_it_is_over_many_sessions(checkpoint: Callable[[str], Path]) -> None:
    drafter = drafter_of(checkpoint("llama"))

    def run(first: int) -> int:
        for session in range(first, first + 10):
            drafter.draft(DraftCall(session, [session, *PROMPT], 4, GREEDY, len(PROMPT)))
            drafter.close(session)
        drafter.drop_all()
        return mx.get_active_memory()

    run(1)
    before = run(100)
    assert run(200) == before


def test_a_model_whose_caches_cannot_go_back_is_refused(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shard_loader.state.trim_window", lambda cache: None)
    with pytest.raises(ShardError, match="the draft cannot be a draft model: its caches cannot go back"):
        drafter_of(checkpoint("llama"))
