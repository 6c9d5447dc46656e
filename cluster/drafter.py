"""A small model on rank 0 that guesses what the ring's model will draw. Compute thread only.

It draws as the last stage does, with the same filters and the same key (request seed, position): with common
random numbers two models that think alike draw alike ("Coupling without Communication and Drafter-Invariant
Speculative Decoding", https://arxiv.org/abs/2408.07978: both take the argmax over the same Gumbel noise). The
ring checks a guess whatever it is, so nothing here can change an answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf, log

import mlx.core as mx

from cluster.draft_readings import Reading, Readings
from cluster.sampler import Sampler
from cluster.sampling_values import GREEDY_BELOW
from planner.draft_bytes import MAX_LOGIT_ROWS, READ_CHUNK_TOKENS
from planner.kv_profile import KV_STEP_TOKENS
from proto import ring_pb2
from shard_loader.shard import Shard, ShardError
from shard_loader.state import ShardState
from shard_loader.trim import clear_cache

# A greedy guess below this probability ends the window: what follows a wrong guess is computed in vain, by
# the draft model and by every stage. It is the `assistant_confidence_threshold` of Hugging Face's assisted
# generation (transformers, GenerationConfig). Where tokens are drawn, an unlikely one is no likely error, for
# both models may draw it with the same noise. docs/draft_model.md has the figures.
MIN_CONFIDENCE = 0.4


@dataclass(frozen=True, slots=True)
class DraftCall:
    """What is asked: at most `num_drafts` ids that may follow `tokens`, of which num_prompt are the prompt.

    num_drafts 0: nothing but to read them. tokens: the whole sequence, guesses on their way included.
    """

    session: int
    tokens: Sequence[int]
    num_drafts: int
    sampling: ring_pb2.Sampling
    num_prompt: int


class Drafter:
    """Guesses for many sessions, each with caches of its own, as long as they fit.

    vocab_size: the width of the ring's logits. kv_bytes(n): of one session's caches that hold n tokens.
    max_kv_bytes: of all sessions'; beyond it those used longest ago are forgotten, and read again when asked
    for. max_context: tokens that the draft model was made for; behind them it guesses nothing.
    min_confidence: for all guesses, instead of MIN_CONFIDENCE for greedy ones.
    Raises ShardError where the model's caches cannot be copied: guesses that were wrong could not be undone.
    """

    def __init__(
        self,
        shard: Shard,
        name: str,
        *,
        vocab_size: int,
        max_context: int,
        kv_bytes: Callable[[int], int],
        max_kv_bytes: int,
        min_confidence: float | None = None,
    ) -> None:
        if shard.trim_window is None:
            raise ShardError(
                f"{name} cannot be a draft model: its caches cannot go back to an earlier token; choose "
                'another, or set speculation.method to "ngram"'
            )
        self.shard, self.name = shard, name
        self.vocab_size, self.max_context = vocab_size, max_context
        self._min_confidence = min_confidence
        self.num_passes = 0  # forward passes so far
        self.readings = Readings(shard, shard.trim_window, kv_bytes, max_kv_bytes)

    @property
    def num_sessions(self) -> int:
        """Those that are open."""
        return self.readings.num_open

    @property
    def kv_bytes(self) -> int:
        """What all sessions' caches hold, with those of closed ones that may be begun with."""
        return self.readings.nbytes

    @property
    def nbytes(self) -> int:
        """Weights and caches."""
        return self.shard.footprint.total_bytes + self.kv_bytes

    def min_logprob(self, sampling: ring_pb2.Sampling) -> float:
        """Of a guess that does not end its window."""
        least = self._min_confidence
        if least is None:
            least = MIN_CONFIDENCE if sampling.temperature < GREEDY_BELOW else 0.0
        return log(least) if least > 0 else -inf

    def draft(self, call: DraftCall) -> list[int]:
        """The ids. Reads one chunk at most: while more than that is missing, there are none.

        Raises ValueError for sampling values out of range.
        """
        guessing = self.begin(call)
        while guessing.ids is None:
            guessing.step()
        return guessing.ids

    def begin(self, call: DraftCall) -> Guessing:
        """The same in small pieces, between which other work may be done."""
        return Guessing(self, call)

    def close(self, session: int) -> None:
        """The request ended. Its caches stay while there is room, for a prompt that begins like it."""
        self.readings.close(session)

    def drop_all(self) -> None:
        """A new epoch: all sessions are over."""
        self.readings.drop_all()


