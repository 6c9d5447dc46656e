"""Rung 1: the Metal source that MLX generates is, character by character, the one that was looked at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kernels.ladder.case import Case
from kernels.ladder.tracing import traced

FOLDER = Path(__file__).resolve().parents[2] / "tests" / "golden_msl"


def sources(cases: Sequence[Case]) -> dict[str, str]:
    """File name -> source, of every kernel that a golden case launches.

    Raises ValueError where MLX's text is not what kernels/msl_text.py makes, which the emulator runs."""
    found: dict[str, str] = {}
    for case in cases:
        if case.is_full:
            continue
        for number, (call, text) in enumerate(traced(case), 1):
            made = call.msl()
            if made.text != text:
                raise ValueError(
                    f"{case.name}: MLX makes another source of {made.entry} than kernels/msl_text.py"
                )
            if case.is_golden:
                found[f"{case.name.replace('/', '.')}.{number}.{call.kernel.name}.metal"] = text
    return found


def differences(cases: Sequence[Case], folder: Path = FOLDER) -> list[str]:
    """What of the folder is not as MLX makes it now: a line for each file."""
    wanted = sources(cases)
    there = {path.name for path in folder.glob("*.metal")}
    said = [f"{name}: is missing" for name in sorted(wanted.keys() - there)]
    said += [f"{name}: no case makes it any more" for name in sorted(there - wanted.keys())]
    for name in sorted(wanted.keys() & there):
        before = (folder / name).read_text(encoding="utf-8").splitlines()
        now = wanted[name].splitlines()
        if before != now:
            pairs = enumerate(zip(before, now, strict=False), 1)
            line = next((n for n, (a, b) in pairs if a != b), min(len(before), len(now)) + 1)
            said.append(f"{name}: differs from line {line} on")
    return said


def write(cases: Sequence[Case], folder: Path = FOLDER) -> int:
    """The folder as MLX makes it now. Returns the number of files."""
    wanted = sources(cases)
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("*.metal"):
        path.unlink()
    for name, text in wanted.items():
        (folder / name).write_text(text, encoding="utf-8")
    return len(wanted)
