"""A draft model's part of a plan. A pure value."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DraftPart:
    """A whole draft model on one node: its bytes come off that node's budget before layers are shared out."""

    model: str
    rank: int
    node: str
    weight_bytes: int
    kv_bytes: int  # context x concurrency
    activation_bytes: int

    @property
    def need_bytes(self) -> int:
        """All that it takes."""
        return self.weight_bytes + self.kv_bytes + self.activation_bytes
