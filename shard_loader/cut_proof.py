"""What was proven of an architecture. Pure values."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CutProof:
    """Whether the model may be cut before layer `cut`. max_error: of any logit; None where it did not run."""

    cut: int
    exact: bool
    max_error: float | None
    reason: str  # why it is not exact; empty where it is


@dataclass(frozen=True, slots=True)
class RowProof:
    """What may be done with the sequences of an architecture."""

    batched: bool  # several may share a forward pass
    forked: bool  # one may begin as a copy of another
    rewound: bool  # one may go back after a wrong guess
    read_together: bool  # several may read their prompts in one forward pass


NO_ROWS = RowProof(batched=False, forked=False, rewound=False, read_together=False)
