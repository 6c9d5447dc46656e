"""What a ring is asked to do. A pure value."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from planner.kv_profile import PREFILL_CHUNK_TOKENS


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests and how they go through the ring. Raises ValueError for a number below 1."""

    context: int  # tokens of one request, prompt and answer
    concurrency: int  # requests at once
    rows: int = 1  # requests whose tokens one frame carries together, as the search takes it
    max_rows: int = 1  # that one frame may carry: above `rows`, a ring's throughput is that of its even share
    chunk_tokens: int = PREFILL_CHUNK_TOKENS  # of a prompt in one frame, at most
    prompt: int = 0  # tokens of the prompt that prefill is timed with; 0: min(2048, context / 2)

    def __post_init__(self) -> None:
        for key in ("context", "concurrency", "rows", "max_rows", "chunk_tokens"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} = {getattr(self, key)} must be at least 1")

    def shares(self, num_frames: int) -> tuple[int, ...]:
        """Rows of each frame of a round, as the head spreads all requests over so many frames at most.

        More than `num_frames` where no more than `max_rows` go together: then frames take turns.
        """
        share = min(-(-self.concurrency // num_frames), self.max_rows)
        full, rest = divmod(self.concurrency, share)
        return (share,) * full + ((rest,) if rest else ())

    @property
    def decode_context(self) -> int:
        """Tokens in the cache when decode is timed."""
        return self.context // 2

    @property
    def prompt_tokens(self) -> int:
        """The prompt that prefill is timed with."""
        return self.prompt or max(1, min(2048, self.context // 2))

    @property
    def num_chunks(self) -> int:
        """Chunks of the prompt before its last token, which goes alone; at least one."""
        return max(1, ceil((self.prompt_tokens - 1) / self.chunk_tokens))

    @property
    def mean_chunk_tokens(self) -> int:
        """Tokens of such a chunk, taken as equal."""
        return max(1, ceil((self.prompt_tokens - 1) / self.num_chunks))
