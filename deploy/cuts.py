"""`macrame cuts`: proves before which layers a model may be cut, on a tiny model of the same architecture.

Needs config.json alone: of a folder, or of a model of the hub, of which small files and headers are fetched
and no weights. Runs MLX on the CPU in this process. One thread.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster.arguments import Parser
from cluster.errors import EXIT_ERROR, EXIT_OK, EXIT_USAGE, UserError
from deploy.command import run_command
from planner.headers import ModelFilesError, read_config
from planner.kv_profile import first_int
from planner.model_profile import NUM_LAYERS_KEYS, flat_config
from shard_loader.cut_proof import CutProof
from shard_loader.cuts import proofs_of
from shard_loader.proof_store import find, mlx_lm_version


def main(argv: Sequence[str] | None = None) -> int:
    """Print which cuts are exact; 0: all are; 1: some are not; 3: there is no such model."""
    args = _parser().parse_args(argv)
    return run_command("macrame cuts", lambda: _run(args), is_verbose=args.verbose)


def _run(args: argparse.Namespace) -> int:
    os.environ["MLX_DISABLE_COMPILE"] = "1"  # read when MLX is imported, which is below
    config = _config(args.model)
    proofs = _proofs(config)
    if args.json:
        print(json.dumps(_as_dict(args.model, config, proofs), indent=2))
    else:
        print(_as_text(args.model, config, proofs))
    return EXIT_OK if all(proof.exact for proof in proofs) else EXIT_ERROR


def _parser() -> Parser:
    parser = Parser(
        prog="macrame cuts",
        description="Prove before which layers a model may be cut, on a tiny model of the same architecture. "
        "Needs config.json alone, of a folder or of a model of the hub, and runs on the CPU.",
        examples=(
            ("macrame cuts --model mlx-community/Qwen3-1.7B-8bit", "of a model of the hub: its config alone"),
            ("macrame cuts --model ./my-model --json", "of a folder, as JSON"),
        ),
    )
    parser.add_argument("--model", required=True, metavar="DIR_OR_ID", help="a folder, or a model of the hub")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--verbose", action="store_true", help="show tracebacks")
    return parser


def _config(model: str) -> dict[str, Any]:
    """config.json of a folder, of the local cache, or of the hub."""
    from shard_loader.hub import resolve_model  # huggingface_hub takes a while
    from shard_loader.sources import HubError

    try:
        return read_config(resolve_model(model, Path.cwd()))
    except (HubError, ModelFilesError) as error:
        raise UserError(str(error), EXIT_USAGE) from None


def _proofs(config: dict[str, Any]) -> list[CutProof]:
    found = find(config, None)
    if found is not None:
        return found
    started = time.monotonic()

    def say(line: str) -> None:
        print(f"macrame cuts: {time.monotonic() - started:4.1f} s  {line}", file=sys.stderr, flush=True)

    import mlx.core as mx

    mx.set_default_device(mx.cpu)
    return proofs_of(config, None, say)


def _num_layers(config: dict[str, Any], proofs: Sequence[CutProof]) -> int:
    return first_int(flat_config(config), NUM_LAYERS_KEYS) or len(proofs) + 1


def _as_dict(model: str, config: dict[str, Any], proofs: Sequence[CutProof]) -> dict[str, Any]:
    return {
        "model": model,
        "model_type": config.get("model_type"),
        "mlx_lm": mlx_lm_version(),
        "num_layers": _num_layers(config, proofs),
        "legal_cuts": [proof.cut for proof in proofs if proof.exact],
        "cuts": [dataclasses.asdict(proof) for proof in proofs],
    }


def _as_text(model: str, config: dict[str, Any], proofs: Sequence[CutProof]) -> str:
    """One line where every cut has the same answer, else a line per cut."""
    kind = config.get("model_type")
    head = f"{model}: {kind}, {_num_layers(config, proofs)} layers, mlx-lm {mlx_lm_version()}"
    if all(proof.exact for proof in proofs):
        return f"{head}\nexact at every cut"
    reasons = {proof.reason for proof in proofs}
    if len(reasons) == 1:
        return f"{head}\none node only: {reasons.pop()}"
    lines = [f"before layer {proof.cut}: {'exact' if proof.exact else proof.reason}" for proof in proofs]
    return "\n".join([head, *lines])


if __name__ == "__main__":
    sys.exit(main())
