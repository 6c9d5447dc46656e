"""The first token that is predicted for each chunk of a prompt, and the chunk that a plan chooses.

    python -m tests.benchmarks.chunks [--gb 8] [--layers 32] [--context 8192]

Rings of equal nodes with an even share each; a table of docs/cost_model.md.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

from planner.plan import Plan
from planner.prefill_chunk import LARGER
from planner.render import table
from planner.solver import PlanOptions, make_plan
from tests.fake_models import GB, made_up_model, node

RINGS = (("Apple M4", 1), ("Apple M4", 5), ("NVIDIA RTX 4090", 1), ("NVIDIA H200", 1), ("NVIDIA H200", 2))
CHUNKS = (256, 512, *LARGER)


def row(chip: str, num_nodes: int, layers: int, size_gb: int, context: int) -> dict[str, str]:
    """Predicted ms to the first token by chunk."""
    model = made_up_model([size_gb * GB // layers] * layers)
    cuts = [layers * i // num_nodes for i in range(num_nodes + 1)]
    nodes = [replace(node(i, 200, chip), layers=(cuts[i], cuts[i + 1])) for i in range(num_nodes)]

    def plan(tokens: int | None) -> Plan:
        found = make_plan(model, nodes, (), PlanOptions(context, chunk_tokens=tokens))
        assert isinstance(found, Plan)
        return found

    ms = {str(n): f"{plan(n).predicted.ttft_s * 1e3:.1f}" for n in CHUNKS}
    return {"node": f"{num_nodes} x {chip}", **ms, "chosen": str(plan(None).chunk_tokens)}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gb", type=int, default=8, help="of weights")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--context", type=int, default=8192)
    args = parser.parse_args()
    rows = [row(chip, num, args.layers, args.gb, args.context) for chip, num in RINGS]
    print("\n".join(table(rows)))


if __name__ == "__main__":
    main()
