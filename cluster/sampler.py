"""Draws tokens from the last stage's logits. Compute thread only; a draw depends only on its arguments.

The order is mlx-lm's: bias, penalties and bans on the logits (last what a grammar forbids), then top_p,
min_p and top_k, then temperature. Randomness is counter-based: the key of a draw comes from the request's
seed and the token's position, so that a replay after a failure draws the same. The rows of a batch are drawn
together (cluster/score_edits.py, cluster/random_draws.py), and each gets what it gets alone, bit for bit.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import mlx.core as mx
import numpy as np

from cluster.guide import Guide
from cluster.guide_process import RemoteGuide
from cluster.random_draws import Key, Odds, draw_tokens
from cluster.row_draws import Draw, RowDraws
from cluster.sampling_values import GREEDY_BELOW, validate
from cluster.score_edits import ScoreEdits
from proto import ring_pb2

ROWS_TOGETHER = 16  # their scratch is less than the logits of a chunk, which a plan counts
LEAST_TOP_P = 1e-6  # keeps the most probable token alone; a GPU takes the smallest floats for 0
_MASK64 = (1 << 64) - 1


class Sampler:
    """The draws of one session.

    Values that are off: temperature 0 (greedy), top_p 0 and 1, top_k 0 and from the vocabulary's size
    up, min_p 0, repetition_penalty 0 and 1, repetition_context 0 (the whole history). guide: keeps the answer
    to its grammar. Raises ValueError naming field, value and limit for anything out of range or not finite.
    """

    def __init__(
        self, spec: ring_pb2.Sampling, vocab_size: int, guide: Guide | RemoteGuide | None = None
    ) -> None:
        validate(spec, vocab_size)
        self._guide = guide
        self.vocab_size = vocab_size
        self._seed = spec.seed
        self.is_greedy = spec.temperature < GREEDY_BELOW
        # A filter never removes the most probable token, so that greedy needs none of them.
        self.odds = Odds() if self.is_greedy else _odds(spec, vocab_size)
        self._repetition = spec.repetition_penalty if spec.repetition_penalty > 0.0 else 1.0
        self._repetition_context = spec.repetition_context
        self._presence = spec.presence_penalty
        self._frequency = spec.frequency_penalty
        self.num_top = min(spec.top_logprobs, vocab_size)
        self.has_logprobs = spec.logprobs or spec.top_logprobs > 0
        self._min_tokens = spec.min_tokens
        stop_ids = {token for token in spec.stop_ids if token < vocab_size} if spec.min_tokens else ()
        self._stop_ids = np.array(sorted(stop_ids), dtype=np.uint32)
        biased = sorted(spec.logit_bias.items())
        self._bias_ids = np.array([token for token, _ in biased], dtype=np.uint32)
        self._bias = np.array([bias for _, bias in biased], dtype=np.float32)
        self._prompt_ids: tuple[int, frozenset[int]] = (0, frozenset())
        self.is_plain = not biased and not self.reads_history

    @property
    def reads_history(self) -> bool:
        """Its draws depend on more than the logits and the position."""
        return self._guide is not None or self._has_penalties or len(self._stop_ids) > 0

    @property
    def _has_penalties(self) -> bool:
        return self._repetition != 1.0 or self._presence != 0.0 or self._frequency != 0.0

    @property
    def compiling(self) -> Future[tuple[bytes, bytes]] | None:
        """Done when its grammar is ready, where it is not yet."""
        guide = self._guide
        return guide.ready if isinstance(guide, RemoteGuide) and not guide.ready.done() else None

    def key(self, position: int) -> Key:
        """Of the token at `position`."""
        return draw_key(self._seed, position)

    def draw(self, logits: mx.array, position: int, history: Sequence[int], num_prompt: int) -> Draw:
        """Builds the draw of the token at `position`, its index in the sequence, without evaluating anything.

        logits: (vocab,), any float type. history: the ids of all tokens before it, of which num_prompt are
        the prompt, the same in all draws of a session; read only for a penalty, min_tokens or a grammar.
        Raises ValueError for logits of another shape, or a grammar that cannot be followed.
        """
        self.check(logits.shape)
        draws = draw_rows([(self, position, history, num_prompt)], logits[None])
        for error in draws.failed.values():
            raise error
        return Draw(draws)

    def check(self, shape: tuple[int, ...]) -> None:
        """Raises ValueError unless this is the shape of one row of logits."""
        if shape != (self.vocab_size,):
            raise ValueError(f"logits: the shape is {shape}, it must be ({self.vocab_size},)")

    def edit(
        self, edits: ScoreEdits, row: int, history: Sequence[int], num_prompt: int
    ) -> Callable[[int], None] | None:
        """Tell what is changed in the scores of its row; who is to be told of its token, if anyone.

        Raises ValueError for a grammar that cannot be followed.
        """
        if self.is_plain:
            return None
        if len(self._bias_ids):
            edits.add(row, self._bias_ids, self._bias)
        if self._repetition != 1.0 and (seen := self._seen(history, num_prompt)):
            edits.penalise_repetition(row, seen, self._repetition)
        if self._presence != 0.0 or self._frequency != 0.0:
            counts = Counter(history[num_prompt:])
            if counts:
                edits.subtract(row, counts, [self._presence + self._frequency * n for n in counts.values()])
        if len(self._stop_ids) and len(history) - num_prompt < self._min_tokens:
            edits.ban(row, self._stop_ids)
        guide = self._guide
        if guide is None:
            return None
        answer = list(history[num_prompt:])
        if (allowed := guide.allowed(answer)) is not None:
            edits.allow_only(row, allowed)
        return lambda token: guide.expect([*answer, token])

    def _seen(self, history: Sequence[int], num_prompt: int) -> frozenset[int]:
        """What the penalty for repetition is for."""
        if self._repetition_context:
            return frozenset(history[-self._repetition_context :])
        if self._prompt_ids[0] != num_prompt:
            self._prompt_ids = (num_prompt, frozenset(history[:num_prompt]))
        return self._prompt_ids[1].union(history[num_prompt:])


Row = tuple[
    Sampler, int, Sequence[int], int
]  # and position, history, num_prompt, as `Sampler.draw` takes them


def draw_rows(rows: Sequence[Row], logits: mx.array) -> RowDraws:
    """Builds a draw for each row of `logits` (B, vocab) without evaluating anything; see `Sampler.draw`.

    All rows share their operations, up to ROWS_TOGETHER. A row that cannot be drawn harms no other.
    """
    draws = RowDraws(len(rows))
    for start in range(0, len(rows), ROWS_TOGETHER):
        block = slice(start, start + ROWS_TOGETHER)
        before = draws.arrays()  # first, so that not all blocks have their scratch at once
        some = mx.depends(logits[block], before) if before else logits[block]
        _draw_together(draws, start, rows[block], some)
    return draws


def _draw_together(draws: RowDraws, start: int, rows: Sequence[Row], logits: mx.array) -> None:
    """Adds a few rows of which the first is the batch's row `start`."""
    edits = ScoreEdits(logits.shape[-1])
    good: list[int] = []
    for i, (sampler, _, history, num_prompt) in enumerate(rows):
        try:
            sampler.check(logits.shape[1:])
            on_token = sampler.edit(edits, i, history, num_prompt)
        except ValueError as error:
            draws.failed[start + i] = error
            continue
        if on_token is not None:
            draws.on_token[start + i] = on_token
        good.append(i)
    if not good:
        return
    raw = logits.astype(mx.float32)
    order, tokens = _tokens(rows, good, logits, edits.made(raw))
    draws.add_tokens([start + i for i in order], tokens)
    places = [place for place, i in enumerate(order) if rows[i][0].has_logprobs]
    if places:
        asking = [order[place] for place in places]
        wishes = [(start + i, rows[i][0].num_top) for i in asking]
        _add_logprobs(draws, wishes, _rows(raw, asking), _rows(tokens, places))


