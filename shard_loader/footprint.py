"""What a shard's weights take in memory, part by part. Pure values."""

from __future__ import annotations

from dataclasses import dataclass

GB = 1e9


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes of the parameters one stage holds; an array that two parts share is counted once.

    layers: the own decoder layers. embed: the token embedding of the first stage. norm and head: what follows
    the last layer; a head tied to the embedding is counted as head, unless the same stage has counted it as
    embed. other: anything else the own layers read (position tables, projections shared by all layers).
    full_model: every parameter of the model, as one machine would hold them.
    """

    layers_bytes: int
    embed_bytes: int
    norm_bytes: int
    head_bytes: int
    other_bytes: int
    full_model_bytes: int

    @property
    def total_bytes(self) -> int:
        """All parameters of this shard."""
        return self.layers_bytes + self.embed_bytes + self.norm_bytes + self.head_bytes + self.other_bytes

    @property
    def actual_memory_usage_gb(self) -> float:
        """The shard's parameters in GB (10^9 bytes)."""
        return self.total_bytes / GB

    @property
    def memory_saved_gb(self) -> float:
        """What this node need not hold of the whole model, in GB (10^9 bytes)."""
        return (self.full_model_bytes - self.total_bytes) / GB
