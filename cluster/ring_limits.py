"""What a plan and the nodes' own words allow the scheduler. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from cluster.room import Limits
from planner.draft_bytes import keeps_all
from planner.model_profile import ModelProfile
from planner.plan import Plan
from planner.prefill_chunk import PromptChunks, num_lone_chunks
from planner.session_share import SessionShare
from proto import control_pb2
from shard_loader.cut_proof import RowProof
from shard_loader.reach import Reach

MAX_ROWS = 32  # of a frame, where the cluster file does not say


class RingLimits:
    """Of one plan. rows: what may be done with sequences of its model; max_batch_size: as configured.

    max_drafts: guesses in a frame.
    """

    def __init__(
        self,
        plan: Plan,
        model: ModelProfile,
        rows: RowProof,
        chunks: PromptChunks | None = None,
        max_batch_size: int | None = None,
        *,
        max_drafts: int = 0,
        has_ngrams: bool = True,
        draft: ModelProfile | None = None,
    ) -> None:
        self._plan, self._rows, self._chunks = plan, rows, chunks or PromptChunks()
        self._max_drafts, self._has_ngrams, self._draft = max_drafts, has_ngrams, draft
        self._vocab_size = model.vocab_size
        self._max_rows = (max_batch_size or MAX_ROWS) if rows.batched else 1
        ranges = [(part.start, part.stop) for part in plan.assignments]
        self._share = SessionShare(model, ranges, plan.context, self._chunks.alone)

    def limits(self, statuses: Iterable[control_pb2.NodeStatus]) -> Limits:
        """statuses: of the nodes that own layers, once they are loaded."""
        plan = self._plan
        stages = [status.stats for status in statuses if status.start < status.stop]
        windows = [stats.trim_window for stats in stages]
        return Limits(
            context=plan.context,
            max_active=plan.concurrency,
            max_in_flight=plan.frames_in_flight,
            prefill_chunk=self._chunks.alone,
            shared_chunk=self._chunks.shared,
            max_chunks=len(plan.assignments) + 1,
            max_lone_chunks=num_lone_chunks(len(plan.assignments)),
            vocab_size=self._vocab_size,
            max_rows=self._max_rows,
            reads_together=self._rows.read_together and self._max_rows > 1,
            share=self._share,
            trim_window=min(windows, default=-1) if self._rows.forked else -1,
            reach=Reach(min((stats.reach for stats in stages), default=0)),
            max_drafts=self._max_drafts if self._rows.rewound else 0,
            has_ngrams=self._has_ngrams,
            has_drafter=self._draft is not None,
            drafts_ahead=self._draft is not None and keeps_all(self._draft),
        )
