"""What a stage did since it became ready. The compute thread writes, any thread reads."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

RECENT_STEPS = 64


@dataclass(slots=True)
class StepStats:
    """Counts of frames with slots, and of their tokens. Times in ms."""

    num_steps: int = 0
    num_tokens: int = 0
    busy_ms: float = 0.0
    recent_step_ms: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT_STEPS))
