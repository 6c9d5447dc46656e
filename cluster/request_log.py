"""What the head says of a request when it is over. The RPC thread that answers it."""

from __future__ import annotations

import logging
import time

from cluster.instructions import Emit, Fail, FailureKind
from cluster.logs import UNSAID

logger = logging.getLogger(__name__)


class RequestLog:
    """One line at the end; nothing for a token. `kind` is how it failed, empty where it did not."""

    def __init__(self, trace_id: str, num_prompt: int) -> None:
        self.trace_id = trace_id
        self.kind = FailureKind.CANCELLED.value  # until it ends otherwise
        self.first_s = 0.0  # from the first chunk's start to the first token
        self._num_prompt = num_prompt
        self._words = "left by its client"
        self._num_completion: int | None = None

    def fail(self, failure: Fail) -> None:
        """It ends with an error. What an invalid request holds is told to its client alone."""
        self.kind = failure.kind.value
        is_told = failure.kind is not FailureKind.INVALID
        self._words = f"{self.kind}: {failure.message}" if is_told else "refused: it can never run"

    def finish(self, last: Emit) -> None:
        """It ends with all its tokens."""
        self.kind, self._words, self._num_completion = (
            "",
            f"finished ({last.finish_reason})",
            last.num_completion,
        )

    def enough(self) -> None:
        """Its client has all it wanted, as after a stop string."""
        if self.kind == FailureKind.CANCELLED.value:
            self.kind, self._words = "", "finished (its client has all it wanted)"

    def end(self, submitted_at: float, started_at: float) -> None:
        """Write the line. Both by time.monotonic(); started_at is 0 if it never entered the ring."""
        now = time.monotonic()
        fields: dict[str, object] = {
            "prompt_tokens": self._num_prompt,
            "total_s": round(now - submitted_at, 4),
        }
        words = [self._words, f"{self._num_prompt} prompt tokens"]
        if self._num_completion is not None:
            fields["completion_tokens"] = self._num_completion
            words.append(f"{self._num_completion} completion tokens")
        if started_at:
            fields["queue_s"] = round(started_at - submitted_at, 4)
            words.append(f"waited {started_at - submitted_at:.3f} s")
        if self.first_s:
            fields["prefill_s"] = round(self.first_s, 4)
            words.append(f"first token {self.first_s:.3f} s later")
        words.append(f"{now - submitted_at:.3f} s in all")
        is_ours = self.kind in (FailureKind.UNAVAILABLE.value, FailureKind.FAILED.value)
        level = logging.WARNING if is_ours else logging.INFO
        extra = {**UNSAID, "fields": fields, "request_id": self.trace_id}
        logger.log(level, "%s", ", ".join(words), extra=extra)
