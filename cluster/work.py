"""What the compute thread is given to do. Pure values."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cluster.draft_load import DraftLoad
from cluster.draft_queue import DraftEnd, DraftWork
from cluster.memory_limits import MemoryNeed
from cluster.step import Step
from planner.adapters import AdapterFiles
from planner.kv_quant import KvQuantization
from planner.load_options import LoadOptions
from proto import ring_pb2
from proto.codec import Tensor
from shard_loader.shard_cache import CacheSettings
from shard_loader.weights import AS_IT_IS


@dataclass(frozen=True, slots=True)
class StepWork:
    """A frame to run; `release` returns its credit to the sender."""

    frame: ring_pb2.Frame
    tensors: Sequence[Tensor]
    release: Callable[[], None]


@dataclass(frozen=True, slots=True)
class LoadWork:
    """From now on this epoch: its layers, or none where start == stop."""

    epoch: int
    model_dir: Path | None
    model_digest: str
    start: int
    stop: int
    need: MemoryNeed | None = None
    options: LoadOptions = AS_IT_IS
    adapters: tuple[AdapterFiles, ...] = ()
    cache: CacheSettings | None = None
    kv: KvQuantization | None = None
    # Gets the bytes that are missing and returns the folder; None: the folder is complete.
    fetch: Callable[[Callable[[int, int], None], threading.Event], Path] | None = None
    drafter: DraftLoad | None = None  # a draft model, which stands here beside the layers
    superseded: threading.Event = field(default_factory=threading.Event, compare=False)


@dataclass(frozen=True, slots=True)
class TrimWork:
    """Memory is short: give back what MLX keeps of freed buffers."""


@dataclass(frozen=True, slots=True)
class Running:
    """A frame that the device computes while the next one is built."""

    work: StepWork
    step: Step
    started: float  # perf_counter() when its work began,
    begun: float  # when the device was first given some of it,
    built: float  # and when it had it all
    sessions: frozenset[int]

    @property
    def is_part(self) -> bool:
        """Of a prompt that is read on."""
        slots = self.work.frame.slots
        return bool(slots) and not slots[0].is_sampled

    def is_followed_by(self, frame: ring_pb2.Frame) -> bool:
        """Whether the next one reads on in this one's prompt: it is built upon what this one writes.

        Not where a copy is kept of what it writes: that is made as this one ends.
        """
        before = self.work.frame
        if before.forks or not (_is_alone(before) and _is_alone(frame)) or before.slots[0].is_sampled:
            return False
        return self.sessions == {frame.slots[0].session}


def _is_alone(frame: ring_pb2.Frame) -> bool:
    return len(frame.slots) == 1 and not frame.slots[0].error


Work = StepWork | LoadWork | TrimWork | DraftWork | DraftEnd


@dataclass(slots=True)
class LoadProgress:
    """Bytes of this node's own weights. Written by the compute thread."""

    loaded_bytes: int = 0
    total_bytes: int = 0
