"""Draws a token from the last stage's logits. Compute thread only; a draw depends only on its arguments.

The order is mlx-lm's: bias, penalties and bans on the logits (last what a grammar forbids), then top_p,
min_p and top_k on the log-probabilities, then temperature. Randomness is counter-based: the key of a draw
comes from the request's seed and the token's position, so that a replay after a failure draws the same.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from itertools import zip_longest
from typing import cast

import mlx.core as mx

from cluster.guide import Guide
from cluster.guide_process import RemoteGuide
from proto import ring_pb2

GREEDY_BELOW = 1e-5  # a temperature under this is 0, as in vLLM: its reciprocal would overflow
MAX_PENALTY = 2.0  # of presence and frequency, either sign (OpenAI API reference)
MAX_BIAS = 100.0  # either sign (OpenAI API reference)
_NEG_INF = -math.inf
_MASK64 = (1 << 64) - 1


class Draw:
    """One token on its way: lazy until the caller has evaluated `arrays()`."""

    __slots__ = ("_logprob", "_token", "_top_ids", "_top_logprobs", "on_token")

    def __init__(
        self,
        token: mx.array,  # () uint32
        logprob: mx.array | None = None,  # () float32
        top_ids: mx.array | None = None,  # (top_logprobs,) uint32, in no order
        top_logprobs: mx.array | None = None,  # (top_logprobs,) float32
    ) -> None:
        self.on_token: Callable[[int], None] | None = None  # told of the token as soon as it is known
        self._token = token
        self._logprob = logprob
        self._top_ids = top_ids
        self._top_logprobs = top_logprobs

    def arrays(self) -> list[mx.array]:
        """What the caller evaluates, in one mx.eval together with the caches."""
        every = (self._token, self._logprob, self._top_ids, self._top_logprobs)
        return [array for array in every if array is not None]

    def finish(self) -> ring_pb2.SampledToken:
        """The drawn token; `top` is sorted by falling log-probability, then by id."""
        token = ring_pb2.SampledToken(id=cast(int, self._token.item()))
        if self.on_token is not None:
            self.on_token(token.id)
        if self._logprob is not None:
            token.logprob = cast(float, self._logprob.item())
        if self._top_ids is not None and self._top_logprobs is not None:
            ids = cast("list[int]", self._top_ids.tolist())
            logprobs = cast("list[float]", self._top_logprobs.tolist())
            add_top(token, ids, logprobs)
        return token


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
        self._vocab_size = vocab_size
        self._seed = spec.seed
        self._is_greedy = spec.temperature < GREEDY_BELOW
        self._inverse_temperature = 1.0 if self._is_greedy else 1.0 / spec.temperature
        # A filter never removes the most probable token, so that greedy needs none of them.
        self._top_p = spec.top_p if 0.0 < spec.top_p < 1.0 and not self._is_greedy else 1.0
        self._top_k = spec.top_k if 0 < spec.top_k < vocab_size and not self._is_greedy else 0
        self._log_min_p = math.log(spec.min_p) if spec.min_p > 0.0 and not self._is_greedy else _NEG_INF
        self._repetition = spec.repetition_penalty if spec.repetition_penalty > 0.0 else 1.0
        self._repetition_context = spec.repetition_context
        self._presence = spec.presence_penalty
        self._frequency = spec.frequency_penalty
        self._num_top = min(spec.top_logprobs, vocab_size)
        self._has_logprobs = spec.logprobs or spec.top_logprobs > 0
        self._min_tokens = spec.min_tokens
        stop_ids = sorted({token for token in spec.stop_ids if token < vocab_size})
        self._stop_ids = mx.array(stop_ids, dtype=mx.uint32) if stop_ids and spec.min_tokens else None
        biased = sorted(spec.logit_bias.items())
        self._bias_ids = mx.array([token for token, _ in biased], dtype=mx.uint32) if biased else None
        self._bias = mx.array([bias for _, bias in biased], dtype=mx.float32)
        self._prompt_ids: tuple[int, frozenset[int]] = (0, frozenset())
        self._is_plain = biased == [] and self._stop_ids is None and not self._has_penalties and guide is None

    @property
    def _has_penalties(self) -> bool:
        return self._repetition != 1.0 or self._presence != 0.0 or self._frequency != 0.0

    @property
    def reads_history(self) -> bool:
        """Its draws depend on more than the logits and the position."""
        return self._guide is not None or self._has_penalties or self._stop_ids is not None

    @property
    def compiling(self) -> Future[tuple[bytes, bytes]] | None:
        """Done when its grammar is ready, where it is not yet."""
        guide = self._guide
        return guide.ready if isinstance(guide, RemoteGuide) and not guide.ready.done() else None

    @property
    def is_argmax(self) -> bool:
        """It takes the most probable token of the logits as they are, and nothing else is asked of it."""
        return self._is_plain and self._is_greedy and not self._has_logprobs

    def draw(self, logits: mx.array, position: int, history: Sequence[int], num_prompt: int) -> Draw:
        """Builds the draw of the token at `position`, its index in the sequence, without evaluating anything.

        logits: (vocab,), any float type. history: the ids of all tokens before it, of which num_prompt are
        the prompt, the same in all draws of a session; read only for a penalty, min_tokens or a grammar.
        Raises ValueError for logits of another shape, or a grammar that cannot be followed.
        """
        if logits.shape != (self._vocab_size,):
            raise ValueError(f"logits: the shape is {logits.shape}, it must be ({self._vocab_size},)")
        if self.is_argmax:
            return Draw(_greedy(logits))

        answer = [] if self._guide is None else list(history[num_prompt:])
        draw = self._draw(logits, position, history, num_prompt, answer)
        if (guide := self._guide) is not None:
            draw.on_token = lambda token: guide.expect([*answer, token])
        return draw

    def _draw(
        self, logits: mx.array, position: int, history: Sequence[int], num_prompt: int, answer: list[int]
    ) -> Draw:
        """answer: the tokens drawn so far, where a grammar reads them."""
        raw = logits.astype(mx.float32)
        scores = raw if self._is_plain else self._processed(raw, history, num_prompt)
        if self._guide is not None and (allowed := self._guide.allowed(answer)) is not None:
            scores = mx.where(mx.array(allowed), scores, _NEG_INF)
        if self._is_greedy:
            token = _greedy(logits if self._is_plain else scores)
        else:
            scores = self._filtered(scores)
            if self._inverse_temperature != 1.0:
                scores = scores * self._inverse_temperature
            key = mx.array(draw_key(self._seed, position), dtype=mx.uint32)
            token = mx.random.categorical(scores, key=key)
        if not self._has_logprobs:
            return Draw(token)

        logprobs = log_softmax(raw)
        if not self._num_top:
            return Draw(token, logprobs[token])
        if self._num_top == self._vocab_size:
            return Draw(token, logprobs[token], mx.arange(self._vocab_size, dtype=mx.uint32), logprobs)
        top_ids = mx.argpartition(-logprobs, kth=self._num_top - 1)[: self._num_top]
        return Draw(token, logprobs[token], top_ids, logprobs[top_ids])

    def _processed(self, logits: mx.array, history: Sequence[int], num_prompt: int) -> mx.array:
        """Bias, then penalties, then the ban of the stop ids; (vocab,) float32 in and out."""
        if self._bias_ids is not None:
            logits = logits.at[self._bias_ids].add(self._bias)
        if self._repetition != 1.0:
            logits = self._repetition_penalised(logits, history, num_prompt)
        if self._presence != 0.0 or self._frequency != 0.0:
            counts = Counter(history[num_prompt:])
            if counts:
                penalties = [self._presence + self._frequency * count for count in counts.values()]
                logits = logits.at[_ids(counts)].subtract(mx.array(penalties, dtype=mx.float32))
        if self._stop_ids is not None and len(history) - num_prompt < self._min_tokens:
            logits = _banned(logits, self._stop_ids)
        return logits

    def _repetition_penalised(self, logits: mx.array, history: Sequence[int], num_prompt: int) -> mx.array:
        """Divides what was seen by the penalty, or multiplies where negative (https://arxiv.org/abs/1909.05858)."""
        if self._repetition_context:
            seen = frozenset(history[-self._repetition_context :])
        else:
            if self._prompt_ids[0] != num_prompt:
                self._prompt_ids = (num_prompt, frozenset(history[:num_prompt]))
            seen = self._prompt_ids[1].union(history[num_prompt:])
        if not seen:
            return logits
        ids = _ids(seen)
        chosen = logits[ids]
        penalised = mx.where(chosen < 0, chosen * self._repetition, chosen / self._repetition)
        return mx.put_along_axis(logits, ids, penalised, axis=0)

    def _filtered(self, scores: mx.array) -> mx.array:
        """-inf for what top_p, min_p and top_k remove, each on what the one before left; (vocab,) float32."""
        if self._top_p < 1.0:
            scores = _top_p(log_softmax(scores), self._top_p)
        if self._log_min_p > _NEG_INF:
            scores = mx.where(scores < mx.max(scores) + self._log_min_p, _NEG_INF, scores)
        if self._top_k:
            scores = _banned(scores, mx.argpartition(-scores, kth=self._top_k - 1)[self._top_k :])
        return scores


Row = tuple[
    Sampler, int, Sequence[int], int
]  # and position, history, num_prompt, as `Sampler.draw` takes them


class RowDraws:
    """One token for each row of a batch: lazy until the caller has evaluated `arrays()`."""

    def __init__(self, draws: Sequence[Draw | ValueError], greedy: mx.array | None = None) -> None:
        self._draws, self._greedy = draws, greedy  # greedy: (B,), where that is all there is

    def arrays(self) -> list[mx.array]:
        """What the caller evaluates, in one mx.eval together with the caches."""
        if self._greedy is not None:
            return [self._greedy]
        return [array for draw in self._draws if isinstance(draw, Draw) for array in draw.arrays()]

    def finish(self) -> list[ring_pb2.SampledToken | ValueError]:
        """The drawn tokens, row by row; for a row that could not be drawn, why."""
        if self._greedy is not None:
            return [ring_pb2.SampledToken(id=token) for token in cast("list[int]", self._greedy.tolist())]
        return [draw.finish() if isinstance(draw, Draw) else draw for draw in self._draws]

    def until(self, guesses: Sequence[int]) -> list[ring_pb2.SampledToken | ValueError]:
        """For rows in a sequence: the drawn tokens as long as each is the guess there, and the one after."""
        if self._greedy is not None:
            ids = cast("list[int]", self._greedy.tolist())
            return [ring_pb2.SampledToken(id=token) for token in ids[: _num_equal(ids, guesses) + 1]]
        drawn: list[ring_pb2.SampledToken | ValueError] = []
        for draw, guess in zip_longest(self._draws, guesses):
            token = draw.finish() if isinstance(draw, Draw) else draw
            drawn.append(token)
            if isinstance(token, ValueError) or token.id != guess:
                break
        return drawn


def draw_rows(rows: Sequence[Row], logits: mx.array) -> RowDraws:
    """Builds a draw for each row of `logits` (B, vocab) without evaluating anything; see `Sampler.draw`.

    Rows that only want the most probable token share one pass. A row that cannot be drawn harms no other.
    """
    if len(rows) > 1 and all(sampler.is_argmax for sampler, *_ in rows):
        scores = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        return RowDraws((), mx.argmax(scores, axis=-1))
    draws: list[Draw | ValueError] = []
    for i, (sampler, position, history, num_prompt) in enumerate(rows):
        try:
            draws.append(sampler.draw(logits[i], position, history, num_prompt))
        except ValueError as error:
            draws.append(error)
    return RowDraws(draws)


def _num_equal(drawn: Sequence[int], guesses: Sequence[int]) -> int:
    """How many both begin with."""
    return next((i for i, (a, b) in enumerate(zip(drawn, guesses, strict=False)) if a != b), len(guesses))


def draw_key(seed: int, position: int) -> tuple[int, int]:
    """Two uint32 words for MLX's generator, mixed by splitmix64 from a uint64 seed and a position."""
    mixed = _splitmix64((_splitmix64(seed) + position) & _MASK64)
    return mixed >> 32, mixed & 0xFFFFFFFF


def _splitmix64(state: int) -> int:
    """https://prng.di.unimi.it/splitmix64.c"""
    state = (state + 0x9E3779B97F4A7C15) & _MASK64
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK64
    return state ^ (state >> 31)


def _ids(tokens: Counter[int] | frozenset[int]) -> mx.array:
    return mx.array(list(tokens), dtype=mx.uint32)


def _banned(scores: mx.array, ids: mx.array) -> mx.array:
    return mx.put_along_axis(scores, ids, mx.array(_NEG_INF, dtype=mx.float32), axis=0)


def _greedy(logits: mx.array) -> mx.array:
    """The token that mlx-lm takes: the most probable one, with probabilities rounded to the logits' dtype.

    In bf16 two neighbouring logits often round to one log-probability; the first of them wins.
    """
    return mx.argmax(log_softmax(logits))


def log_softmax(logits: mx.array) -> mx.array:
    """Over the last axis."""
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def add_top(token: ring_pb2.SampledToken, ids: Sequence[int], logprobs: Sequence[float]) -> None:
    """The most probable ones in the token's place, by falling log-probability, then by id."""
    for token_id, logprob in sorted(zip(ids, logprobs, strict=True), key=lambda t: (-t[1], t[0])):
        token.top.add(id=token_id, logprob=logprob)


def _top_p(logprobs: mx.array, top_p: float) -> mx.array:
    """Keeps the smallest set whose mass reaches top_p, and all that ties with its least probable token."""
    rising = mx.sort(logprobs)
    probs = mx.exp(rising)
    mass_above = mx.cumsum(probs, reverse=True, inclusive=False)
    total_mass = mass_above[0] + probs[0]
    num_dropped = mx.sum(mass_above >= top_p * total_mass)
    return mx.where(logprobs < rising[num_dropped], _NEG_INF, logprobs)


def validate(spec: ring_pb2.Sampling, vocab_size: int) -> None:
    """Raises ValueError naming field, value and limit for anything out of range or not finite."""
    limits = (
        ("temperature", spec.temperature, 0.0, math.inf),
        ("top_p", spec.top_p, 0.0, 1.0),
        ("min_p", spec.min_p, 0.0, 1.0),
        ("repetition_penalty", spec.repetition_penalty, 0.0, math.inf),
        ("presence_penalty", spec.presence_penalty, -MAX_PENALTY, MAX_PENALTY),
        ("frequency_penalty", spec.frequency_penalty, -MAX_PENALTY, MAX_PENALTY),
    )
    for field, value, low, high in limits:
        _check_range(field, value, low, high)
    if spec.grammar and spec.min_tokens:
        raise ValueError(
            "min_tokens: with a grammar (response_format) it must be 0, for that says where an answer ends"
        )
    for token, bias in spec.logit_bias.items():
        if token >= vocab_size:
            raise ValueError(f"logit_bias: token id {token} is not below the vocabulary size {vocab_size}")
        _check_range(f"logit_bias[{token}]", bias, -MAX_BIAS, MAX_BIAS)


def _check_range(field: str, value: float, low: float, high: float) -> None:
    """Raises ValueError unless value is finite and in [low, high]."""
    if not math.isfinite(value) or not low <= value <= high:
        limit = f"from {low:g} to {high:g}" if math.isfinite(high) else f"finite and at least {low:g}"
        raise ValueError(f"{field}: {value:g} is not allowed, it must be {limit}")
