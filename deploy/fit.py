"""`macrame fit`: which precision, context and concurrency of a model fits machines of given memory.

Reads config.json and safetensors headers; connects to no machine and needs no cluster file. One thread.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster.arguments import Parser
from cluster.config import DEFAULT_CONTEXT
from cluster.errors import EXIT_DOES_NOT_FIT, EXIT_OK, EXIT_USAGE, UserError
from cluster.proof import Prover
from deploy.command import run_command
from planner.fit import MAX_CONCURRENCY, Fit, fit
from planner.headers import ModelFilesError, read_config
from planner.kv_quant import KV_BITS, KvQuantization, KvQuantizationError
from planner.missing import known_headers
from planner.model_profile import profile_model
from planner.node_profile import GB, NodeProfile, make_node
from planner.plan import Plan, Refusal
from planner.precision import AS_STORED, PRECISIONS
from planner.refusal import gb
from planner.render import table

MAX_NODES = 64
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?(?:(GB)|(MB))?", re.IGNORECASE)


def main(argv: list[str] | None = None) -> int:
    """Exit code 0 if the model as stored fits, 2 if it does not, 3 for what cannot be asked."""
    args = _parser().parse_args(argv)
    return run_command("macrame fit", lambda: _run(args), is_verbose=args.verbose)


def _parser() -> Parser:
    parser = Parser(
        prog="macrame fit",
        description="What of a model fits machines of given memory: how many layers each could own, and what "
        "is missing where it does not. Needs no cluster file and connects to nothing.",
        examples=(
            ("macrame fit --model mlx-community/Qwen3-32B-4bit --memory 16GB,16GB", "on two Macs of 16 GB"),
            (
                "macrame fit --model ./my-model --memory 36GB --context 65536 --kv-bits 8",
                "a long context, with keys and values in 8 bits",
            ),
        ),
    )
    parser.add_argument("--model", required=True, help="a folder, or a hub id in the local cache")
    parser.add_argument(
        "--memory", required=True, type=_memory, metavar="16GB,48GB", help="the memory of each machine"
    )
    parser.add_argument(
        "--context", type=_positive, metavar="N", help=f"tokens of a request (default {DEFAULT_CONTEXT})"
    )
    parser.add_argument(
        "--concurrency", type=_positive, default=1, metavar="N", help="requests at once (default 1)"
    )
    parser.add_argument(
        "--kv-bits",
        type=int,
        choices=KV_BITS,
        help="keys and values in so many bits (default: not quantised)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--verbose", action="store_true", help="show tracebacks")
    return parser


def _memory(text: str) -> list[int]:
    """Bytes of each machine, from "16GB,48GB"; a bare number is in GB."""
    sizes = []
    for part in text.split(","):
        match = _SIZE.fullmatch(part.strip())
        nbytes = 0 if match is None else int(float(match[1]) * (10**6 if match[3] else GB))
        if not 0 < nbytes <= 10**6 * GB:
            raise argparse.ArgumentTypeError(f"{part!r} must be a size such as 16GB")
        sizes.append(nbytes)
    if len(sizes) > MAX_NODES:
        raise argparse.ArgumentTypeError(f"{len(sizes)} machines are more than {MAX_NODES}")
    return sizes


def _positive(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 10**9:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number above 0")
    return int(text)


def _run(args: argparse.Namespace) -> int:
    folder = _folder(args.model)
    nodes = machines(args.memory)
    kv = None if args.kv_bits is None else KvQuantization(args.kv_bits)
    try:
        config, headers = read_config(folder), known_headers(folder)
        context = args.context or min(DEFAULT_CONTEXT, profile_model(config, headers, args.model).max_context)
        name = args.model.rstrip("/").rpartition("/")[2]
        cuts = _legal_cuts(folder) if len(nodes) > 1 else None
        fits = [
            fit(
                config,
                headers,
                name,
                nodes,
                precision,
                context=context,
                concurrency=args.concurrency,
                kv=kv,
                legal_cuts=cuts,
            )
            for precision in PRECISIONS
        ]
    except (ModelFilesError, KvQuantizationError) as error:
        raise UserError(str(error), EXIT_USAGE) from error
    found = Answer(args.model, nodes, context, args.concurrency, args.kv_bits, fits)
    print(json.dumps(found.as_dict(), indent=2) if args.json else found.render())
    return EXIT_OK if fits[0].is_fitting else EXIT_DOES_NOT_FIT


def machines(sizes: list[int]) -> list[NodeProfile]:
    """Macs of which nothing but the memory is known: the ceiling is the usual part of it."""
    return [
        make_node(rank, f"node{rank}", f"node{rank}", memory_bytes=nbytes)
        for rank, nbytes in enumerate(sizes)
    ]


def _legal_cuts(folder: Path) -> frozenset[int]:
    """The cuts that are proven exact for this architecture; an unknown one is proven here, in seconds."""

    def say(line: str) -> None:
        print(f"macrame fit: {line}", file=sys.stderr, flush=True)

    proofs = Prover(folder, threading.Event(), say).prove(None)
    bad = [proof.cut for proof in proofs if not proof.exact]
    if bad:
        say(f"this model cannot be cut before layers {', '.join(map(str, bad))}; no plan here does")
    return frozenset(proof.cut for proof in proofs if proof.exact)


def _folder(model: str) -> Path:
    from shard_loader.hub import resolve_model  # huggingface_hub takes a while
    from shard_loader.sources import HubError

    try:
        return resolve_model(model, Path.cwd())
    except HubError as error:
        raise UserError(f"--model {model}: {error}", EXIT_USAGE) from error


@dataclass(frozen=True, slots=True)
class Answer:
    """What `macrame fit` prints."""

    model: str
    nodes: list[NodeProfile]
    context: int
    concurrency: int
    kv_bits: int | None
    fits: list[Fit]

    def as_dict(self) -> dict[str, Any]:
        """One JSON object."""
        stored = self.fits[0].outcome
        return {
            "model": self.model,
            "memory_bytes": [node.memory_bytes for node in self.nodes],
            "budget_bytes": [node.budget_bytes for node in self.nodes],
            "context": self.context,
            "concurrency": self.concurrency,
            "kv_bits": self.kv_bits,
            "fits": self.fits[0].is_fitting,
            "plan": stored.as_dict() if isinstance(stored, Plan) else None,
            "refusal": asdict(stored) if isinstance(stored, Refusal) else None,
            "precisions": [self._precision(found) for found in self.fits],
        }

    def _precision(self, found: Fit) -> dict[str, Any]:
        plan = found.outcome
        return {
            "precision": found.precision.name,
            "weight_bytes": found.weight_bytes,
            "bits_per_weight": round(found.bits_per_weight, 3),
            "is_estimate": found.precision != AS_STORED,
            "fits": found.is_fitting,
            "num_nodes": len(plan.assignments) if isinstance(plan, Plan) else 0,
            "max_context": found.max_context,
            "max_concurrency": found.max_concurrency,
        }

    def render(self) -> str:
        """Tables: what fits by precision, and the plan of the model as it is stored."""
        users = "one request" if self.concurrency == 1 else f"{self.concurrency} requests"
        memory = " + ".join(gb(node.memory_bytes) for node in self.nodes)
        kv = "" if self.kv_bits is None else f", keys and values in {self.kv_bits} bits"
        stored = self.fits[0].outcome
        lines = [f"{self.model} on {memory}: {users} of {self.context} tokens{kv}", ""]
        lines += table([self._row(found) for found in self.fits])
        lines.append("")
        if isinstance(stored, Plan):
            lines += table(self._plan_rows(stored))
        else:
            lines.append(f"As stored it does not fit: {stored.reason}. {stored.advice}")
        shares = sorted({f"{node.ceiling_bytes / node.memory_bytes:.3g}" for node in self.nodes})
        lines += [
            "",
            "note: other precisions are estimates of what mlx_lm.convert would make",
            f"note: the part of the memory that a GPU may use is a guess ({' or '.join(shares)}), and the "
            "system's reserve comes off it; on the machines themselves run plan-dry-run",
        ]
        return "\n".join(lines)

    def _row(self, found: Fit) -> dict[str, str]:
        plan = found.outcome
        most = (
            f"{MAX_CONCURRENCY}+" if found.max_concurrency == MAX_CONCURRENCY else str(found.max_concurrency)
        )
        return {
            "precision": found.precision.name,
            "bits a weight": f"{found.bits_per_weight:.2f}",
            "weights": gb(found.weight_bytes),
            "fits": "yes" if found.is_fitting else "no",
            "nodes": str(len(plan.assignments)) if isinstance(plan, Plan) else "",
            "missing": gb(plan.missing_bytes) if isinstance(plan, Refusal) else "",
            "largest context": str(found.max_context) if found.max_context else "none",
            "most requests": most if found.max_concurrency else "none",
        }

    def _plan_rows(self, plan: Plan) -> list[dict[str, str]]:
        return [
            {
                "node": part.node,
                "memory": gb(self.nodes[part.rank].memory_bytes),
                "layers": f"{part.start}:{part.stop}",
                "weights": gb(part.weight_bytes),
                "KV": gb(part.kv_bytes),
                "scratch": gb(part.activation_bytes),
                "budget": gb(part.budget_bytes),
                "left": gb(part.budget_bytes - part.need_bytes),
            }
            for part in plan.assignments
        ]


if __name__ == "__main__":
    sys.exit(main())
