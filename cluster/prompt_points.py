"""At which points of a prompt a copy of its caches is kept, where caches cannot be shortened later. Pure.

Recurrent states and sliding windows that have wrapped can only be gone on from where they are. So while a
prompt is read, copies are kept of what others may begin with: all of it but its end, since a chat's next turn
has other tokens after the last message than those that ask for the answer; and what it shares with a prompt
that came before, such as a system prompt.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from cluster.kept import MIN_COMMON, common

END_TOKENS = 16  # of a prompt, which its copy leaves out: more than any chat template asks for an answer with
MAX_PROMPTS = 64
MAX_TOKENS = 1 << 19  # of them all


@dataclass(slots=True)
class RecentPrompts:
    """What was asked lately, whether or not anything of it is still kept."""

    _prompts: deque[tuple[Sequence[int], str]] = field(default_factory=deque)
    _num_tokens: int = 0

    def add(self, prompt: Sequence[int], adapter: str) -> None:
        """The oldest are forgotten for it."""
        self._prompts.append((prompt, adapter))
        self._num_tokens += len(prompt)
        while len(self._prompts) > MAX_PROMPTS or self._num_tokens > MAX_TOKENS:
            self._num_tokens -= len(self._prompts.popleft()[0])

    def num_shared(self, prompt: Sequence[int], adapter: str) -> int:
        """With how many tokens another one began like this one, at most."""
        return max(
            (common(known, prompt, len(prompt)) for known, name in self._prompts if name == adapter),
            default=0,
        )


def points(num_prompt: int, num_begun: int, num_shared: int) -> list[int]:
    """After how many of its tokens a prompt is copied, rising.

    num_begun: those that it need not read; num_shared: those with which another one began too.
    """
    end = num_prompt - END_TOKENS
    if num_shared >= end:
        wanted = [end]
    else:
        wanted = [num_shared] if end - num_shared < MIN_COMMON else [num_shared, end]
    return [point for point in wanted if point >= num_begun + MIN_COMMON]


def next_end(position: int, num_prompt: int, chunk: int, stops: Sequence[int]) -> int:
    """Where the chunk ends that begins at `position`: all tokens but the last, then that one, as mlx-lm cuts.

    It goes past none of `stops`.
    """
    end = min(max(num_prompt - 1, position + 1), position + chunk)
    return min((stop for stop in stops if position < stop < end), default=end)
