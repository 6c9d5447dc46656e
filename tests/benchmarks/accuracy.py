"""Predicted against measured: seeded plans on real run_node processes, links through a relay.

    python -m tests.benchmarks.accuracy [--plans 20] [--seed 1]
    python -m tests.benchmarks.accuracy --gpus 4 [--plans 20]

Four nodes are profiled alone (tests/benchmarks/alone.py), before the first plan and after every fifth. Then
each plan runs as a ring of two to four of them, with layers forced unevenly, in any order of ranks, each edge
through a relay of known delay and rate. Nothing is fitted on a ring: what a prediction is made of is the
nodes' speeds, the links as the relay has them, and what one frame takes over an edge without delay.

On processors the nodes differ by an injected delay of each layer, at most twice what it computes: asleep, so
that it takes no processor from the others. With so few users (USERS) no more stages compute at once than
there are processors. With --gpus each node has a GPU of its own as far as there are any, and the model is
random, of Qwen3-1.7B's shape. A prompt of context / 2 tokens is timed to its first token, and answers run
around context / 2, through the HTTP endpoint.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from planner.cost import Link
from planner.model_profile import read_model_profile
from planner.node_profile import GB, make_node
from planner.plan import Plan
from planner.solver import PlanOptions, make_plan
from planner.speeds import Speeds
from tests.benchmarks.hop_alone import hop_ms
from tests.benchmarks.token_times import Stream, stream_tokens
from tests.relay import RelayProcess, Shape
from tests.ring_processes import RingProcesses

NUM_NODES = 4
PROFILE_EVERY = 5  # plans
USERS = {2: 3, 3: 2, 4: 2}  # at once, by stages
ROUNDS = 2
DELAYS = (0.0, 0.5, 1.2, 1.8)  # of each node's layers, in what they compute


@dataclass(frozen=True, slots=True)
class Setting:
    """What is run: a model, and how the nodes find their devices."""

    model: Path
    context: int
    answer_tokens: int
    max_delay_ms: float  # of a link
    bytes_s: tuple[float, float]  # of a link
    layer_ms: float  # computed, about: what injected delays are made of
    num_gpus: int = 0

    @property
    def prompt_tokens(self) -> int:
        """So many that the answer runs around half the context."""
        return self.context // 2 - self.answer_tokens // 2

    def delay_ms(self, node: int) -> float:
        return DELAYS[node] * self.layer_ms

    def environment(self, node: int) -> dict[str, str | None]:
        """Of a node's process, alone and in a ring."""
        found: dict[str, str | None] = {"MACRAME_FAULT": f"layer_delay_ms={self.delay_ms(node)}"}
        if self.num_gpus:
            found |= {"CUDA_VISIBLE_DEVICES": str(node % self.num_gpus), "MLX_DISABLE_COMPILE": None}
        return found


@dataclass(frozen=True, slots=True)
class Case:
    """One plan: the nodes by rank, their layers, and the link of each pair of ranks."""

    nodes: tuple[int, ...]  # of the four, by rank
    layers: tuple[tuple[int, int], ...]  # by rank
    links: dict[frozenset[int], Shape]


@dataclass(frozen=True, slots=True)
class Numbers:
    one_tok_s: float
    many_tok_s: float
    ttft_s: float


def make_case(rng: random.Random, number: int, num_layers: int, setting: Setting) -> Case:
    """Two, three or four stages, never of equal size if that can be."""
    size = (2, 3, 3, 2, 4)[number % 5]
    while True:
        cuts = sorted(rng.sample(range(1, num_layers), size - 1))
        ranges = list(itertools.pairwise([0, *cuts, num_layers]))
        if len({b - a for a, b in ranges}) == size:
            break
    rng.shuffle(ranges)
    links = {}
    for pair in itertools.combinations(range(size), 2):
        low, high = setting.bytes_s
        shape = Shape(setting.max_delay_ms * rng.random() ** 2, low * (high / low) ** rng.random())
        links[frozenset(pair)] = shape
    return Case(tuple(rng.sample(range(NUM_NODES), size)), tuple(ranges), links)


def profile(setting: Setting, node: int) -> Speeds:
    """The node alone, in a process of its own."""
    values = {**os.environ, "MLX_DISABLE_COMPILE": "1", **setting.environment(node)}
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.benchmarks.alone",
            str(setting.model),
            "--context",
            str(setting.context),
        ],
        env={key: value for key, value in values.items() if value is not None},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found = json.loads(result.stdout)
    return Speeds(**(found | {"formats": ()}))


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


def edges(case: Case) -> list[tuple[int, int]]:
    """(from, to) ranks of the ring's edges between two ranks."""
    order = sorted(range(len(case.layers)), key=lambda rank: case.layers[rank])
    return [(a, b) for a, b in itertools.pairwise([0, *order, 0]) if a != b]


def measure(setting: Setting, case: Case, rng: random.Random, base_ms: float) -> Numbers:
    """The same, run."""
    users, size = USERS[len(case.nodes)], len(case.nodes)
    links = [
        {
            "between": [f"n{rank}" for rank in sorted(pair)],
            "latency_ms": shape.delay_ms + base_ms,
            "bandwidth_gbit_s": shape.bytes_s * 8 / 1e9,
        }
        for pair, shape in case.links.items()
    ]
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        ring = RingProcesses(
            directory,
            setting.model,
            case.layers,
            concurrency=users,
            context=setting.context,
            with_api=True,
            env_of={rank: setting.environment(node) for rank, node in enumerate(case.nodes)},
            links=links,
        )
        shapes = [(ring.ports[b], case.links[frozenset((a, b))]) for a, b in edges(case)]
        relays = stack.enter_context(RelayProcess(shapes))
        for rank in range(size):
            ports = zip(edges(case), relays.ports, strict=True)
            via = "+".join(f"{b}@{port}" for (a, b), port in ports if a == rank)
            ring.faults[rank] = f"{setting.environment(case.nodes[rank])['MACRAME_FAULT']},edges_via={via}"
        stack.enter_context(ring)
        url = ring.wait_api(300.0)
        return _measure(setting, url, users, rng)


