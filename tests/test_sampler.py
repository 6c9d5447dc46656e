"""The sampler against an independent numpy reference, its replay, and its refusals."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest

from cluster.sampler import Row, Sampler, draw_key, draw_rows
from proto import ring_pb2

VOCAB = 11
LOGITS = np.array([1.5, -0.7, 0.2, 2.1, -1.9, 0.9, 1.1, -0.1, 2.0, -3.0, 0.4], dtype=np.float32)
PROMPT = [3, 3, 8, 1, 9]
GENERATED = [0, 0, 0, 5, 4]
HISTORY = PROMPT + GENERATED
# Upper 1e-6 quantiles of chi-square by degrees of freedom: the seeds are fixed, so a failure is a bug.
CHI_SQUARE_LIMIT = {1: 23.9, 2: 27.6, 3: 30.7, 4: 33.4, 5: 35.9, 6: 38.3, 7: 40.5, 8: 42.7, 9: 44.8, 10: 46.9}

Floats = npt.NDArray[np.float64]


def spec(**fields: Any) -> ring_pb2.Sampling:
    bias = fields.pop("logit_bias", {})
    sampling = ring_pb2.Sampling(**fields)
    for token, value in bias.items():
        sampling.logit_bias[token] = value
    return sampling


def reference(
    logits: npt.NDArray[np.float32], sampling: ring_pb2.Sampling, history: Sequence[int], num_prompt: int
) -> Floats:
    """Probabilities (vocab,) of the next token: loops in float64, after the APIs' descriptions."""
    scores = [float(x) for x in logits]
    generated = list(history[num_prompt:])
    for token, bias in sampling.logit_bias.items():
        scores[token] += bias
    looked_back = list(history)
    if sampling.repetition_context:
        looked_back = looked_back[-sampling.repetition_context :]
    for token in set(looked_back):
        factor = sampling.repetition_penalty or 1.0
        scores[token] = scores[token] * factor if scores[token] < 0 else scores[token] / factor
    for token in set(generated):
        scores[token] -= sampling.presence_penalty
        scores[token] -= sampling.frequency_penalty * generated.count(token)
    if len(generated) < sampling.min_tokens:
        for token in sampling.stop_ids:
            scores[token] = -math.inf

    if sampling.temperature == 0:
        best = scores.index(max(scores))
        return np.array([float(token == best) for token in range(len(scores))])
    probs = np.exp(np.array(scores) - max(scores))
    probs /= probs.sum()
    order = list(np.argsort(-probs, kind="stable"))
    kept = set(order)
    if 0 < sampling.top_p < 1:
        kept, mass = set(), 0.0
        for token in order:
            if mass >= sampling.top_p:
                break
            kept.add(token)
            mass += probs[token]
    if sampling.min_p:
        kept &= {token for token in order if probs[token] >= sampling.min_p * probs[order[0]]}
    if sampling.top_k:
        kept &= set(order[: sampling.top_k])
    warm = np.array([probs[token] if token in kept else 0.0 for token in range(len(scores))])
    warm = warm ** (1.0 / sampling.temperature)
    return np.asarray(warm / warm.sum())


def draw_ids(
    sampling: ring_pb2.Sampling, positions: Sequence[int], history: Sequence[int] = HISTORY
) -> list[int]:
    sampler = Sampler(sampling, VOCAB)
    rows: list[Row] = [(sampler, position, history, len(PROMPT)) for position in positions]
    draws = draw_rows(rows, mx.broadcast_to(mx.array(LOGITS), (len(rows), VOCAB)))
    mx.eval(draws.arrays())
    return [token.id for token in draws.finish() if isinstance(token, ring_pb2.SampledToken)]


def primitives(array: mx.array) -> list[str]:
    """The operations of a lazy graph, in no order."""
    dot = io.StringIO()
    mx.export_to_dot(dot, array)
    return re.findall(r'label ="(\w+)", shape=rectangle', dot.getvalue())


