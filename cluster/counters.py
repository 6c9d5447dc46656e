"""What the head has done since it started, in numbers for its metrics. Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Counters:
    """Totals of one scheduler, whose lock guards them."""

    num_requests: int = 0
    num_prompts: int = 0  # that entered the ring
    num_cached_prompts: int = 0  # of these, begun with what others had read
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0  # of these, not read again
    num_completion_tokens: int = 0
    num_failed: int = 0
    num_cancelled: int = 0

    def add_cached(self, before: int, after: int) -> None:
        """Of a prompt, `after` tokens and not `before` are not read again."""
        self.num_cached_tokens += after - before
        self.num_cached_prompts += (after > 0) - (before > 0)
