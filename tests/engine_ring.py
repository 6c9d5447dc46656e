"""A scheduler and engines without the wire between them: frames go round when the test says so."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from cluster.engine import Engine
from cluster.instructions import Emit, Fail, Instruction, Send
from cluster.room import Limits
from cluster.scheduler import Scheduler
from proto import ring_pb2
from shard_loader.weights import load_shard
from tests.test_engine import trip


class EngineRing:
    """As many stages as `cuts` make; room for `room` whole contexts, shared in proportion to tokens."""

    def __init__(
        self,
        model: Path,
        cuts: Sequence[int],
        num_layers: int,
        *,
        context: int = 400,
        room: int = 4,
        chunk: int = 64,
    ) -> None:
        bounds = [0, *cuts, num_layers]
        self.engines = [Engine(load_shard(model, a, b)) for a, b in itertools.pairwise(bounds)]
        windows = [engine.trim_window for engine in self.engines]
        self.trim_window = min(-1 if window is None else window for window in windows)
        self.scheduler = Scheduler(max_queued=64)
        self.limits = Limits(
            context,
            room,
            len(bounds),
            chunk,
            max_rows=4,
            share=lambda n: min(n, context) / context,
            trim_window=self.trim_window,
        )
        self.scheduler.ring_up(1, self.limits)
        self.frames: deque[ring_pb2.Frame] = deque()  # in the ring
        self.answers: dict[str, list[int]] = {}
        self.cached: dict[str, int] = {}
        self.failed: dict[str, str] = {}
        self.num_forks = 0

    def submit(self, name: str, prompt: Sequence[int], max_tokens: int, **options: object) -> None:
        """A request; its first frames wait at the ring's entry."""
        sampling = options.pop("sampling", None) or ring_pb2.Sampling()
        assert isinstance(sampling, ring_pb2.Sampling)
        self.answers[name] = []
        self.do(self.scheduler.submit(name, list(prompt), max_tokens, sampling, **options))  # type: ignore[arg-type]

    def cancel(self, name: str) -> None:
        self.do(self.scheduler.cancel(name))

    def turn(self) -> bool:
        """One frame goes round; False where there is none."""
        if not self.frames:
            return False
        frame = self.frames.popleft()
        self.num_forks += len(frame.forks)
        result = trip(self.engines, frame)
        if result is not None:
            self.do(self.scheduler.on_result(result.epoch, result.seq, result.slots))
        return True

    def run(self) -> None:
        """Until nothing is left to do."""
        while self.turn():
            pass

    def ask(self, prompt: Sequence[int], max_tokens: int, **options: object) -> tuple[list[int], int]:
        """The answer of a request by itself, and how many tokens of its prompt were not read."""
        name = f"ask {len(self.answers)}"
        self.submit(name, prompt, max_tokens, **options)
        self.run()
        assert name not in self.failed, self.failed[name]
        return self.answers[name], self.cached[name]

    def do(self, instructions: Sequence[Instruction]) -> None:
        """What the scheduler said."""
        for instruction in instructions:
            if isinstance(instruction, Send):
                self.frames.append(instruction.frame)
            elif isinstance(instruction, Emit):
                self.answers[instruction.request_id].append(instruction.token.id)
                self.cached[instruction.request_id] = instruction.num_cached
            elif isinstance(instruction, Fail):
                self.failed[instruction.request_id] = instruction.message

    def check(self) -> None:
        """Every stage has just the sessions that the scheduler keeps, once all is done."""
        for engine in self.engines:
            assert engine.num_sessions == 0
            assert len(engine.sessions) == self.scheduler.num_kept