CASES = {
    "temperature 1": spec(temperature=1.0),
    "temperature 0.5": spec(temperature=0.5),
    "temperature 2": spec(temperature=2.0),
    "neutral values": spec(temperature=1.0, top_p=1.0, repetition_penalty=1.0),
    "top_p 0.7": spec(temperature=1.0, top_p=0.7),
    "top_p 0.3 after temperature": spec(temperature=1.7, top_p=0.3),
    "top_p 1": spec(temperature=0.8, top_p=1.0),
    "top_k 1": spec(temperature=1.0, top_k=1),
    "top_k 4": spec(temperature=1.0, top_k=4),
    "top_k of the vocabulary": spec(temperature=1.0, top_k=VOCAB),
    "top_k beyond the vocabulary": spec(temperature=1.0, top_k=1000),
    "min_p 0.2": spec(temperature=1.0, min_p=0.2),
    "min_p 1": spec(temperature=1.0, min_p=1.0),
    "repetition 1.8": spec(temperature=1.0, repetition_penalty=1.8),
    "repetition 0.6": spec(temperature=1.0, repetition_penalty=0.6),
    "repetition 1.8 of the last 3": spec(temperature=1.0, repetition_penalty=1.8, repetition_context=3),
    "repetition 1.8 of the last 7": spec(temperature=1.0, repetition_penalty=1.8, repetition_context=7),
    "presence 1.5": spec(temperature=1.0, presence_penalty=1.5),
    "presence -1.5": spec(temperature=1.0, presence_penalty=-1.5),
    "frequency 0.8": spec(temperature=1.0, frequency_penalty=0.8),
    "logit bias": spec(temperature=1.0, logit_bias={3: -100.0, 4: 3.5, 10: 1.0}),
    "stop ids banned": spec(temperature=1.0, min_tokens=6, stop_ids=[3, 8]),
    "stop ids allowed": spec(temperature=1.0, min_tokens=5, stop_ids=[3, 8]),
    "everything": spec(
        temperature=1.3,
        top_p=0.9,
        top_k=6,
        min_p=0.05,
        repetition_penalty=1.2,
        presence_penalty=0.4,
        frequency_penalty=0.3,
        logit_bias={6: 0.5, 4: 3.0},
        min_tokens=9,
        stop_ids=[3],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_draws_follow_the_reference_distribution(name: str) -> None:
    sampling = CASES[name]
    sampling.seed = 20_261
    num_draws = 3000
    expected = reference(LOGITS, sampling, HISTORY, len(PROMPT)) * num_draws
    counts = np.bincount(draw_ids(sampling, range(num_draws)), minlength=VOCAB)
    assert counts[expected == 0].sum() == 0, "drew a token that the reference removes"
    possible = expected > 0
    if possible.sum() > 1:
        chi_square = float((((counts - expected) ** 2)[possible] / expected[possible]).sum())
        assert chi_square < CHI_SQUARE_LIMIT[int(possible.sum()) - 1]


@pytest.mark.parametrize("name", CASES)
def test_greedy_is_the_references_first_maximum(name: str) -> None:
    sampling = ring_pb2.Sampling()
    sampling.CopyFrom(CASES[name])
    sampling.temperature = 0.0
    expected = reference(LOGITS, sampling, HISTORY, len(PROMPT))
    assert draw_ids(sampling, [0]) == [int(expected.argmax())]


def test_greedy_takes_the_first_of_equals_and_a_tiny_temperature_is_greedy() -> None:
    logits = mx.array([0.0, 4.0, 4.0, 1.0])
    for temperature in (0.0, 1e-9):
        draw = Sampler(spec(temperature=temperature), 4).draw(logits, 0, [], 0)
        assert draw.finish().id == 1


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32])
def test_logprobs_are_of_the_raw_logits(dtype: mx.Dtype) -> None:
    logits = mx.array(LOGITS).astype(dtype)
    raw = np.array(logits.astype(mx.float32)).astype(np.float64)
    expected = raw - np.log(np.exp(raw).sum())
    sampling = spec(
        temperature=0.7, top_k=2, logit_bias={4: 50.0}, presence_penalty=2.0, logprobs=True, top_logprobs=4
    )
    draw = Sampler(sampling, VOCAB).draw(logits, 3, HISTORY, len(PROMPT))
    mx.eval(draw.arrays())
    token = draw.finish()
    assert token.id == 4
    assert token.logprob == pytest.approx(expected[4], abs=1e-5)
    order = sorted(range(VOCAB), key=lambda i: (-expected[i], i))
    assert [top.id for top in token.top] == order[:4]
    assert [top.logprob for top in token.top] == pytest.approx(expected[order[:4]], abs=1e-5)


