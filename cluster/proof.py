"""Proves cuts before anything is loaded, in a process of its own: exactness is shown with
MLX_DISABLE_COMPILE=1 on the CPU, and the node's own MLX stays untouched.

What was proven before, on this machine or for this release, is not proven again. Blocks its thread meanwhile.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from cluster.errors import EXIT_ERROR, UserError
from planner.headers import read_config
from shard_loader.cut_proof import CutProof, RowProof
from shard_loader.proof_store import find, find_rows

PROOF_TIMEOUT_S = 300.0


class Prover:
    """Proofs for the model in `model_dir`. say(line) tells of what takes long; `stopping` ends a proof."""

    def __init__(self, model_dir: Path, stopping: threading.Event, say: Callable[[str], None]) -> None:
        self._model_dir, self._stopping, self._say = model_dir, stopping, say
        self._config: dict[str, Any] = read_config(model_dir)

    @property
    def is_stopped(self) -> bool:
        """Nobody waits for the proof any more."""
        return self._stopping.is_set()

    def known(self, cuts: Sequence[int] | None) -> list[CutProof] | None:
        """The proof of these cuts together, or of every cut (None), where there is one already."""
        return find(self._config, cuts)

    def prove(self, cuts: Sequence[int] | None) -> list[CutProof]:
        """As `known`, and made where there is none yet; empty once `stopping` is set.

        Raises UserError where the proof cannot be made.
        """
        found = self.known(cuts)
        if found is not None:
            return found
        what = "each cut" if cuts is None else _layers(cuts)
        self._say(f"proving {what} on a tiny model of the same architecture")
        return self._prove(cuts, what)

    def rows(self) -> RowProof:
        """What may be done with the sequences of several requests; where that cannot be told, nothing."""
        known = find_rows(self._config)
        if known is not None:
            return known
        try:
            answer = self._run(["--rows"], "sharing forward passes")
        except UserError as error:
            self._say(f"requests will share neither forward passes nor prompts: {error}")
            answer = {}
        return RowProof(*(bool(answer.get(verdict.name)) for verdict in fields(RowProof)))

    def why_no_hidden(self) -> str:
        """Why hidden states before the head cannot be had; empty where they can. Tried each time."""
        try:
            return str(
                self._run(["--hidden"], "reading hidden states").get("why_no_hidden", "it was stopped")
            )
        except UserError as error:
            return str(error)

    def _prove(self, cuts: Sequence[int] | None, what: str) -> list[CutProof]:
        answer = self._run(() if cuts is None else ("--cuts", ",".join(map(str, cuts))), what)
        try:
            return [CutProof(**proof) for proof in answer.get("cuts", ())]
        except TypeError as error:
            raise UserError(f"{what} could not be proven: {error}", EXIT_ERROR) from error

    def _run(self, arguments: Sequence[str], what: str) -> dict[str, Any]:
        """The proof's JSON; empty once `stopping` is set."""
        command = [sys.executable, "-m", "shard_loader.cuts", str(self._model_dir), "--json"]
        with subprocess.Popen(
            [*command, *arguments],
            env=os.environ | {"MLX_DISABLE_COMPILE": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            process_group=0,  # a terminal's Ctrl-C is the node's to answer
        ) as process:
            output = _output(process, self._stopping)
        if output is None:
            if self._stopping.is_set():
                return {}
            raise UserError(
                f"{what} could not be proven within {PROOF_TIMEOUT_S:.0f} s; plan other layers", EXIT_ERROR
            )
        try:
            answer: Any = json.loads(output[0])
            if not isinstance(answer, dict):
                raise TypeError("it is no object")
            return answer
        except (ValueError, TypeError) as error:
            last = (output[1].strip().splitlines() or [f"the proof ended with code {process.returncode}"])[-1]
            raise UserError(f"{what} could not be proven: {last}", EXIT_ERROR) from error


def _layers(cuts: Sequence[int]) -> str:
    return f"the cuts {list(cuts)}"


def _output(process: subprocess.Popen[str], stopping: threading.Event) -> tuple[str, str] | None:
    """Its standard output and error; None, and it is ended, where it takes too long or is not waited for."""
    deadline = time.monotonic() + PROOF_TIMEOUT_S
    try:
        while not stopping.is_set() and time.monotonic() < deadline:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.communicate(timeout=0.1)
    finally:  # also at Ctrl-C, which the proof does not get
        if process.returncode is None:
            process.kill()
    return None