def _tokens(
    rows: Sequence[Row], good: Sequence[int], logits: mx.array, scores: mx.array
) -> tuple[list[int], mx.array]:
    """The good rows in another order, and their tokens. scores: the logits with what was changed in them."""
    plain = [i for i in good if rows[i][0].is_greedy and rows[i][0].is_plain]
    edited = [i for i in good if rows[i][0].is_greedy and not rows[i][0].is_plain]
    random = sorted((i for i in good if not rows[i][0].is_greedy), key=lambda i: rows[i][0].odds.cost)
    parts = []
    if plain:
        parts.append(most_probable(_rows(logits, plain)))
    if edited:
        parts.append(most_probable(_rows(scores, edited)))
    if random:
        odds = [rows[i][0].odds for i in random]
        keys = [rows[i][0].key(rows[i][1]) for i in random]
        parts.append(draw_tokens(_rows(scores, random), odds, keys))
    return [*plain, *edited, *random], mx.concatenate(parts) if len(parts) > 1 else parts[0]


def _add_logprobs(
    draws: RowDraws, wishes: Sequence[tuple[int, int]], logits: mx.array, tokens: mx.array
) -> None:
    """wishes: the batch's row and top_logprobs, for each of logits (B, vocab) and tokens (B,)."""
    logprobs = log_softmax(logits)
    chosen = mx.take_along_axis(logprobs, tokens[:, None], axis=-1)[:, 0]
    draws.add_logprobs([row for row, _ in wishes], chosen)
    for num_top in sorted({num_top for _, num_top in wishes if num_top}):
        alike = [place for place, wish in enumerate(wishes) if wish[1] == num_top]
        part = _rows(logprobs, alike)
        ids = mx.argpartition(-part, kth=num_top - 1, axis=-1)[:, :num_top]
        draws.add_top([wishes[place][0] for place in alike], ids, mx.take_along_axis(part, ids, axis=-1))


def _rows(array: mx.array, rows: list[int]) -> mx.array:
    """These rows, in this order; no copy where they lie side by side."""
    first = rows[0]
    if rows == list(range(first, first + len(rows))):
        return array[first : first + len(rows)]
    return array[mx.array(rows)]


def _odds(spec: ring_pb2.Sampling, vocab_size: int) -> Odds:
    return Odds(
        inverse_temperature=1.0 / spec.temperature,
        top_p=max(spec.top_p, LEAST_TOP_P) if 0.0 < spec.top_p < 1.0 else math.inf,
        top_k=spec.top_k if 0 < spec.top_k < vocab_size else 0,
        log_min_p=math.log(spec.min_p) if spec.min_p > 0.0 else -math.inf,
    )


def most_probable(logits: mx.array) -> mx.array:
    """The tokens that mlx-lm takes: the most probable ones, with probabilities rounded to the logits' dtype.

    In bf16 two neighbouring logits often round to one log-probability; the first of them wins.
    """
    return mx.argmax(log_softmax(logits), axis=-1)


def log_softmax(logits: mx.array) -> mx.array:
    """Over the last axis."""
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def draw_key(seed: int, position: int) -> Key:
    """Two uint32 words for MLX's generator, mixed by splitmix64 from a uint64 seed and a position."""
    mixed = _splitmix64((_splitmix64(seed) + position) & _MASK64)
    return mixed >> 32, mixed & 0xFFFFFFFF


def _splitmix64(state: int) -> int:
    """https://prng.di.unimi.it/splitmix64.c"""
    state = (state + 0x9E3779B97F4A7C15) & _MASK64
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK64
    return state ^ (state >> 31)
