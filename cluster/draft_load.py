"""How rank 0 comes by its draft model: which files, and the drafter made of them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from cluster.drafter import Drafter
from planner.draft_bytes import session_bytes
from planner.draft_part import DraftPart
from planner.model_profile import ModelProfile
from shard_loader.expert_kernels import choose_kernels
from shard_loader.trim import trim_memory
from shard_loader.weights import Progress, load_shard


@dataclass(frozen=True, slots=True)
class DraftLoad:
    """What is to be loaded. vocab_size: of the ring's model. fetch: gets the bytes that are missing."""

    profile: ModelProfile
    part: DraftPart
    folder: Path
    vocab_size: int
    fetch: Callable[[Callable[[int, int], None], threading.Event], Path] | None = field(
        default=None, compare=False
    )


def load_drafter(wanted: DraftLoad, folder: Path, on_progress: Progress) -> Drafter:
    """The drafter, whole and as its files have it. Compute thread only.

    Raises as `shard_loader.weights.load_shard` and `Drafter` do.
    """
    profile, part = wanted.profile, wanted.part
    shard = load_shard(folder, 0, profile.num_layers, on_progress=on_progress)
    all_bytes = shard.footprint.total_bytes
    choose_kernels(shard, lambda: on_progress(all_bytes, all_bytes))
    trim_memory()
    return Drafter(
        shard,
        part.model,
        vocab_size=wanted.vocab_size,
        max_context=profile.max_context,
        kv_bytes=partial(session_bytes, profile),
        max_kv_bytes=part.kv_bytes,
    )
