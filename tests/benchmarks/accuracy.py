"""Predicted against measured: seeded plans on real run_node processes, links through a relay.

    python -m tests.benchmarks.accuracy [--plans 20] [--seed 1] [--profiles layers,macrame]
    python -m tests.benchmarks.accuracy --gpus 4 [--plans 12]

Four nodes are profiled alone, before the first plan and, on processors, after every fifth: `layers` by the
model's own layers (tests/benchmarks/alone.py), `macrame` by macrame profile. Then each plan runs as a ring of
two to four of them, with layers forced unevenly, in any order of ranks, each edge through a relay of known
delay and rate. Nothing is fitted on a ring: a prediction is made of the nodes' speeds, the links as the relay
has them, and what one frame takes over an edge without delay.

On processors the nodes differ by an injected delay of each layer, at most twice what it computes: asleep, so
that it takes no processor from the others. With so few users (USERS) no more stages compute at once than
there are processors. With --gpus each node has a GPU of its own as far as there are any, and the model is
random, of Qwen3-1.7B's shape. A prompt of context / 2 tokens is timed to its first token, and answers run
around context / 2, through the HTTP endpoint. `other work` is the share of all processors that other
processes took meanwhile, of the profiles and of the ring: figures with more than a few percent tell little.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from planner.cost import CostModel, Link
from planner.model_profile import read_model_profile
from planner.node_profile import GB, make_node
from planner.plan import Plan
from planner.solver import PlanOptions, make_plan
from planner.speeds import Speeds
from planner.workload import Workload
from tests.benchmarks.accuracy_profiles import profile_all
from tests.benchmarks.accuracy_ring import (
    USERS,
    Case,
    Numbers,
    Setting,
    cpu_setting,
    edges,
    gpu_setting,
    make_case,
    measure,
)
from tests.benchmarks.hop_alone import hop_ms
from tests.benchmarks.other_load import OtherLoad

PROFILE_EVERY = 5  # plans
STARTED = time.monotonic()


def predict(setting: Setting, case: Case, speeds: Sequence[Speeds], base_ms: float) -> Numbers:
    """What plan-dry-run would say of these nodes and links."""
    nodes = [
        replace(
            make_node(rank, f"n{rank}", f"h{rank}", memory_bytes=64 * GB, layers=case.layers[rank]),
            measured=speeds[node],
        )
        for rank, node in enumerate(case.nodes)
    ]
    links = [
        Link(pair, shape.delay_ms + base_ms, shape.bytes_s * 8 / 1e9) for pair, shape in case.links.items()
    ]
    model = read_model_profile(setting.model)
    plan = make_plan(model, nodes, links, PlanOptions(setting.context, USERS[len(nodes)]))
    assert isinstance(plan, Plan), plan
    predicted = plan.predicted
    return Numbers(predicted.decode_tok_s, predicted.throughput_tok_s, predicted.ttft_s)


@dataclass(frozen=True, slots=True)
class Outcome:
    """One plan: measured, and by each profile predicted."""

    case: Case
    measured: Numbers
    predicted: list[Numbers]
    others: tuple[float, float]  # the share of the processors that other work took, of profiles and ring


def run(setting: Setting, profiles: Sequence[str], num_plans: int, seed: int) -> Iterator[Outcome]:
    """Plan by plan."""
    num_layers = read_model_profile(setting.model).num_layers
    base_ms = hop_ms()
    tell(f"an edge without delay takes {base_ms:.2f} ms")
    speeds: dict[str, list[Speeds]] = {}
    while_alone, while_run = OtherLoad(), OtherLoad()
    for number in range(num_plans):
        rng = random.Random(1000 * seed + number)
        if number == 0 or (number % PROFILE_EVERY == 0 and not setting.num_gpus):
            with while_alone:
                speeds = {kind: profile_all(setting, kind) for kind in profiles}
            _show_speeds(setting, speeds)
        case = make_case(rng, number, num_layers, setting)
        with while_run:
            measured = measure(setting, case, rng, base_ms)
        predicted = [predict(setting, case, speeds[kind], base_ms) for kind in profiles]
        yield Outcome(case, measured, predicted, (while_alone.share, while_run.share))


def tell(line: str) -> None:
    print(f"{time.monotonic() - STARTED:5.0f} s  {line}", file=sys.stderr, flush=True)


def _show_speeds(setting: Setting, speeds: Mapping[str, Sequence[Speeds]]) -> None:
    model = read_model_profile(setting.model)
    work = Workload(setting.context, 1)
    for kind, by_node in speeds.items():
        for node, found in enumerate(by_node):
            one = make_node(0, "n", "h", memory_bytes=64 * GB)
            cost = CostModel(model, [replace(one, measured=found)], (), work)
            layer_ms, chunk_ms = (
                each[1] - each[0] for each in (cost.decode_sums_ms(0), cost.chunk_sums_ms(0))
            )
            tell(
                f"node {node} alone, by {kind}: a layer takes {layer_ms:.3f} ms, {chunk_ms:.2f} for a chunk, "
                f"{setting.delay_ms(node):.3f} of them injected, and a stage {found.stage_ms:.2f}"
            )


KEYS = ("one_tok_s", "many_tok_s", "ttft_s")


def row(number: int, outcome: Outcome) -> str:
    """A line of the table: each measured value, and the error of each prediction."""
    case = outcome.case
    order = sorted(range(len(case.layers)), key=lambda rank: case.layers[rank])
    stages = " ".join(f"n{case.nodes[r]}:{case.layers[r][1] - case.layers[r][0]}" for r in order)
    used = dict.fromkeys(frozenset(edge) for edge in edges(case))
    hops = " ".join(f"{case.links[pair].delay_ms:.1f}" for pair in used)
    cells = [str(number), stages, hops]
    for key in KEYS:
        found = getattr(outcome.measured, key)
        errors = ", ".join(f"{getattr(said, key) / found - 1:+.1%}" for said in outcome.predicted)
        cells.append(f"{found:.3g} ({errors})")
    cells.append(" ".join(f"{share:.0%}" for share in outcome.others))
    return f"| {' | '.join(cells)} |"


def summary(profiles: Sequence[str], outcomes: Sequence[Outcome]) -> list[str]:
    """The worst and the mean error by each profile."""
    lines = []
    for at, kind in enumerate(profiles):
        cells = []
        for key in KEYS:
            errors = [getattr(o.predicted[at], key) / getattr(o.measured, key) - 1 for o in outcomes]
            cells.append(f"worst {max(errors, key=abs):+.1%}, mean {statistics.mean(map(abs, errors)):.1%}")
        lines.append(f"| all | by {kind} | | {' | '.join(cells)} | |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description="Predicted against measured.")
    parser.add_argument("--plans", type=int, help="default 20, on GPUs 12")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--gpus", type=int, default=0, help="0: processors")
    parser.add_argument("--profiles", default="layers,macrame")
    args = parser.parse_args()
    profiles = args.profiles.split(",")
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        setting = gpu_setting(directory, args.gpus) if args.gpus else cpu_setting(directory)
        errors = " and ".join(f"by {kind}" for kind in profiles)
        print(f"Measured, and in brackets how far it is predicted {errors}.\n")
        print(
            "| plan | stages | delays ms | one user tok/s | many users tok/s | first token s | other work |"
        )
        print("| --- | --- | --- | --- | --- | --- | --- |")
        num_plans, outcomes = args.plans or (12 if args.gpus else 20), []
        for outcome in run(setting, profiles, num_plans, args.seed):
            print(row(len(outcomes), outcome), flush=True)
            outcomes.append(outcome)
        print("\n".join(summary(profiles, outcomes)))
        tell("done")


if __name__ == "__main__":
    main()
