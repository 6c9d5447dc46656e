"""One answer of a ring, with its time and what was guessed of it."""

from __future__ import annotations

import time
from dataclasses import dataclass

from proto import head_pb2, head_pb2_grpc, ring_pb2
from tests.ring_processes import RingProcesses


@dataclass(frozen=True, slots=True)
class GuessedAnswer:
    """took_s: from the first token to the last. Of `num_guessed` tokens `num_right` were right."""

    tokens: list[int]
    took_s: float
    num_guessed: int
    num_right: int

    @property
    def num_trips(self) -> int:
        """Those that the answer waited for: one for each token but the right guesses."""
        return len(self.tokens) - self.num_right


def ask(ring: RingProcesses, prompt: list[int], num_tokens: int, temperature: float) -> GuessedAnswer:
    """Of a ring that has nothing else to do."""
    before = ring.wait_ok()
    arrivals, tokens = [], []
    sampling = ring_pb2.Sampling(temperature=temperature, seed=1)
    request = head_pb2.GenerateRequest(prompt=prompt, max_tokens=num_tokens, sampling=sampling)
    with ring.channel() as channel:
        for reply in head_pb2_grpc.HeadStub(channel).Generate(request, timeout=300.0):
            arrivals.append(time.perf_counter())
            tokens += [token.id for token in reply.tokens]
    after = ring.wait_ok()
    return GuessedAnswer(
        tokens,
        arrivals[-1] - arrivals[0],
        after.num_guessed - before.num_guessed,
        after.num_guessed_right - before.num_guessed_right,
    )
