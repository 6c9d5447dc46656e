"""Faults that tests inject into real processes: MACRAME_FAULT=load_delay_s=60,step_delay_ms=20."""

from __future__ import annotations

import os
from enum import Enum


class Fault(Enum):
    """What can be made to go wrong; the value is the key in MACRAME_FAULT."""

    LOAD_DELAY_S = "load_delay_s"  # the compute thread is busy loading for so long
    STEP_DELAY_MS = "step_delay_ms"  # every frame takes so much longer
    STEP_ERROR_AT = "step_error_at"  # slots from this position on raise
    AVAILABLE_SHARE = "available_share"  # a file with the share of memory that is said to be available


def injected(fault: Fault) -> float:
    """The number asked for, 0.0 where the fault is not injected."""
    return float(injected_text(fault) or 0.0)


def injected_text(fault: Fault) -> str:
    """What was asked for as it stands there, empty where the fault is not injected."""
    for item in filter(None, os.environ.get("MACRAME_FAULT", "").split(",")):
        key, _, value = item.partition("=")
        if key == fault.value:
            return value
    return ""
