"""Log-probabilities of tokens as chat completions and the Responses API tell them. Pure.

platform.openai.com/docs/api-reference/chat/object (logprobs), responses/object (output_text)
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from cluster.api.choice import finite
from cluster.tokenizer import Tokenizer
from proto import ring_pb2


class TokenLogprobs:
    """`num_top`: how many of the most probable tokens each place has beside its own."""

    def __init__(self, tokenizer: Tokenizer, num_top: int) -> None:
        self._tokenizer = tokenizer
        self._num_top = num_top

    def entries(self, tokens: Iterable[ring_pb2.SampledToken]) -> list[dict[str, Any]]:
        """One for each token, with its text and its bytes."""
        return [self._token(token) for token in tokens]

    def _token(self, token: ring_pb2.SampledToken) -> dict[str, Any]:
        top = [self._entry(other.id, other.logprob) for other in token.top[: self._num_top]]
        return self._entry(token.id, token.logprob) | {"top_logprobs": top}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        piece = self._tokenizer.piece(token)
        return {"token": piece.decode("utf-8", "replace"), "logprob": finite(logprob), "bytes": list(piece)}
