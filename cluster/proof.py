"""Proves a plan's cuts before anything is loaded, in a process of its own: exactness is shown with
MLX_DISABLE_COMPILE=1 on the CPU, and the node's own MLX stays untouched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

from cluster.errors import EXIT_ERROR, UserError
from planner.plan import Plan

PROOF_TIMEOUT_S = 300.0


def prove(model_dir: Path, plan: Plan, stopping: threading.Event) -> None:
    """Return if each cut of the plan gives exactly the whole model's numbers; else raise UserError.

    Returns early, with the process ended, once `stopping` is set.
    """
    cuts = list(plan.cuts)
    if not cuts:
        return
    command = [sys.executable, "-m", "shard_loader.cuts", str(model_dir), "--json"]
    with subprocess.Popen(
        [*command, "--cuts", ",".join(map(str, cuts))],
        env=os.environ | {"MLX_DISABLE_COMPILE": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,  # a terminal's Ctrl-C is the node's to answer
    ) as process:
        output = _output(process, stopping)
    if output is None:
        if stopping.is_set():
            return
        raise UserError(
            f"the cuts {cuts} could not be proven within {PROOF_TIMEOUT_S:.0f} s; plan other layers",
            EXIT_ERROR,
        )
    try:
        proofs = json.loads(output[0])["cuts"]
    except (ValueError, KeyError, TypeError) as error:
        last = (output[1].strip().splitlines() or [f"the proof ended with code {process.returncode}"])[-1]
        raise UserError(f"the cuts {cuts} could not be proven: {last}", EXIT_ERROR) from error
    bad = [proof for proof in proofs if not proof["exact"]]
    if bad:
        reasons = "; ".join(f"before layer {proof['cut']}: {proof['reason']}" for proof in bad)
        raise UserError(
            f"this plan cuts the model where it is not exact ({reasons}); plan other layers", EXIT_ERROR
        )


def _output(process: subprocess.Popen[str], stopping: threading.Event) -> tuple[str, str] | None:
    """Its standard output and error; None, and it is ended, where it takes too long or is not waited for."""
    deadline = time.monotonic() + PROOF_TIMEOUT_S
    while not stopping.is_set() and time.monotonic() < deadline:
        try:
            return process.communicate(timeout=0.1)
        except subprocess.TimeoutExpired:
            continue
    process.kill()
    return None