@pytest.mark.parametrize(("asked", "given"), [(1, 1), (VOCAB - 1, VOCAB - 1), (VOCAB, VOCAB), (50, VOCAB)])
def test_top_logprobs_up_to_the_vocabulary(asked: int, given: int) -> None:
    draw = Sampler(spec(top_logprobs=asked), VOCAB).draw(mx.array(LOGITS), 0, [], 0)
    token = draw.finish()
    assert len({top.id for top in token.top}) == given
    logprobs = [top.logprob for top in token.top]
    assert logprobs == sorted(logprobs, reverse=True)
    assert (token.top[0].id, token.top[0].logprob) == (token.id, token.logprob)


def test_no_logprobs_unless_asked() -> None:
    token = Sampler(spec(temperature=1.0), VOCAB).draw(mx.array(LOGITS), 0, [], 0).finish()
    assert token == ring_pb2.SampledToken(id=token.id)
    with_logprob = Sampler(spec(logprobs=True), VOCAB).draw(mx.array(LOGITS), 0, [], 0).finish()
    assert with_logprob.logprob < 0
    assert not with_logprob.top


def test_a_draw_depends_on_seed_and_position_only() -> None:
    sampling = spec(temperature=1.5, seed=2**64 - 1, presence_penalty=0.3, repetition_penalty=1.1)
    positions = list(range(40))
    forward = draw_ids(sampling, positions)
    mx.random.seed(99)
    assert draw_ids(sampling, positions[::-1])[::-1] == forward
    assert draw_ids(sampling, positions[17:20]) == forward[17:20]
    sampling.seed -= 1
    assert draw_ids(sampling, positions) != forward


def test_a_replay_in_the_middle_draws_the_same_tokens() -> None:
    sampling = spec(temperature=1.2, seed=5, frequency_penalty=0.5, repetition_penalty=1.3)

    def run(sampler: Sampler, history: list[int], until: int) -> list[int]:
        history = list(history)
        while len(history) < until:
            draw = sampler.draw(mx.array(LOGITS), len(history), history, len(PROMPT))
            mx.eval(draw.arrays())
            history.append(draw.finish().id)
        return history

    sampler = Sampler(sampling, VOCAB)
    whole = run(sampler, PROMPT, 30)
    assert run(sampler, whole[:12], 30) == whole, "the same sampler, back at position 12"
    assert run(Sampler(sampling, VOCAB), whole[:17], 30) == whole, "another sampler, from position 17"


def test_the_global_random_state_is_left_alone() -> None:
    mx.random.seed(7)
    before = np.array(mx.random.state[0])
    draw_ids(spec(temperature=1.0, top_p=0.5, min_p=0.1, top_k=3), range(5))
    assert np.array_equal(before, np.array(mx.random.state[0]))


def test_keys_differ_and_are_two_uint32_words() -> None:
    keys = {draw_key(seed, position) for seed in (0, 1, 2, 2**63, 2**64 - 1) for position in range(2000)}
    assert len(keys) == 5 * 2000
    assert all(0 <= word < 2**32 for key in keys for word in key)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32])
@pytest.mark.parametrize("has_logprobs", [False, True])
def test_greedy_is_mlx_lms_own_choice_where_rounding_makes_a_tie(dtype: mx.Dtype, has_logprobs: bool) -> None:
    """mlx_lm.generate.generate_step draws from log-probabilities in the logits' dtype."""
    num_ties = 0
    sampler = Sampler(spec(logprobs=has_logprobs), 4096)
    for seed in range(300):
        logits = (0.5 * mx.random.normal((1, 4096), key=mx.random.key(seed))).astype(dtype)
        logprobs = logits - mx.logsumexp(logits, keepdims=True)
        expected = int(mx.argmax(logprobs, axis=-1).item())
        num_ties += expected != int(mx.argmax(logits).item())
        draw = sampler.draw(logits[0], 0, [], 0)
        mx.eval(draw.arrays())
        assert draw.finish().id == expected
    assert num_ties > 0 or dtype == mx.float32, "no case showed the difference"


def test_plain_greedy_costs_one_argmax() -> None:
    for sampling in (spec(), spec(top_p=0.5, top_k=3, min_p=0.1, seed=4, stop_ids=[1], min_tokens=0)):
        draw = Sampler(sampling, VOCAB).draw(mx.array(LOGITS).astype(mx.bfloat16), 0, HISTORY, len(PROMPT))
        assert len(draw.arrays()) == 1
        operations = primitives(draw.arrays()[0])
        assert operations.count("ArgReduce") == 1
        allowed = {"ArgReduce", "Squeeze", "ExpandDims", "AsType", "LogSumExp", "Broadcast", "Subtract"}
        assert set(operations) <= allowed, operations


