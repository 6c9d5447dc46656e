"""What is known of one cut. A pure value."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CutProof:
    """Whether the model may be cut before layer `cut`. max_error: of any logit; None where it did not run."""

    cut: int
    exact: bool
    max_error: float | None
    reason: str  # why it is not exact; empty where it is