class Guessing:
    """One window of guesses on its way. ids: None until they are all known."""

    def __init__(self, drafter: Drafter, call: DraftCall) -> None:
        self.call = call
        self.ids: list[int] | None = None
        self.num_read, self.own_s = 0, 0.0  # of the call's tokens; and whoever takes the steps says how long
        self._drafter, self._tokens = drafter, list(call.tokens)
        self._reading: Reading | None = None
        self._ahead: ShardState | None = None  # reads guesses, where they could not be forgotten otherwise
        self._guesses: list[int] = []
        self._min_logprob = drafter.min_logprob(call.sampling)

    def step(self) -> bool:
        """One piece of work: a chunk is read, or a token drawn. False: there is nothing left to do.

        Where more than a chunk is missing `ids` is empty at once, and what is left is reading.
        """
        reading = self._reading or self._begin()
        if reading is None:
            self.ids = []
            return False
        num_read, num_tokens = len(reading.tokens), len(self._tokens)
        num_missing = num_tokens - num_read  # below 0: guesses have been read
        is_answered = self.ids is not None
        grown = (
            num_read + KV_STEP_TOKENS - num_read % KV_STEP_TOKENS
        )  # where caches grow, if nothing crosses it
        if num_missing > MAX_LOGIT_ROWS or num_tokens > grown or (is_answered and num_missing > 1):
            stop = min(num_tokens - 1, num_read + READ_CHUNK_TOKENS, grown)
            self._read(reading, self._tokens[num_read:stop])
            if stop < num_tokens - 1:
                self.ids = []
            return not is_answered or stop < num_tokens - 1
        if is_answered:
            return False
        if num_missing > 0:
            state, unread = reading.state, self._tokens[num_read:]
            self.num_read += num_missing
        else:
            state, unread = self._state_ahead(reading), self._guesses[-1:]
        if state is reading.state:
            reading.tokens.extend(unread)
        if not self._draw(reading, state, unread) or len(self._guesses) == self.call.num_drafts:
            self.ids = self._guesses
            return False
        return True

    def _begin(self) -> Reading | None:
        """None: there is no guessing behind so many tokens."""
        drafter, call = self._drafter, self.call
        stop = len(self._tokens) + call.num_drafts
        if not self._tokens or stop > drafter.max_context:
            return None
        reading = self._reading = drafter.readings.open(call.session, self._tokens, stop)
        if reading is not None and call.num_drafts and reading.sampler is None:
            reading.sampler = Sampler(_what_draws(call.sampling), drafter.vocab_size)
        if not call.num_drafts:
            self.ids = []
        return reading

    def _read(self, reading: Reading, tokens: list[int]) -> None:
        self._drafter.shard.forward(mx.array([tokens]), None, reading.state)
        mx.eval(reading.state.arrays())
        clear_cache()  # a chunk's temporaries are larger than any draw's
        self._drafter.num_passes += 1
        self.num_read += len(tokens)
        reading.tokens.extend(tokens)

    def _state_ahead(self, reading: Reading) -> ShardState:
        """What reads the guesses: a copy, where the caches themselves could not forget them."""
        stop = len(self._tokens) + self.call.num_drafts
        if self._ahead is None and not self._drafter.readings.can_go_back(stop):
            self._ahead = self._drafter.shard.fork(reading.state, reading.state.position)
        return self._ahead or reading.state

    def _draw(self, reading: Reading, state: ShardState, unread: list[int]) -> bool:
        """Whether the token drawn after `unread` is likely enough; if so, it is a guess."""
        sampler = reading.sampler
        assert sampler is not None
        logits = self._widened(self._drafter.shard.forward(mx.array([unread]), None, state)[0, -1])
        history = [*self._tokens, *self._guesses] if sampler.reads_history else ()
        position = len(self._tokens) + len(self._guesses)
        draw = sampler.draw(logits, position, history, self.call.num_prompt)
        self._drafter.num_passes += 1
        mx.eval(draw.arrays(), state.arrays())
        token = draw.finish()
        if token.logprob < self._min_logprob:
            return False
        self._guesses.append(token.id)
        return True

    def _widened(self, logits: mx.array) -> mx.array:
        """As wide as the ring's, (vocab_size,): the noise of a draw depends on that."""
        width = self._drafter.vocab_size
        num_missing = width - logits.shape[0]
        if num_missing <= 0:
            return logits[:width]
        return mx.concatenate([logits, mx.full((num_missing,), -mx.inf, dtype=logits.dtype)])


def _what_draws(sampling: ring_pb2.Sampling) -> ring_pb2.Sampling:
    """What decides which token is drawn, and asks for its probability; a grammar is the last stage's."""
    own = ring_pb2.Sampling()
    own.CopyFrom(sampling)
    own.logprobs, own.top_logprobs, own.grammar = True, 0, ""
    return own