def test_a_draw_without_filters_neither_sorts_nor_normalises() -> None:
    draw = Sampler(spec(temperature=0.7, top_p=1.0, top_k=VOCAB), VOCAB).draw(mx.array(LOGITS), 0, [], 0)
    operations = set(primitives(draw.arrays()[0]))
    assert "RandomBits" in operations
    assert not {"Sort", "ArgPartition", "LogSumExp", "CumSum"} & operations


@pytest.mark.parametrize(
    "sampling",
    [
        spec(),
        spec(temperature=1.0),
        spec(temperature=1.0, top_p=0.5, min_p=0.2, top_k=3, logprobs=True, top_logprobs=2),
        spec(repetition_penalty=2.0, frequency_penalty=1.0, logprobs=True),
    ],
)
def test_logits_of_minus_infinity_still_give_a_token_of_the_vocabulary(sampling: ring_pb2.Sampling) -> None:
    draw = Sampler(sampling, VOCAB).draw(mx.full((VOCAB,), -math.inf), 9, HISTORY, len(PROMPT))
    mx.eval(draw.arrays())
    assert 0 <= draw.finish().id < VOCAB


def test_stop_ids_of_the_whole_vocabulary_and_beyond_it() -> None:
    sampling = spec(temperature=1.0, top_p=0.9, min_tokens=3, stop_ids=[*range(VOCAB), 4_000_000_000])
    assert 0 <= Sampler(sampling, VOCAB).draw(mx.array(LOGITS), 0, [], 0).finish().id < VOCAB


def test_an_empty_history_is_no_error() -> None:
    sampling = spec(repetition_penalty=1.5, presence_penalty=1.0, frequency_penalty=1.0)
    assert Sampler(sampling, VOCAB).draw(mx.array(LOGITS), 0, [], 0).finish().id == int(LOGITS.argmax())


REFUSALS = [
    ({"temperature": -1.0}, "temperature: -1 is not allowed, it must be finite and at least 0"),
    ({"temperature": math.nan}, "temperature: nan is not allowed, it must be finite and at least 0"),
    ({"temperature": math.inf}, "temperature: inf is not allowed, it must be finite and at least 0"),
    ({"top_p": 1.5}, "top_p: 1.5 is not allowed, it must be from 0 to 1"),
    ({"top_p": -0.5}, "top_p: -0.5 is not allowed, it must be from 0 to 1"),
    ({"top_p": math.nan}, "top_p: nan is not allowed, it must be from 0 to 1"),
    ({"min_p": 2.0}, "min_p: 2 is not allowed, it must be from 0 to 1"),
    ({"min_p": math.nan}, "min_p: nan is not allowed, it must be from 0 to 1"),
    ({"repetition_penalty": -1.0}, "repetition_penalty: -1 is not allowed, it must be finite and at least 0"),
    (
        {"repetition_penalty": math.nan},
        "repetition_penalty: nan is not allowed, it must be finite and at least 0",
    ),
    ({"presence_penalty": 3.0}, "presence_penalty: 3 is not allowed, it must be from -2 to 2"),
    ({"presence_penalty": math.nan}, "presence_penalty: nan is not allowed, it must be from -2 to 2"),
    ({"frequency_penalty": -2.5}, "frequency_penalty: -2.5 is not allowed, it must be from -2 to 2"),
    ({"logit_bias": {VOCAB: 1.0}}, f"logit_bias: token id {VOCAB} is not below the vocabulary size {VOCAB}"),
    ({"logit_bias": {2: 101.0}}, "logit_bias[2]: 101 is not allowed, it must be from -100 to 100"),
    ({"logit_bias": {2: math.nan}}, "logit_bias[2]: nan is not allowed, it must be from -100 to 100"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSALS)
def test_refusals_name_field_value_and_limit(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Sampler(spec(**fields), VOCAB)


def test_logits_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=re.escape("logits: the shape is (1, 11), it must be (11,)")):
        Sampler(spec(), VOCAB).draw(mx.zeros((1, VOCAB)), 0, [], 0)
