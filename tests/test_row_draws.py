"""Rows of a batch that are drawn together: each gets what it gets alone, bit for bit, in few operations."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import mlx.core as mx
import numpy as np
import pytest

from cluster.grammar import choice_grammar, json_schema_grammar
from cluster.guide import Guides
from cluster.row_draws import RowDraws
from cluster.sampler import ROWS_TOGETHER, Row, Sampler, draw_key, draw_rows
from proto import ring_pb2
from tests.graph_counts import VIEWS, primitives
from tests.test_guide import COLOUR, MODEL
from tests.test_guide import VOCAB as DEMO_VOCAB

DTYPES = [mx.float32, mx.bfloat16, mx.float16]
MAX_LAUNCHES = 56  # of rows that want everything there is
MIXED = [
    {"temperature": 0.7, "seed": 1},
    {"temperature": 1.0, "top_p": 0.9, "seed": 2},
    {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "seed": 3},
    {"temperature": 0.8, "top_k": 40, "seed": 4},
    {"temperature": 1.0, "min_p": 0.05, "seed": 5},
    {},
    {"logprobs": True, "top_logprobs": 3},
    {"temperature": 1.0, "presence_penalty": 0.5, "frequency_penalty": 0.1},
]


def random_sampling(rng: random.Random, vocab: int) -> ring_pb2.Sampling:
    """Each wish is there in some rows; half the rows want nothing but a temperature and filters."""

    def now_and_then(*values: float) -> float:
        return rng.choice(values) if rng.random() < 0.4 else 0.0

    spec = ring_pb2.Sampling(
        temperature=rng.choice([0.0, 0.0, 0.3, 0.7, 1.0, 1.0, 1.7, 1e9]),
        seed=rng.choice([0, 7, 2**64 - 1, rng.getrandbits(64)]),
        top_p=now_and_then(1e-30, 0.1, 0.5, 0.9, 0.95, 0.999999, 1.0),
        min_p=now_and_then(1e-9, 0.05, 0.3, 1.0),
        top_k=int(now_and_then(1, 2, 20, 20, 40, vocab - 1, vocab, 10**6)),
        logprobs=rng.random() < 0.2,
        top_logprobs=int(now_and_then(1, 5, 20, vocab)) if vocab < 5000 else int(now_and_then(1, 5, 20)),
    )
    if rng.random() < 0.5:
        spec.repetition_penalty = now_and_then(0.5, 1.0, 1.3)
        spec.repetition_context = int(now_and_then(1, 5, 1000))
        spec.presence_penalty = now_and_then(-2.0, 0.3)
        spec.frequency_penalty = now_and_then(-0.5, 1.1)
        for token in rng.sample(range(vocab), min(vocab, int(now_and_then(1, 3)))):
            spec.logit_bias[token] = rng.choice([-100.0, -1.5, 0.0, 2.25, 100.0])
        spec.min_tokens = int(now_and_then(1, 4, 9))
        spec.stop_ids.extend(rng.sample(range(vocab), min(vocab, 2)))
    return spec


def random_logits(rng: random.Random, num_rows: int, vocab: int, dtype: mx.Dtype) -> mx.array:
    """Rows of all kinds: flat, steep, with ties, with -inf, with nothing but -inf, and overflowing ones."""
    values = np.random.default_rng(rng.getrandbits(32)).normal(size=(num_rows, vocab)).astype(np.float32)
    for i in range(num_rows):
        row = values[i]
        kind = rng.randrange(10)
        row *= rng.choice([0.0, 0.01, 1.0, 4.0, 100.0])
        if kind < 4:  # ties
            np.round(row, out=row)
        if kind in (1, 4, 5):
            row[np.random.default_rng(rng.getrandbits(32)).random(vocab) < rng.choice([0.1, 0.9])] = -math.inf
        elif kind == 6:
            row[:] = -math.inf
        elif kind == 7:
            row[rng.randrange(vocab)] = rng.choice([math.inf, math.nan, 3e38])
    return mx.array(values).astype(dtype)


def random_rows(rng: random.Random, num_rows: int, vocab: int) -> list[Row]:
    rows: list[Row] = []
    for _ in range(num_rows):
        history = [rng.randrange(vocab) for _ in range(rng.randrange(30))]
        num_prompt = rng.randrange(len(history) + 1)
        position = rng.choice([len(history), rng.getrandbits(20)])
        rows.append((Sampler(random_sampling(rng, vocab), vocab), position, history, num_prompt))
    return rows


def finished(draws: RowDraws) -> list[bytes | str]:
    """The tokens bit for bit, NaN being NaN, or what was wrong."""
    mx.eval(draws.arrays())
    return [str(t) if isinstance(t, ValueError) else t.SerializeToString() for t in draws.finish()]


def alone(rows: Sequence[Row], logits: mx.array) -> list[bytes]:
    """What each sampler draws by itself."""
    drawn = [sampler.draw(logits[i], *rest) for i, (sampler, *rest) in enumerate(rows)]
    mx.eval([draw.arrays() for draw in drawn])
    return [draw.finish().SerializeToString() for draw in drawn]


def num_launches(draws: RowDraws) -> int:
    return sum(count for name, count in primitives(*draws.arrays()).items() if name not in VIEWS)


def mixed(vocab: int, num_rows: int) -> list[Row]:
    history = [3, 1, 4, 1, 5, 9]
    wishes = [ring_pb2.Sampling(**MIXED[i % len(MIXED)]) for i in range(num_rows)]
    return [(Sampler(wish, vocab), 6 + i, history, 2) for i, wish in enumerate(wishes)]


def check(seed: int, vocab: int, num_rows: int, dtype: mx.Dtype) -> None:
    rng = random.Random(f"{seed} {vocab} {num_rows}")
    rows, logits = random_rows(rng, num_rows, vocab), random_logits(rng, num_rows, vocab, dtype)
    expected = alone(rows, logits)
    assert finished(draw_rows(rows, logits)) == expected
    order = rng.sample(range(num_rows), rng.randint(1, num_rows))  # in other company
    assert finished(draw_rows([rows[i] for i in order], logits[mx.array(order)])) == [
        expected[i] for i in order
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [2, 3, 11, 257, 4096])
def test_each_row_gets_what_it_gets_alone(vocab: int, dtype: mx.Dtype) -> None:
    for seed, num_rows in enumerate([2, 5, 16, 2 * ROWS_TOGETHER + 3]):
        check(seed, vocab, num_rows, dtype)


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("vocab", "num_seeds"), [(2, 200), (7, 200), (100, 200), (1001, 150), (50257, 6), (152_064, 8)]
)
def test_each_row_gets_what_it_gets_alone_again_and_again(
    vocab: int, num_seeds: int, dtype: mx.Dtype
) -> None:
    for seed in range(100, 100 + num_seeds):
        check(seed, vocab, random.Random(seed).randint(1, 20), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_draw_is_mlx_own_categorical_of_the_rows_key(dtype: mx.Dtype) -> None:
    vocab, temperature = 1001, 0.5
    logits = mx.random.normal((20, vocab), key=mx.random.key(3)).astype(dtype)
    samplers = [Sampler(ring_pb2.Sampling(temperature=temperature, seed=9 + i), vocab) for i in range(20)]
    draws = draw_rows([(sampler, 5 * i, (), 0) for i, sampler in enumerate(samplers)], logits)
    keys = [mx.array(draw_key(9 + i, 5 * i), dtype=mx.uint32) for i in range(20)]
    expected = [
        mx.random.categorical(logits[i].astype(mx.float32) / temperature, key=key).item()
        for i, key in enumerate(keys)
    ]
    assert finished(draws) == [ring_pb2.SampledToken(id=token).SerializeToString() for token in expected]


def test_filters_keep_what_ties_with_the_least_that_they_keep() -> None:
    logits = mx.array([[3.0, 1.0, 2.0, 2.0, 2.0, 0.0, 2.0]] * 400)
    for top_k, kept in ((1, {0}), (2, {0, 2, 3, 4, 6}), (6, {0, 1, 2, 3, 4, 6})):
        sampler = Sampler(ring_pb2.Sampling(temperature=5.0, top_k=top_k), 7)
        draws = draw_rows([(sampler, position, (), 0) for position in range(400)], logits)
        mx.eval(draws.arrays())
        assert {token.id for token in draws.finish() if isinstance(token, ring_pb2.SampledToken)} == kept


def test_rows_share_their_operations() -> None:
    """What is launched depends on what is asked for, not on how many ask for it."""
    vocab = 1000
    logits = mx.random.normal((ROWS_TOGETHER, vocab)).astype(mx.bfloat16)
    mx.eval(logits)
    rows = mixed(vocab, ROWS_TOGETHER)
    apart = sum(num_launches(draw_rows([row], logits[:1])) for row in rows)
    assert num_launches(draw_rows(rows, logits)) <= MAX_LAUNCHES < apart / 5
    warm = ring_pb2.Sampling(temperature=0.7)
    rows = [(Sampler(warm, vocab), i, (), 0) for i in range(ROWS_TOGETHER)]
    one = num_launches(draw_rows(rows[:1], logits[:1]))
    assert num_launches(draw_rows(rows, logits)) <= one


def test_what_one_row_filters_the_others_do_not_sort() -> None:
    vocab = 1000
    rows = [row for row in mixed(vocab, 16) if row[0].odds.cost == 0]
    operations = primitives(*draw_rows(rows, mx.zeros((len(rows), vocab))).arrays())
    assert not {"Sort", "Partition", "CumSum", "Scan"} & set(operations)


@pytest.fixture(scope="module")
def guides() -> Guides:
    made = Guides(MODEL, DEMO_VOCAB)
    made.open(COLOUR).allowed([])  # its thread is not one that a test leaves behind
    return made


def test_a_row_that_cannot_be_drawn_harms_no_other(guides: Guides) -> None:
    rng = random.Random(5)
    rows = random_rows(rng, 6, DEMO_VOCAB)
    logits = random_logits(rng, 6, DEMO_VOCAB, mx.bfloat16)
    cannot = guides.open(json_schema_grammar({"not": {}}))
    bad = (Sampler(ring_pb2.Sampling(), DEMO_VOCAB, cannot), 3, [1, 2, 3], 3)
    narrow = (Sampler(ring_pb2.Sampling(temperature=1.0), 11), 3, [1, 2, 3], 3)
    expected: list[bytes | str] = list(alone(rows, logits))
    expected[4] = f"logits: the shape is ({DEMO_VOCAB},), it must be (11,)"
    drawn = finished(draw_rows([rows[0], bad, *rows[2:4], narrow, rows[5]], logits))
    assert str(drawn[1]).startswith("the grammar cannot be followed")
    expected[1] = drawn[1]
    assert drawn == expected
    assert all(isinstance(token, str) for token in finished(draw_rows([bad, narrow], logits[:2])))


def test_grammars_share_the_pass_and_are_told_their_tokens(guides: Guides) -> None:
    wishes = [{"temperature": 1.0, "seed": 4}, {}, {"temperature": 0.8, "top_p": 0.9, "logprobs": True}, {}]
    logits = mx.random.normal((4, DEMO_VOCAB), key=mx.random.key(8)).astype(mx.bfloat16)

    def rows() -> list[Row]:
        opened = [guides.open(choice_grammar(["red", "green"])) if i != 1 else None for i in range(4)]
        both = zip(wishes, opened, strict=True)
        samplers = [Sampler(ring_pb2.Sampling(**wish), DEMO_VOCAB, guide) for wish, guide in both]
        return [(sampler, 3, [1, 2, 3], 3) for sampler in samplers]

    kept = rows()
    assert finished(draw_rows(kept, logits)) == alone(rows(), logits)
    expecting = [row[0]._guide for row in kept]
    assert [guide is None or len(guide._expected) for guide in expecting] == [1, True, 1, 1]


def test_until_the_first_wrong_guess() -> None:
    vocab = 50
    logits = mx.random.normal((5, vocab), key=mx.random.key(2))
    wish = ring_pb2.Sampling(temperature=1.0, seed=3, top_logprobs=2)
    rows: list[Row] = [(Sampler(wish, vocab), 10 + i, (), 0) for i in range(5)]
    whole = draw_rows(rows, logits).finish()
    ids = [token.id for token in whole if isinstance(token, ring_pb2.SampledToken)]
    for num_right in range(5):
        guesses = ids[:num_right] + [(token + 1) % vocab for token in ids[num_right:4]]
        assert draw_rows(rows, logits).until(guesses) == whole[: num_right + 1]
    bad = (Sampler(ring_pb2.Sampling(), 3), 12, (), 0)
    drawn = draw_rows([*rows[:2], bad, *rows[3:]], logits).until(ids[:4])
    assert drawn[:2] == whole[:2]
    assert [type(token) for token in drawn[2:]] == [ValueError]
