"""The closed formulas of the cost model against the simulator, over random plans.

    python -m tests.benchmarks.simulated [--plans 2000]

Seeded clusters of up to 6 nodes, links of 0.05 to 250 ms, 1 to 30 users, all strategies and objectives.
"""

from __future__ import annotations

import argparse
import random
from statistics import mean

from planner.simulator import Request, simulate
from tests.test_ring_times import random_plan, simulated


def main() -> None:
    parser = argparse.ArgumentParser(description="The cost model against the simulator.")
    parser.add_argument("--plans", type=int, default=2000)
    args = parser.parse_args()
    errors: dict[str, list[float]] = {}

    def note(what: str, predicted: float, found: float) -> None:
        errors.setdefault(what, []).append(predicted / found - 1)

    for seed in range(args.plans):
        made = random_plan(random.Random(seed))
        if made is None:
            continue
        plan, ring = made[0], simulated(*made)
        note("one user, tok/s", plan.predicted.decode_tok_s, simulate(ring, [Request(3)]).decode_tok_s())
        many = simulate(ring, [Request(40)] * plan.concurrency)
        note("all users, tok/s", plan.predicted.throughput_tok_s, many.aggregate_tok_s())
        first_ms = simulate(ring, [Request(1, has_prompt=True)]).ttft_ms()
        what = "first token, prompts above 512 tokens" if ring.num_chunks > 1 else "first token, shorter ones"
        note(what, plan.predicted.ttft_s * 1e3, first_ms)
    print("| prediction | plans | mean error | lowest | highest |\n| --- | --- | --- | --- | --- |")
    for what, found in errors.items():
        size = mean(map(abs, found))
        print(f"| {what} | {len(found)} | {size:.2%} | {min(found):+.2%} | {max(found):+.2%} |")


if __name__ == "__main__":
    main()