def _measure(setting: Setting, url: str, users: int, rng: random.Random) -> Numbers:
    def ask(num_prompt: int, num_tokens: int) -> Stream:
        prompt = [rng.randrange(1, 256) for _ in range(num_prompt)]
        return stream_tokens(url, prompt, num_tokens)

    half, answer = setting.context // 2, setting.answer_tokens
    ask(half, 2)  # warm
    first_s = statistics.median(ask(half, 1).first_s for _ in range(ROUNDS + 1))
    one = statistics.mean(ask(setting.prompt_tokens, answer).tok_s for _ in range(ROUNDS))
    with ThreadPoolExecutor(users) as pool:
        streams = list(pool.map(lambda _: ask(setting.prompt_tokens, answer), range(users)))
    return Numbers(one, _together(streams), first_s)


def _together(streams: Sequence[Stream]) -> float:
    """Tokens a second while all of them are being answered."""
    since, until = max(s.times[0] for s in streams), min(s.times[-1] for s in streams)
    count = sum(since < time <= until for s in streams for time in s.times)
    return count / (until - since)


def run(setting: Setting, num_plans: int, seed: int) -> Iterator[tuple[Case, Numbers, Numbers]]:
    """Predicted and measured, plan by plan."""
    num_layers = read_model_profile(setting.model).num_layers
    base_ms = hop_ms()
    print(f"an edge without delay takes {base_ms:.2f} ms", file=sys.stderr)
    speeds: list[Speeds] = []
    for number in range(num_plans):
        rng = random.Random(1000 * seed + number)
        if number % PROFILE_EVERY == 0:
            speeds = [profile(setting, node) for node in range(NUM_NODES)]
            _show_speeds(setting, speeds)
        case = make_case(rng, number, num_layers, setting)
        started = time.monotonic()
        yield case, predict(setting, case, speeds, base_ms), measure(setting, case, rng, base_ms)
        print(f"plan {number} took {time.monotonic() - started:.0f} s", file=sys.stderr)


def _show_speeds(setting: Setting, speeds: Sequence[Speeds]) -> None:
    model = read_model_profile(setting.model)
    layer_bytes = model.layers[0].active_bytes
    for node, found in enumerate(speeds):
        layer_ms = layer_bytes / found.read_bytes_ms + found.layer_ms
        print(
            f"node {node} alone: {layer_ms:.3f} ms a layer, of which {setting.delay_ms(node):.3f} injected, "
            f"and {found.stage_ms:.2f} a stage",
            file=sys.stderr,
        )


def row(number: int, case: Case, predicted: Numbers, measured: Numbers) -> str:
    """A line of the table."""
    order = sorted(range(len(case.layers)), key=lambda rank: case.layers[rank])
    stages = " ".join(f"n{case.nodes[r]}:{case.layers[r][1] - case.layers[r][0]}" for r in order)
    used = {frozenset(edge) for edge in edges(case)}
    hops = " ".join(f"{case.links[pair].delay_ms:.1f}" for pair in used)
    cells = [str(number), stages, hops]
    for key in ("one_tok_s", "many_tok_s", "ttft_s"):
        said, found = getattr(predicted, key), getattr(measured, key)
        cells.append(f"{said:.3g} / {found:.3g} ({said / found - 1:+.0%})")
    return f"| {' | '.join(cells)} |"


def summary(found: Sequence[tuple[Case, Numbers, Numbers]]) -> str:
    """The worst and the mean error of each column."""
    cells = []
    for key in ("one_tok_s", "many_tok_s", "ttft_s"):
        errors = [getattr(said, key) / getattr(was, key) - 1 for _, said, was in found]
        cells.append(f"worst {max(errors, key=abs):+.1%}, mean {statistics.mean(map(abs, errors)):.1%}")
    return f"| all | | | {' | '.join(cells)} |"


def cpu_setting(directory: Path) -> Setting:
    """A float32 llama of 13 layers, about 2 ms each."""
    from tests.tiny_models import write_checkpoint

    shape: dict[str, Any] = {"hidden_size": 320, "intermediate_size": 896, "head_dim": 64}
    heads = {"num_attention_heads": 5, "num_key_value_heads": 5}
    model = write_checkpoint("llama", directory / "model", num_layers=13, overrides=shape | heads)
    return Setting(model, 96, 40, 15.0, (2e6, 1e8), layer_ms=1.7)


def gpu_setting(directory: Path, num_gpus: int) -> Setting:
    """Qwen3-1.7B's shape in 8 bits; launches bind a step, about 0.1 ms a layer."""
    from tests.benchmarks.device import random_model

    model = random_model(directory / "model")
    return Setting(model, 2048, 192, 3.0, (1e8, 1e9), layer_ms=0.1, num_gpus=num_gpus)


def main() -> None:
    parser = argparse.ArgumentParser(description="Predicted against measured.")
    parser.add_argument("--plans", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--gpus", type=int, default=0, help="0: processors")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        setting = gpu_setting(directory, args.gpus) if args.gpus else cpu_setting(directory)
        print("| plan | stages | delays ms | one user tok/s | many users tok/s | first token s |")
        print("| --- | --- | --- | --- | --- | --- |")
        found = []
        for number, result in enumerate(run(setting, args.plans, args.seed)):
            found.append(result)
            print(row(number, *result), flush=True)
        print(summary(found))


if __name__ == "__main__":
    main()
