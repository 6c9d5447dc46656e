"""One request's state on one stage: its caches, and on the last one its sampler. Compute thread only."""

from __future__ import annotations

from dataclasses import dataclass, field

from cluster.guide import Guides
from cluster.sampler import Sampler
from proto import ring_pb2
from shard_loader.shard import Shard
from shard_loader.state import ShardState


@dataclass(slots=True)
class Session:
    """What a stage keeps between the frames of a request.

    The token history is kept on the last stage alone, and only where a penalty reads it.
    """

    spec: ring_pb2.SessionSpec
    state: ShardState
    sampler: Sampler | None = None
    history: list[int] = field(default_factory=list)

    @classmethod
    def open(cls, spec: ring_pb2.SessionSpec, shard: Shard, guides: Guides | None = None) -> Session:
        """Fresh caches for `spec`; raises ValueError for sampling values out of range."""
        sampler = None
        if shard.is_last:
            guide, grammar = None, spec.sampling.grammar
            if grammar and guides is None:
                raise ValueError("this stage was loaded without the tokenizer that a grammar needs")
            if grammar and guides is not None:
                guide = guides.open(grammar)
            sampler = Sampler(spec.sampling, shard.vocab_size, guide)
        return cls(spec, shard.new_state(), sampler)
