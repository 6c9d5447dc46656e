"""One request's state on one stage: its caches, and on the last one its sampler. Compute thread only."""

from __future__ import annotations

from dataclasses import dataclass, field

import mlx.core as mx

from cluster.guide import Guides
from cluster.guide_process import GuideProcess
from cluster.pooled_prompt import PooledPrompt
from cluster.sampler import Row, Sampler
from proto import ring_pb2
from shard_loader.batch_state import BatchState
from shard_loader.shard import Shard
from shard_loader.state import ShardState


@dataclass(slots=True, eq=False)
class Group:
    """Sessions whose tokens share a forward pass: row i of `state` is that of members[i]."""

    state: BatchState
    members: list[Session]


@dataclass(slots=True, eq=False)
class Session:
    """What a stage keeps between the frames of a request.

    Its caches are its own, or a row of its group's. The token history is kept on the last stage alone, and
    only where a penalty reads it.
    """

    spec: ring_pb2.SessionSpec
    state: ShardState | None  # None: it is a row of its group
    sampler: Sampler | None = None
    history: list[int] = field(default_factory=list)
    position: int = 0  # tokens seen
    group: Group | None = None
    is_closed: bool = False
    is_scored: bool = False  # its prompt is: asked for every token of every row
    last_logits: mx.array | None = None  # (1, vocab) behind the last token, while that is so
    pooled: PooledPrompt | None = None  # on the last stage, where its prompt becomes a vector

    @classmethod
    def open(
        cls, spec: ring_pb2.SessionSpec, shard: Shard, guides: Guides | GuideProcess | None = None
    ) -> Session:
        """Fresh caches for `spec`; raises ValueError for sampling values out of range."""
        sampler, pooling = None, spec.sampling.pooling
        if pooling.kind:
            pooled = PooledPrompt(pooling) if shard.is_last else None
            return cls(spec, shard.new_state(), pooled=pooled)
        if shard.is_last:
            guide, grammar = None, spec.sampling.grammar
            if grammar and guides is None:
                raise ValueError("this stage was loaded without the tokenizer that a grammar needs")
            if grammar and guides is not None:
                guide = guides.open(grammar)
            sampler = Sampler(spec.sampling, shard.vocab_size, guide)
        return cls(spec, shard.new_state(), sampler, is_scored=spec.sampling.prompt_logprobs)

    @classmethod
    def empty(cls, slot: ring_pb2.Slot, shard: Shard) -> Session:
        """Stands in a frame of several for one that cannot take part, and for no request."""
        return cls(ring_pb2.SessionSpec(session=slot.session), shard.new_state())

    @property
    def is_pooled(self) -> bool:
        """Its prompt becomes a vector: no token is drawn."""
        return self.spec.sampling.pooling.kind != ring_pb2.Pooling.NONE

    def begin_like(self, source: Session, state: ShardState) -> None:
        """The first tokens are those of `source`, whose copy `state` is."""
        self.state, self.position = state, state.position
        self.history = source.history[: state.position]

    def rewind(self, state: ShardState, position: int) -> None:
        """Its last tokens were wrong guesses, or the guesses of an answer that has ended; state: its own.

        Raises ValueError where its caches cannot go back so far.
        """
        if position < self.position:
            state.rewind(position)
            self.position = position
            del self.history[position:]

    def row(self, num_guessed: int = 0) -> Row:
        """What the draw of the next token needs, as if the last `num_guessed` ones had not been read yet."""
        assert self.sampler is not None
        history = self.history[:-num_guessed] if num_guessed and self.sampler.reads_history else self.history
        return self.sampler, self.position - num_guessed, history, self.spec.prompt_tokens
