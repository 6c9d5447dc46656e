"""Which cuts of a model are exact: proven on a tiny random model of the same config, before anything is
loaded.

    python -m shard_loader.cuts MODEL_DIR [--cuts 3,5] [--json]

A cut is exact when the stages' logits equal the whole model's bit for bit. The command runs MLX on the CPU
without compiled kernels in a process of its own, so a node's own MLX stays untouched; MLX is imported only
there.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planner.headers import ModelFilesError, read_config

if TYPE_CHECKING:
    from shard_loader.rehearsal import Rehearsal

EXIT_INEXACT = 1
EXIT_USAGE = 3


@dataclasses.dataclass(frozen=True, slots=True)
class CutProof:
    """Whether the model may be cut before layer `cut`. max_error: of any logit; None where it did not run."""

    cut: int
    exact: bool
    max_error: float | None
    reason: str  # why it is not exact; empty where it is


def prove_cuts(config: dict[str, Any], boundaries: Sequence[int]) -> list[CutProof]:
    """One proof per boundary for a model cut at all of them at once, as the stages of one ring.

    config: the model's config.json. Runs MLX on the calling thread; exact only with MLX_DISABLE_COMPILE=1 on
    the CPU. An architecture of which no tiny model can be built gives proofs that are not exact and say so.
    """
    from shard_loader.rehearsal import Rehearsal, RehearsalError

    cuts = sorted(set(boundaries))
    try:
        rehearsal = Rehearsal(config)
    except RehearsalError as error:
        return [CutProof(cut, False, None, str(error)) for cut in cuts]
    outside = [cut for cut in cuts if not 0 < cut < rehearsal.num_layers]
    if outside:
        reason = f"layer {outside[0]} does not lie between the model's {rehearsal.num_layers} layers"
        return [CutProof(cut, False, None, reason) for cut in cuts]
    together = _prove(rehearsal, cuts, cuts[0]) if cuts else None
    if together is None or together.exact:
        return [CutProof(cut, True, 0.0, "") for cut in cuts]
    if len(cuts) == 1:
        return [together]
    alone = [_prove(rehearsal, [cut], cut) for cut in cuts]
    if all(proof.exact for proof in alone):
        reason = f"exact alone, but not together with the other cuts: {together.reason}"
        return [CutProof(cut, False, together.max_error, reason) for cut in cuts]
    return alone


def prove_each(config: dict[str, Any]) -> list[CutProof]:
    """A proof for each cut that the model could have, each taken alone. As `prove_cuts` otherwise."""
    from shard_loader.rehearsal import Rehearsal, RehearsalError

    try:
        rehearsal = Rehearsal(config)
    except RehearsalError as error:
        return [CutProof(1, False, None, str(error))]
    return [_prove(rehearsal, [cut], cut) for cut in range(1, rehearsal.num_layers)]


def _prove(rehearsal: Rehearsal, cuts: list[int], name: int) -> CutProof:
    from shard_loader.rehearsal import UNSUITABLE

    try:
        error = rehearsal.error_of(cuts)
        if error != 0.0 and not rehearsal.is_repeatable():
            return CutProof(name, False, None, "the whole model does not give the same numbers twice here")
    except UNSUITABLE as failure:
        what = " ".join(str(failure).split())
        return CutProof(name, False, None, f"the cut model fails with {type(failure).__name__}: {what}")
    if error == 0.0:
        return CutProof(name, True, 0.0, "")
    if error == float("inf"):
        return CutProof(name, False, None, "a stage reads parameters that belong to another")
    return CutProof(name, False, error, f"the logits differ by {error:.2g} from the whole model's")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m shard_loader.cuts", description=__doc__.splitlines()[0])
    parser.add_argument("model_dir", type=Path, help="a folder with the model's config.json")
    parser.add_argument("--cuts", type=_numbers, help="layers to cut before, as 3,5; otherwise each alone")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args(argv)


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part.strip()]


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 if every cut is exact, 1 if one is not, 3 for a wrong argument or model folder."""
    os.environ["MLX_DISABLE_COMPILE"] = "1"  # read when MLX is imported, which is below
    try:
        args = _parse(argv)
    except SystemExit as exit_:
        return EXIT_USAGE if exit_.code else 0
    try:
        config = read_config(args.model_dir)
    except ModelFilesError as error:
        print(error, file=sys.stderr)
        return EXIT_USAGE
    import mlx.core as mx

    mx.set_default_device(mx.cpu)
    proofs = prove_each(config) if args.cuts is None else prove_cuts(config, args.cuts)
    if args.json:
        cuts = [dataclasses.asdict(proof) for proof in proofs]
        print(json.dumps({"model": str(args.model_dir), "cuts": cuts}))
    else:
        for proof in proofs:
            print(f"before layer {proof.cut}: {'exact' if proof.exact else proof.reason}")
    return 0 if all(proof.exact for proof in proofs) else EXIT_INEXACT


if __name__ == "__main__":
    sys.exit(main())
