"""Faults that tests inject into real processes: MACRAME_FAULT=load_delay_s=60,step_delay_ms=20."""

from __future__ import annotations

import os
from enum import Enum


class Fault(Enum):
    """What can be made to go wrong; the value is the key in MACRAME_FAULT."""

    LOAD_DELAY_S = "load_delay_s"  # the compute thread is busy loading for so long
    STEP_DELAY_MS = "step_delay_ms"  # every frame takes so much longer
    LAYER_DELAY_MS = "layer_delay_ms"  # each own layer of every frame takes so much longer
    TOKEN_DELAY_US = "token_delay_us"  # or for each token of the frame, where that comes to more
    PLAIN_STEPS = "plain_steps"  # 1: none is built ahead, or while another runs
    OVERLAPPED_STEPS = "overlapped_steps"  # 1: as with a GPU, where the processor is the device
    STEP_ERROR_AT = "step_error_at"  # slots from this position on raise
    AVAILABLE_SHARE = "available_share"  # a file with the share of memory that is said to be available
    FRAMES_IN_FLIGHT = "frames_in_flight"  # the head sends no more than so many
    ROWS_PER_FRAME = "rows_per_frame"  # and puts no more requests into one
    WRONG_KERNEL = "wrong_kernel"  # this file of kernels/metal, without its suffix, stores other numbers
    KERNEL_BUDGET_S = "kernel_budget_s"  # a start tests kernels for no longer than so
    EDGES_VIA = "edges_via"  # rank@port+rank@port: relays on loopback through which edges to those ranks go


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


def overlaps_steps(is_gpu: bool) -> bool:
    """Whether a frame is built while another one runs: where the device is not the processor that builds."""
    return not injected(Fault.PLAIN_STEPS) and (is_gpu or injected(Fault.OVERLAPPED_STEPS) > 0)


def injected_address(rank: int) -> str | None:
    """The relay through which this process reaches a rank's edges; None: none, straight to its address."""
    for route in filter(None, injected_text(Fault.EDGES_VIA).split("+")):
        to_rank, _, port = route.partition("@")
        if int(to_rank) == rank:
            return f"127.0.0.1:{int(port)}"
    return None
