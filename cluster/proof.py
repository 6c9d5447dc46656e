"""Proves a plan's cuts before anything is loaded, in a process of its own: exactness is shown with
MLX_DISABLE_COMPILE=1 on the CPU, and the node's own MLX stays untouched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from cluster.errors import EXIT_ERROR, UserError
from planner.plan import Plan

PROOF_TIMEOUT_S = 300.0


def prove(model_dir: Path, plan: Plan) -> None:
    """Return if each cut of the plan gives exactly the whole model's numbers; else raise UserError."""
    cuts = [a.start for a in plan.assignments[1:]]
    if not cuts:
        return
    command = [
        sys.executable,
        "-m",
        "shard_loader.cuts",
        str(model_dir),
        "--json",
        "--cuts",
        ",".join(map(str, cuts)),
    ]
    try:
        done = subprocess.run(
            command,
            env=os.environ | {"MLX_DISABLE_COMPILE": "1"},
            capture_output=True,
            text=True,
            timeout=PROOF_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise UserError(
            f"the cuts {cuts} could not be proven within {PROOF_TIMEOUT_S:.0f} s; plan other layers",
            EXIT_ERROR,
        ) from error
    try:
        proofs = json.loads(done.stdout)["cuts"]
    except (ValueError, KeyError, TypeError) as error:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise UserError(f"the cuts {cuts} could not be proven: {last}", EXIT_ERROR) from error
    bad = [proof for proof in proofs if not proof["exact"]]
    if bad:
        reasons = "; ".join(f"before layer {proof['cut']}: {proof['reason']}" for proof in bad)
        raise UserError(
            f"this plan cuts the model where it is not exact ({reasons}); plan other layers", EXIT_ERROR
        )
