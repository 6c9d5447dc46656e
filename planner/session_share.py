"""How much of a plan's room a session takes, where the plan holds `concurrency` whole contexts. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from planner.kv_profile import KV_STEP_TOKENS, PREFILL_CHUNK_TOKENS
from planner.model_profile import ModelProfile

SMALLEST = 1 / 64  # however little it holds, a session is not free


class SessionShare:
    """The KV bytes of a session of so many tokens, as a share of those of a whole context.

    Of all stages the one counts on which it is most. ranges: the stages' layers, half-open.
    chunk_tokens: of a prompt in one frame, at most.
    """

    def __init__(
        self,
        model: ModelProfile,
        ranges: Sequence[tuple[int, int]],
        context: int,
        chunk_tokens: int = PREFILL_CHUNK_TOKENS,
    ) -> None:
        self._stages = [[layer.cache for layer in model.layers[start:stop]] for start, stop in ranges]
        self._context, self._chunk_tokens = context, chunk_tokens
        self._known: dict[int, float] = {}

    def __call__(self, num_tokens: int) -> float:
        """From SMALLEST to 1.0, which a whole context is."""
        num_steps = -(-num_tokens // KV_STEP_TOKENS)
        if num_steps not in self._known:
            self._known[num_steps] = self._share(min(num_steps * KV_STEP_TOKENS, self._context))
        return self._known[num_steps]

    def _share(self, num_tokens: int) -> float:
        shares = [SMALLEST]
        for caches in self._stages:
            whole = sum(cache.nbytes(self._context, self._chunk_tokens) for cache in caches)
            if whole:
                some = sum(cache.nbytes(num_tokens, self._chunk_tokens) for cache in caches)
                shares.append(some / whole)
        return max(shares)
