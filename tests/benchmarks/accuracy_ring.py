"""A seeded plan as a ring of real run_node processes, links through a relay. See accuracy.py."""

from __future__ import annotations

import itertools
import random
import statistics
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks.token_times import Stream, stream_tokens
from tests.relay import RelayProcess, Shape
from tests.ring_processes import NO_GUESSES, RingProcesses

NUM_NODES = 4
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
            speculation=NO_GUESSES,
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
