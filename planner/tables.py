"""A cost model's stages as arrays over all pairs of legal boundaries, for the searches. Pure.

Shapes: B boundaries (layer 0, the legal cuts, the end), so an array of stages is (B, B), [start, stop).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from planner.cost import CostModel

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Value = Callable[[int, int], float]  # of the layers [start, stop)


class StageTables:
    """`forced` gives the nodes that own exactly that range, by index; no other node's stage touches it.

    is_over_allowed: stages that exceed their budgets count as stages that fit.
    """

    def __init__(
        self,
        cost: CostModel,
        legal_cuts: frozenset[int] | None,
        forced: Mapping[int, tuple[int, int]],
        *,
        is_over_allowed: bool = False,
    ) -> None:
        num_layers = cost.model.num_layers
        inner = range(1, num_layers) if legal_cuts is None else sorted(legal_cuts & set(range(1, num_layers)))
        self.cost, self.forced, self._is_over_allowed = cost, dict(forced), is_over_allowed
        self.bounds = (0, *inner, num_layers)
        self._position = {bound: at for at, bound in enumerate(self.bounds)}
        size = len(self.bounds)
        self._pairs = [(a, b) for a in range(size) for b in range(a + 1, size)]
        self._at = tuple(np.array(side, dtype=np.intp) for side in zip(*self._pairs, strict=True))
        self._need: dict[bool, Floats] = {}
        ends = np.array(self.bounds)
        self._ends = ends
        self._free = np.triu(np.ones((size, size), dtype=np.bool_), 1)
        for start, stop in self.forced.values():
            self._free &= (ends[None, :] <= start) | (ends[:, None] >= stop)

    @property
    def size(self) -> int:
        """The number of boundaries, B."""
        return len(self.bounds)

    def at(self, layer: int) -> int | None:
        """The position of a boundary; None where no stage may start or stop."""
        return self._position.get(layer)

    def may_own(self, index: int) -> Bools:
        """(B, B): the stages that the legal cuts and the forced ranges leave to a node, whatever its size."""
        if index not in self.forced:
            return self._free
        allowed = np.zeros((self.size, self.size), dtype=np.bool_)
        start, stop = (self.at(layer) for layer in self.forced[index])
        if start is not None and stop is not None:
            allowed[start, stop] = True
        return allowed

    def overflow_bytes(self, index: int) -> Floats:
        """(B, B): by how much a stage exceeds the node's budget; whole numbers, inf where not allowed."""
        over = np.maximum(self._need_bytes(index) - self.cost.nodes[index].budget_bytes, 0.0)
        return np.where(self.may_own(index), over, np.inf)

    def fits(self, index: int) -> Bools:
        """(B, B): the stages that a node may own and can hold."""
        if self._is_over_allowed:
            return self.may_own(index)
        return self.may_own(index) & (self._need_bytes(index) <= self.cost.nodes[index].budget_bytes)

    def decode_ms(self, index: int, *, is_batched: bool = False) -> Floats:
        """(B, B): `CostModel.decode_ms` of the stages that fit, else inf."""
        sums = self.cost.decode_sums_ms(index, is_batched=is_batched)
        table = self._differences(index, sums)
        table[:, -1] += sums[-1] - sums[-2]  # norm and head
        return np.where(self.fits(index), table, np.inf)

    def chunk_ms(self, index: int) -> Floats:
        """(B, B): `CostModel.chunk_ms` of the stages that fit, else inf."""
        table = self._differences(index, self.cost.chunk_sums_ms(index))
        return np.where(self.fits(index), table, np.inf)

    def filled(self, value_of: Value) -> Floats:
        """(B, B): a value of each stage."""
        return self._all(value_of)

    def _differences(self, index: int, sums: Floats) -> Floats:
        at = sums[self._ends]
        table: Floats = at[None, :] - at[:, None] + self.cost.stage_ms(index)
        return table

    def _need_bytes(self, index: int) -> Floats:
        """(B, B), exact: bytes stay far below 2^53. Of a node only its kind of attention counts."""
        is_fused = self.cost.is_fused(index)
        if is_fused not in self._need:
            self._need[is_fused] = self.cost.need_table(index, self.bounds).astype(np.float64)
        return self._need[is_fused]

    def _all(self, value_of: Value) -> Floats:
        table = np.zeros((self.size, self.size))
        table[self._at] = [value_of(self.bounds[a], self.bounds[b]) for a, b in self._pairs]
        return table
