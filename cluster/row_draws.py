"""Tokens on their way, one for each row of a batch: lazy until evaluated, then read all at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import mlx.core as mx
import numpy as np

from proto import ring_pb2
from shard_loader.landing import Landed, Landing


class RowDraws:
    """One token for each row, lazy until the caller has evaluated `arrays()`.

    Rows are told in any order and in several parts. failed: why a row has no token. on_token: told of a row's
    token as soon as it is known.
    """

    def __init__(self, num_rows: int) -> None:
        self.failed: dict[int, ValueError] = {}
        self.on_token: dict[int, Callable[[int], None]] = {}
        self._num_rows = num_rows
        self._tokens: list[tuple[Sequence[int], mx.array | Landed]] = []
        self._logprobs: list[tuple[Sequence[int], mx.array]] = []
        self._top: list[tuple[Sequence[int], mx.array, mx.array]] = []

    def add_tokens(self, rows: Sequence[int], tokens: mx.array) -> None:
        """tokens: (len(rows),) uint32."""
        self._tokens.append((rows, tokens))

    def add_logprobs(self, rows: Sequence[int], logprobs: mx.array) -> None:
        """logprobs: (len(rows),) float32, of the tokens drawn."""
        self._logprobs.append((rows, logprobs))

    def add_top(self, rows: Sequence[int], ids: mx.array, logprobs: mx.array) -> None:
        """The most probable ones, in no order: (len(rows), n) uint32 and float32."""
        self._top.append((rows, ids, logprobs))

    def land(self, landing: Landing) -> None:
        """The tokens are read where they land; call it before `arrays`, if at all."""
        self._tokens = [
            (rows, landing.of(tokens) if isinstance(tokens, mx.array) else tokens)
            for rows, tokens in self._tokens
        ]

    def give_back(self) -> None:
        """They are evaluated, and nobody wants to read them."""
        for _, tokens in self._tokens:
            if isinstance(tokens, Landed):
                tokens.give_back()

    def arrays(self) -> list[mx.array]:
        """What the caller evaluates, in one mx.eval together with the caches."""
        tokens = [one.array if isinstance(one, Landed) else one for _, one in self._tokens]
        tops = [array for _, *both in self._top for array in both]
        return [*tokens, *(array for _, array in self._logprobs), *tops]

    def finish(self) -> list[ring_pb2.SampledToken | ValueError]:
        """The drawn tokens, row by row; for a row that could not be drawn, why."""
        return self._finished(self._ids())

    def until(self, guesses: Sequence[int]) -> list[ring_pb2.SampledToken | ValueError]:
        """For rows in a sequence: the drawn tokens as long as each is the guess there, and the one after."""
        ids = self._ids()
        num_equal = next(
            (row for row, guess in enumerate(guesses) if ids[row] is None or ids[row] != guess), len(guesses)
        )
        return self._finished(ids[: num_equal + 1])

    def _ids(self) -> list[int | None]:
        ids: list[int | None] = [None] * self._num_rows
        for rows, tokens in self._tokens:
            if isinstance(tokens, Landed):
                read = np.frombuffer(tokens.read().data, np.uint32).tolist()
            else:
                read = cast("list[int]", tokens.tolist())
            for row, token in zip(rows, read, strict=True):
                ids[row] = token
        return ids

    def _finished(self, ids: Sequence[int | None]) -> list[ring_pb2.SampledToken | ValueError]:
        """Of the first rows, as many as there are ids."""
        drawn: list[ring_pb2.SampledToken | ValueError] = []
        for row, token in enumerate(ids):
            if token is None:
                drawn.append(self.failed[row])
                continue
            drawn.append(ring_pb2.SampledToken(id=token))
            if row in self.on_token:
                self.on_token[row](token)
        for rows, array in self._logprobs:
            for row, logprob in zip(rows, cast("list[float]", array.tolist()), strict=True):
                if row < len(drawn):
                    _token(drawn, row).logprob = logprob
        for rows, ids_array, array in self._top:
            top_ids = cast("list[list[int]]", ids_array.tolist())
            top_logprobs = cast("list[list[float]]", array.tolist())
            for row, ids_of_row, logprobs in zip(rows, top_ids, top_logprobs, strict=True):
                if row < len(drawn):
                    add_top(_token(drawn, row), ids_of_row, logprobs)
        return drawn


class Draw:
    """One token on its way: lazy until the caller has evaluated `arrays()`."""

    def __init__(self, draws: RowDraws) -> None:
        """draws: of this one row, which has not failed."""
        self._draws = draws

    def arrays(self) -> list[mx.array]:
        """What the caller evaluates."""
        return self._draws.arrays()

    def finish(self) -> ring_pb2.SampledToken:
        """The drawn token; `top` is sorted by falling log-probability, then by id."""
        return _token(self._draws.finish(), 0)


def _token(drawn: Sequence[ring_pb2.SampledToken | ValueError], row: int) -> ring_pb2.SampledToken:
    token = drawn[row]
    assert isinstance(token, ring_pb2.SampledToken)
    return token


def add_top(token: ring_pb2.SampledToken, ids: Sequence[int], logprobs: Sequence[float]) -> None:
    """The most probable ones in the token's place, by falling log-probability, then by id."""
    for token_id, logprob in sorted(zip(ids, logprobs, strict=True), key=lambda t: (-t[1], t[0])):
        token.top.add(id=token_id, logprob=logprob)
