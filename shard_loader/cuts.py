"""Which cuts of a model are exact: proven on a tiny random model of the same config, before anything is
loaded.

    python -m shard_loader.cuts MODEL_DIR [--cuts 3,5] [--rows] [--hidden] [--json]

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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planner.headers import ModelFilesError, read_config
from shard_loader.cut_proof import NO_ROWS, CutProof, RowProof

if TYPE_CHECKING:
    from shard_loader.rehearsal import Rehearsal

UNREPEATABLE = "the whole model does not give the same numbers twice here"
UNFELT = "a wrong carry changes nothing in the tiny model, so its numbers prove nothing"
EXIT_INEXACT = 1
EXIT_USAGE = 3


Progress = Callable[[str], None]


def prove_cuts(
    config: dict[str, Any], boundaries: Sequence[int] | None = None, on_progress: Progress | None = None
) -> list[CutProof]:
    """One proof per boundary for a model cut at all of them at once; None: before every layer but the first.

    Stages of one layer each prove every cut in one run. Where that is not exact each cut is tried alone, and
    those that are exact once more together. config: the model's config.json. Runs MLX on the calling thread;
    exact only with MLX_DISABLE_COMPILE=1 on the CPU. An architecture of which no tiny model can be built
    gives proofs that are not exact and say so.
    """
    return _rehearse(config, boundaries, on_progress or (lambda text: None))[0]


def proofs_of(
    config: dict[str, Any], boundaries: Sequence[int] | None = None, on_progress: Progress | None = None
) -> list[CutProof]:
    """As `prove_cuts`, unless it was proven before; keeps the proof for later (see `proof_store`)."""
    from shard_loader.proof_store import find, save

    found = find(config, boundaries)
    if found is not None:
        return found
    proofs, recipe = _rehearse(config, boundaries, on_progress or (lambda text: None))
    if recipe and proofs and all(proof.reason != UNREPEATABLE for proof in proofs):
        save(config, boundaries, recipe, proofs)
    return proofs


def rows_of(config: dict[str, Any]) -> RowProof:
    """What may be done with this architecture's sequences; tried unless it was before."""
    from shard_loader.batch_proof import prove_rows
    from shard_loader.proof_store import find_rows, save_rows
    from shard_loader.rehearsal import Rehearsal, RehearsalError

    known = find_rows(config)
    if known is not None:
        return known
    try:
        rehearsal = Rehearsal(config)
    except RehearsalError:
        return NO_ROWS
    proof = prove_rows(rehearsal)
    save_rows(config, rehearsal.recipe, proof)
    return proof


def why_no_hidden_of(config: dict[str, Any]) -> str:
    """Why this architecture's hidden states before the head cannot be had; empty where they can."""
    from shard_loader.hidden_proof import why_no_hidden
    from shard_loader.rehearsal import Rehearsal, RehearsalError

    try:
        return why_no_hidden(Rehearsal(config))
    except RehearsalError as error:
        return str(error)


def _rehearse(
    config: dict[str, Any], boundaries: Sequence[int] | None, report: Progress
) -> tuple[list[CutProof], str]:
    """The proofs, and how the model was shrunk; "" where it could not be."""
    from shard_loader.rehearsal import Rehearsal, RehearsalError

    report("building a tiny model of the same architecture")
    try:
        rehearsal = Rehearsal(config)
    except RehearsalError as error:
        return [CutProof(cut, False, None, str(error)) for cut in sorted(set(boundaries or [1]))], ""
    return _prove_all(rehearsal, boundaries, report), rehearsal.recipe


def _prove_all(rehearsal: Rehearsal, boundaries: Sequence[int] | None, report: Progress) -> list[CutProof]:
    cuts = sorted(set(range(1, rehearsal.num_layers) if boundaries is None else boundaries))
    outside = [cut for cut in cuts if not 0 < cut < rehearsal.num_layers]
    if outside:
        reason = f"layer {outside[0]} does not lie between the model's {rehearsal.num_layers} layers"
        return [CutProof(cut, False, None, reason) for cut in cuts]
    if not cuts:
        return []
    report(f"cutting it before {len(cuts)} of its {rehearsal.num_layers} layers at once")
    together = _prove(rehearsal, cuts, cuts[0])
    if together.exact:
        return _controlled(rehearsal, [CutProof(cut, True, 0.0, "") for cut in cuts])
    if len(cuts) == 1:
        return [together]
    proofs = []
    for cut in cuts:
        report(f"cutting it before layer {cut} alone")
        proofs.append(_prove(rehearsal, [cut], cut))
    exact = [proof.cut for proof in proofs if proof.exact]
    if len(exact) < 2:
        return _controlled(rehearsal, proofs)
    together = _prove(rehearsal, exact, exact[0]) if len(exact) < len(cuts) else together
    if together.exact:
        return _controlled(rehearsal, proofs)
    reason = f"exact alone, but not together with the other cuts: {together.reason}"
    return [CutProof(p.cut, False, together.max_error, reason) if p.exact else p for p in proofs]


def _controlled(rehearsal: Rehearsal, proofs: list[CutProof]) -> list[CutProof]:
    """The proofs, unless a wrong carry at one of the exact cuts would have passed as well."""
    exact = [proof.cut for proof in proofs if proof.exact]
    if not exact or rehearsal.is_felt_at(exact[len(exact) // 2]):
        return proofs
    return [CutProof(p.cut, False, None, UNFELT) if p.exact else p for p in proofs]


def _prove(rehearsal: Rehearsal, cuts: list[int], name: int) -> CutProof:
    from shard_loader.rehearsal import UNSUITABLE
    from shard_loader.shard import ShardError

    try:
        error = rehearsal.error_of(cuts)
        if error != 0.0 and not rehearsal.is_repeatable():
            return CutProof(name, False, None, UNREPEATABLE)
    except ShardError as refusal:
        return CutProof(name, False, None, str(refusal))
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
    parser.add_argument("--cuts", type=_numbers, help="layers to cut before, as 3,5; otherwise all")
    parser.add_argument(
        "--rows", action="store_true", help="tell only what may be done with several sequences"
    )
    parser.add_argument(
        "--hidden", action="store_true", help="tell only whether hidden states before the head can be had"
    )
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

    from shard_loader.lean_import import import_lean

    import_lean()
    mx.set_default_device(mx.cpu)
    if args.rows:
        print(json.dumps({"model": str(args.model_dir), **dataclasses.asdict(rows_of(config))}))
        return 0
    if args.hidden:
        print(json.dumps({"model": str(args.model_dir), "why_no_hidden": why_no_hidden_of(config)}))
        return 0
    proofs = proofs_of(config, args.cuts)
    if args.json:
        cuts = [dataclasses.asdict(proof) for proof in proofs]
        print(json.dumps({"model": str(args.model_dir), "cuts": cuts}))
    else:
        for proof in proofs:
            print(f"before layer {proof.cut}: {'exact' if proof.exact else proof.reason}")
    return 0 if all(proof.exact for proof in proofs) else EXIT_INEXACT


if __name__ == "__main__":
    sys.exit(main())
