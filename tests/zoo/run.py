"""Cuts every architecture of the zoo and prints one JSON line for each.

    python -m tests.zoo.run [NAME ...]

MLX on the CPU without compiled kernels, in this process alone; float32. Each model runs whole and in 2, 3, 5
and as many stages as it has layers, all through the ring's own frames (shard_loader/rehearsal.py).
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

EXACT, PARTLY, ONE_NODE, REFUSED, WRONG = "exact", "partly", "one node", "refused", "wrong"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the zoo found of one architecture. errors: of each set of cuts tried, in the order tried."""

    name: str
    status: str
    num_layers: int = 0
    legal: list[int] = field(default_factory=list)  # cuts that are exact
    reason: str = ""
    errors: dict[str, float | str] = field(default_factory=dict)


def cut_sets(num_layers: int) -> Iterator[list[int]]:
    """Each cut alone, three stages, five, and one for each layer; uneven ones."""
    yield from ([cut] for cut in range(1, num_layers))
    if num_layers >= 3:
        yield [max(1, num_layers // 3), num_layers - 2 if num_layers > 4 else num_layers - 1]
    if num_layers >= 5:
        yield [1, 2, num_layers - 3, num_layers - 1] if num_layers > 5 else [1, 2, 3, 4]
    if num_layers > 3:
        yield list(range(1, num_layers))


def judge(name: str, config: dict[str, Any]) -> Verdict:
    """Runs one architecture through all its cuts."""
    from shard_loader.rehearsal import UNSUITABLE, Rehearsal, RehearsalError
    from shard_loader.shard import ShardError

    try:
        rehearsal = Rehearsal(config)
    except RehearsalError as error:
        return Verdict(name, REFUSED, reason=str(error))
    errors: dict[str, float | str] = {}
    refusals: list[str] = []
    for cuts in cut_sets(rehearsal.num_layers):
        key = ",".join(map(str, cuts))
        try:
            errors[key] = rehearsal.error_of(cuts)
        except ShardError as error:
            errors[key] = str(error)
            refusals.append(str(error))
        except UNSUITABLE as error:  # it does run, but not to the end: no cut may be legal for this
            errors[key] = f"{type(error).__name__}: {' '.join(str(error).split())}"
    if rehearsal.num_layers > 1 and errors[f"{rehearsal.num_layers // 2}"] == 0.0:
        errors["control"] = 0.0 if rehearsal.is_felt_at(rehearsal.num_layers // 2) else "not felt"
    legal = [cut for cut in range(1, rehearsal.num_layers) if errors[str(cut)] == 0.0]
    status, reason = _status(errors, legal, refusals)
    return Verdict(name, status, rehearsal.num_layers, legal, reason, errors)


def _status(errors: dict[str, float | str], legal: list[int], refusals: list[str]) -> tuple[str, str]:
    if all(error == 0.0 for error in errors.values()):
        return EXACT, ""
    wrong = {cuts: error for cuts, error in errors.items() if error != 0.0 and error not in refusals}
    if wrong:
        return WRONG, "; ".join(f"cuts {cuts}: {error}" for cuts, error in wrong.items())
    return (PARTLY if legal else ONE_NODE), refusals[0]


def judge_all(names: Sequence[str]) -> Iterator[Verdict]:
    """One verdict for each module; what plain mlx-lm cannot run on a CPU is refused, with the reason."""
    from tests.zoo.configs import NO_BASELINE, zoo_config

    for name in names:
        if name in NO_BASELINE:
            yield Verdict(name, REFUSED, reason=NO_BASELINE[name])
        else:
            yield judge(name, zoo_config(name))


def main(names: Sequence[str]) -> None:
    """Prints the verdicts."""
    os.environ["MLX_DISABLE_COMPILE"] = "1"  # read when MLX is imported
    import mlx.core as mx

    from tests.zoo.configs import module_names

    mx.set_default_device(mx.cpu)
    for verdict in judge_all(names or module_names()):
        print(json.dumps(asdict(verdict)), flush=True)
        mx.clear_cache()


if __name__ == "__main__":
    main(sys.argv[1:])
