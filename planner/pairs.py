"""Two costs as one number, of which the first counts before the second: bytes over a budget, then ms. Pure.

A pair is complex: numpy adds both parts at once and orders complex numbers by their real part, then by the
other (numpy.sort, "lexicographic order"). Bytes stay exact below 2^53.
"""

from __future__ import annotations

from typing import cast

import numpy as np

from planner.tables import Floats


def pairs(first: Floats, second: Floats) -> Floats:
    """Element by element; what is infinite in either is (inf, 0). The searches only add and compare."""
    is_allowed = np.isfinite(first) & np.isfinite(second)
    both = np.full(first.shape, np.inf, dtype=np.complex128)
    both.real[is_allowed] = first[is_allowed]
    both.imag[is_allowed] = second[is_allowed]
    return cast(Floats, both)


def parts(pair: float) -> tuple[float, float]:
    """The two parts of a sum of pairs."""
    return pair.real, pair.imag


def up(cost: float, tie: float) -> float:
    """The most that counts as equal to `cost`: within a relative `tie`, of a pair in its second part."""
    if np.iscomplexobj(cost):
        return cost + cast(float, 1j * abs(cost.imag) * tie)
    return cost + abs(cost) * tie
