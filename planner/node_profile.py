"""What a node offers a plan: its chip, its memory and how much of that a shard may take. Pure values.

GB is 10^9 bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from planner.chips import Chip, Device, find_chip, metal_ceiling_share
from planner.draft_part import DraftPart
from planner.forms import FormTimes
from planner.speeds import Speeds, table_speeds

GB = 10**9
SMALL_MEMORY_BYTES = 8 * GB  # below it the reserve is a share alone
MIN_RESERVE_BYTES = 2 * GB
RESERVE_SHARE = 0.1

CeilingSource = Literal["guessed", "measured", "memory"]


@dataclass(frozen=True, slots=True)
class NodeProfile:
    """One node. `ceiling_source` says where the ceiling is from: a guess, the device, or all memory."""

    rank: int
    name: str
    host: str
    chip: str | None  # brand string; None: unknown
    gpu_cores: int | None
    memory_bytes: int
    ceiling_bytes: int  # what the device lets one process use
    ceiling_source: CeilingSource = "guessed"
    cap_bytes: int | None = None  # the user's own limit
    reserve_bytes: int = 0  # kept for the system
    layers: tuple[int, int] | None = None  # [start, stop) forced by the user
    use: bool = True
    available_bytes: int | None = None  # free at the time of measuring; shown, not planned with
    device: Device = "metal"
    num_sharing: int = 1  # nodes that share this machine's memory evenly
    measured: Speeds | None = None  # what `macrame profile` found; None: the chip table's
    measured_on: str = ""  # the day, as 2026-11-21
    forms: tuple[FormTimes, ...] = ()  # what its self-tests of kernels timed
    drafter: DraftPart | None = None  # a draft model that stands here, beside whatever layers do

    @property
    def budget_bytes(self) -> int:
        """What weights, KV and activations may take together: min(ceiling, cap) - reserve, at least 0.

        What a draft model takes is taken off.
        """
        limit = self.ceiling_bytes if self.cap_bytes is None else min(self.ceiling_bytes, self.cap_bytes)
        drafter_bytes = 0 if self.drafter is None else self.drafter.need_bytes
        return max(limit - self.reserve_bytes - drafter_bytes, 0)

    @property
    def figures(self) -> Chip:
        """Bandwidth and TFLOPS from the chip table."""
        return find_chip(self.chip, self.gpu_cores)

    @property
    def speeds(self) -> Speeds:
        """What the planner reckons with: measured, else from the chip table; and what self-tests timed.

        Speeds that have such times already, as those of a running ring do, keep their own.
        """
        found = self.measured or table_speeds(self.figures)
        return replace(found, forms=self.forms) if self.forms and not found.forms else found


def make_node(
    rank: int,
    name: str,
    host: str,
    *,
    memory_bytes: int,
    chip: str | None = None,
    gpu_cores: int | None = None,
    ceiling_bytes: int | None = None,
    cap_bytes: int | None = None,
    reserve_bytes: int | None = None,
    layers: tuple[int, int] | None = None,
    use: bool = True,
    available_bytes: int | None = None,
) -> NodeProfile:
    """A node with its open values filled in: the ceiling guessed, the reserve by default."""
    device = find_chip(chip, gpu_cores).device
    source: CeilingSource = "measured"
    if ceiling_bytes is None:
        source = "guessed" if device == "metal" else "memory"
        ceiling_bytes = (
            int(memory_bytes * metal_ceiling_share(memory_bytes)) if device == "metal" else memory_bytes
        )
    return NodeProfile(
        rank=rank,
        name=name,
        host=host,
        chip=chip,
        gpu_cores=gpu_cores,
        memory_bytes=memory_bytes,
        ceiling_bytes=ceiling_bytes,
        ceiling_source=source,
        cap_bytes=cap_bytes,
        reserve_bytes=default_reserve_bytes(memory_bytes) if reserve_bytes is None else reserve_bytes,
        layers=layers,
        use=use,
        available_bytes=available_bytes,
        device=device,
    )


def share_machine(node: NodeProfile, num_sharing: int) -> NodeProfile:
    """An even share of a machine that `num_sharing` nodes use: memory, ceiling and reserve divided.

    Speeds are not divided: for one user only one stage works at a time, and has the whole machine then. With
    many users the stages of one machine work at once and each is slower than predicted.
    """
    return replace(
        node,
        memory_bytes=node.memory_bytes // num_sharing,
        ceiling_bytes=node.ceiling_bytes // num_sharing,
        reserve_bytes=-(-node.reserve_bytes // num_sharing),
        num_sharing=num_sharing,
    )


def default_reserve_bytes(memory_bytes: int) -> int:
    """max(2 GB, 10 % of memory); below 8 GB of memory, 10 %."""
    share_bytes = int(memory_bytes * RESERVE_SHARE)
    return share_bytes if memory_bytes < SMALL_MEMORY_BYTES else max(MIN_RESERVE_BYTES, share_bytes)
