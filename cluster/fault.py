"""Faults that tests inject into real processes: MACRAME_FAULT=load_delay_s=60,step_delay_ms=20."""

from __future__ import annotations

import os
from enum import Enum


class Fault(Enum):
    """What can be made to go wrong; the value is the key in MACRAME_FAULT."""

    LOAD_DELAY_S = "load_delay_s"  # the compute thread is busy loading for so long
    STEP_DELAY_MS = "step_delay_ms"  # every frame takes so much longer
    STEP_ERROR_AT = "step_error_at"  # slots from this position on raise


def injected(fault: Fault) -> float:
    """The value asked for, 0.0 where the fault is not injected."""
    for item in filter(None, os.environ.get("MACRAME_FAULT", "").split(",")):
        key, _, value = item.partition("=")
        if key == fault.value:
            return float(value)
    return 0.0
