"""How long a plan takes, for clusters of different nodes with links of different speed, and of equal nodes.

    python -m tests.benchmarks.solver

Prints a Markdown table: CPU seconds of its one thread for each objective, and the gap that the plan states
(none: exact).
"""

from __future__ import annotations

import itertools
import random
import time

from planner.cost import Link
from planner.model_profile import ModelProfile
from planner.node_profile import NodeProfile
from planner.plan import Plan
from planner.solver import OBJECTIVES, PlanOptions, make_plan
from tests.fake_models import CHIPS, made_up_model, node

CASES = (  # (nodes, layers, nodes are equal)
    *((3, 28, False), (8, 100, False), (8, 100, True), (10, 100, False), (12, 61, False)),
    *((32, 200, False), (32, 200, True), (1000, 200, False)),
)
MAX_LINKED_NODES = 40  # the links of more are the default's


def cluster(
    num_nodes: int, num_layers: int, is_equal: bool
) -> tuple[ModelProfile, list[NodeProfile], list[Link]]:
    """A model that needs about two thirds of the nodes' memory, but of 1,000 nodes a few."""
    rng = random.Random(num_nodes * 1000 + num_layers)
    model = made_up_model(
        [rng.randint(5, 15) * 10**8 for _ in range(num_layers)],
        embed_bytes=10**9,
        head_bytes=10**9,
        kv_token_bytes=4000,
    )
    share_gb = max(4.0, 1.76 * num_layers / num_nodes)
    if is_equal:
        return model, [node(rank, share_gb, "Apple M4 Pro") for rank in range(num_nodes)], []
    nodes = [node(rank, share_gb * rng.uniform(0.5, 1.5), rng.choice(CHIPS)[0]) for rank in range(num_nodes)]
    links = [
        Link(frozenset(pair), rng.choice([0.1, 0.4, 2.0, 8.0]), rng.choice([1.0, 10.0, 40.0]))
        for pair in itertools.combinations(range(num_nodes), 2)
        if num_nodes <= MAX_LINKED_NODES
    ]
    return model, nodes, links


def main() -> None:
    print("| nodes | layers | " + " | ".join(OBJECTIVES) + " | stated gap |")
    print("| --- | --- | " + "--- | " * len(OBJECTIVES) + "--- |")
    for num_nodes, num_layers, is_equal in CASES:
        model, nodes, links = cluster(num_nodes, num_layers, is_equal)
        cells, gaps = [], set()
        for objective in OBJECTIVES:
            started_s = time.process_time()
            plan = make_plan(model, nodes, links, PlanOptions(8192, 8, objective=objective))
            cells.append(f"{time.process_time() - started_s:.2f}")
            assert isinstance(plan, Plan)
            gaps.update(note.split(" by ")[1].split(" at most")[0] for note in plan.notes)
        kind = "equal" if is_equal else "different"
        stated = f"up to {max(gaps, key=lambda gap: float(gap[:-1]))}" if gaps else "exact"
        print(f"| {num_nodes} {kind} | {num_layers} | " + " | ".join(cells) + f" | {stated} |", flush=True)


if __name__ == "__main__":
    main()
