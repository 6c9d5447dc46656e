"""What mx.compile gains where the shapes of a decode step are stable: CPU time of a token.

    python -m tests.benchmarks.compiled [--random] [--rows 1,8] [--blocks 12] [--block-steps 20]

One process holds the whole model of deploy/demo, or with --random the 200 M of cpu_per_token, and steps an
engine by hand. Each way has sessions of its own, and the ways take turns step by step. A block's figure is
the median of its steps, and its ratio is to the figure of the way as it is: median of the blocks, lower and
upper quartile. `again` is the same as it is, for the noise; `thread` the thread that builds and waits, `all`
every thread. is_equal: the tokens are those of the way as it is; is_alike: a row alone gets those that it
gets among the most rows.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import mlx.core as mx

from cluster import random_draws, sampler
from cluster.engine import Engine
from cluster.random_draws import Odds
from kernels.taken_class import take_call
from proto import ring_pb2
from shard_loader.layout import decoder_layers
from shard_loader.weights import load_shard
from tests.benchmarks.cpu_per_token import DEMO, ONE_THREAD, PROCESSORS, random_model

PROMPT = list(range(1, 17))
WARM_STEPS = 4  # the first of them compile
WISHES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "temperature": {"temperature": 0.7},
    "temperature, top_p, top_k": {"temperature": 0.7, "top_p": 0.8, "top_k": 20},
}
WAYS = {
    "as it is": (),
    "again": (),
    "mlp": ("mlp",),
    "draw": ("draw",),
    "norm, head and greedy draw": ("tail",),
    "mlp, norm, head, draw": ("mlp", "tail", "draw"),
}


# -- the ways ---------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Compiled:
    """parts: what is compiled now, "mlp" of each layer, "tail" (norm, head, most probable token), "draw"."""

    parts: Sequence[str] = ()
    best: mx.array | None = None  # that the tail has drawn
    num_calls: int = 0  # of compiled functions

    def of(self, function: Any, part: str) -> Any:
        """As `function`, compiled while this part is."""
        compiled = mx.compile(function)

        def call(*args: Any) -> Any:
            if part not in self.parts:
                return function(*args)
            self.num_calls += 1
            return compiled(*args)

        return call

    def take_over(self, model: Any) -> None:
        """From now on the model's own code does as `parts` say with single tokens."""
        for layer in decoder_layers(model):
            self._take_mlp(layer.mlp)
        inner = model.model
        head = inner.embed_tokens.as_linear if model.args.tie_word_embeddings else model.lm_head
        own, norm = (partial(type(module).__call__, module) for module in (model, inner.norm))

        def last(hidden: mx.array) -> tuple[mx.array, mx.array]:
            logits = head(norm(hidden))
            return logits, most_probable(logits[:, -1])

        most_probable, tail = sampler.most_probable, self.of(last, "tail")

        def call(_: Any, tokens: mx.array, cache: Any = None) -> mx.array:
            if "tail" not in self.parts or tokens.shape[1] > 1:
                return own(tokens, cache)
            is_before_norm.append(True)
            hidden = inner(tokens, cache)
            is_before_norm.clear()
            logits, self.best = tail(hidden)
            return logits

        is_before_norm: list[bool] = []
        take_call(inner.norm, lambda _, x: x if is_before_norm else norm(x))
        take_call(model, call)

    def _take_mlp(self, mlp: Any) -> None:
        own = partial(type(mlp).__call__, mlp)
        compiled = self.of(own, "mlp")
        take_call(mlp, lambda _, x: compiled(x) if x.shape[1] == 1 else own(x))

    def greedy(self) -> Any:
        """For cluster.sampler.most_probable."""
        draw = self.of(sampler.most_probable, "draw")

        def call(logits: mx.array) -> mx.array:
            found, self.best = self.best, None
            return draw(logits) if found is None else found

        return call

    def random(self) -> Any:
        """For cluster.sampler.draw_tokens; all rows have odds of one form."""
        plain = sampler.draw_tokens

        @cache
        def compiled(has_top_p: bool, top_k: int) -> Any:
            return self.of(partial(_drawn, has_top_p, top_k), "draw")

        def call(scores: mx.array, odds: Sequence[Odds], keys: Sequence[random_draws.Key]) -> mx.array:
            if "draw" not in self.parts:
                return plain(scores, odds, keys)
            draw = compiled(odds[0].cost == 2, odds[0].top_k)
            numbers = [[one.inverse_temperature, one.top_p] for one in odds]
            found: mx.array = draw(scores, mx.array(numbers), mx.array(list(keys), dtype=mx.uint32))
            return found

        return call


def _drawn(has_top_p: bool, top_k: int, scores: mx.array, odds: mx.array, words: mx.array) -> mx.array:
    """As cluster.random_draws.draw_tokens, of numbers that are inputs; odds, words: (B, 2)."""
    size = scores.shape[-1]
    kept = scores
    if has_top_p:
        rising = mx.sort(scores, axis=-1)
        masses = mx.exp(rising - rising[:, -1:])
        above = mx.cumsum(masses, axis=-1, reverse=True, inclusive=False)
        whole = above[:, :1] + masses[:, :1]
        num_dropped = mx.sum(above >= odds[:, 1:] * whole, axis=-1, keepdims=True)
        if top_k:
            num_dropped = mx.maximum(num_dropped, mx.array(size - top_k))
        kept = mx.where(scores < mx.take_along_axis(rising, num_dropped, axis=-1), -mx.inf, scores)
    noise = mx.vmap(lambda key: mx.random.gumbel((size,), key=key))(words)
    return mx.argmax(noise + kept * odds[:, :1], axis=-1)


# -- what is measured -------------------------------------------------------------------------------------


class Rows:
    """Sessions that are stepped together, each with another prompt and seed."""

    def __init__(self, engine: Engine, first: int, num_rows: int, wish: dict[str, Any]) -> None:
        self.engine, self.position = engine, len(PROMPT)
        self.tokens: dict[int, list[int]] = {}
        for row in range(num_rows):
            self.tokens[first + row] = []
            frame = ring_pb2.Frame(kind=ring_pb2.STEP, epoch=1, seq=1)
            spec = ring_pb2.Sampling(seed=row, **wish)
            frame.opens.add(session=first + row, prompt_tokens=len(PROMPT), max_tokens=1 << 20, sampling=spec)
            prompt = [*PROMPT[row:], *PROMPT[:row]]
            frame.slots.add(session=first + row, position=0, tokens=prompt, is_sampled=True)
            self._run(frame)

    def step(self) -> tuple[float, float]:
        """One token of each; CPU seconds of a token: of this thread, and of all."""
        frame = ring_pb2.Frame(kind=ring_pb2.STEP, epoch=1, seq=1, is_batched=len(self.tokens) > 1)
        for session, tokens in self.tokens.items():
            frame.slots.add(session=session, position=self.position, tokens=tokens[-1:], is_sampled=True)
        self.position += 1
        began = time.thread_time(), time.process_time()
        self._run(frame)
        took = time.thread_time() - began[0], time.process_time() - began[1]
        return took[0] / len(self.tokens), took[1] / len(self.tokens)

    def close(self) -> None:
        self.engine.step(ring_pb2.Frame(kind=ring_pb2.STEP, epoch=1, seq=1, closes=list(self.tokens)), ())

    def _run(self, frame: ring_pb2.Frame) -> None:
        output = self.engine.step(frame, ())
        assert output is not None
        for slot in output[0].slots:
            assert not slot.error, slot.error
            self.tokens[slot.session].append(slot.result.id)


Times = list[tuple[float, float]]


def steps(
    engine: Engine, compiled: Compiled, wish: str, num_rows: int, num_steps: int
) -> tuple[dict[str, Times], dict[str, list[list[int]]]]:
    """By the ways that concern the wish: the times of each step, and the tokens of each row."""
    names = [name for name, parts in WAYS.items() if wish == "greedy" or parts != ("tail",)]
    rows = {name: Rows(engine, 1 + 100 * i, num_rows, WISHES[wish]) for i, name in enumerate(names)}
    took: dict[str, Times] = {name: [] for name in names}
    for number in range(WARM_STEPS + num_steps):
        first = number % len(names)
        for name in (*names[first:], *names[:first]):
            compiled.parts, compiled.num_calls = WAYS[name], 0
            times = rows[name].step()
            assert (compiled.num_calls > 0) == bool(WAYS[name])
            compiled.best = None
            if number >= WARM_STEPS:
                took[name].append(times)
    compiled.parts = ()
    for one in rows.values():
        one.close()
    return took, {name: list(one.tokens.values()) for name, one in rows.items()}


def ratios(times: Times, plain: Times, which: int, block: int) -> list[float]:
    """Of the medians of each block."""
    found = []
    for start in range(0, len(times), block):
        ours, theirs = (
            statistics.median(one[which] for one in every[start : start + block]) for every in (times, plain)
        )
        found.append(ours / theirs)
    return found


def measured(engine: Engine, compiled: Compiled, wish: str, args: argparse.Namespace) -> None:
    """Prints an object for each number of rows and way."""
    tokens: dict[int, dict[str, list[list[int]]]] = {}
    took: dict[int, dict[str, Times]] = {}
    sizes = [int(size) for size in args.rows.split(",")]
    for size in sizes:
        took[size], tokens[size] = steps(engine, compiled, wish, size, args.blocks * args.block_steps)
    for size, of_ways in took.items():
        for name, times in of_ways.items():
            told: dict[str, Any] = {"wish": wish, "rows": size, "way": name}
            for which, kind in enumerate(("thread", "all")):
                told[f"{kind}_ms"] = round(1e3 * statistics.median(one[which] for one in times), 3)
                found = ratios(times, of_ways["as it is"], which, args.block_steps)
                low, middle, high = statistics.quantiles(found, n=4)
                told[f"{kind}_ratio"] = [round(one, 3) for one in (middle, low, high)]
            told["is_equal"] = tokens[size][name] == tokens[size]["as it is"]
            told["is_alike"] = tokens[sizes[0]][name] == tokens[sizes[-1]][name][: sizes[0]]
            print(json.dumps(told), flush=True)


def main() -> None:
    """Print one JSON object a line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--random", action="store_true")
    parser.add_argument("--rows", default="1,8")
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--block-steps", type=int, default=20)
    parser.add_argument("--wishes", default="|".join(WISHES), help="with | between them")
    args = parser.parse_args()
    if any(os.environ.get(name) != value for name, value in ONE_THREAD.items()):
        environment = {k: v for k, v in os.environ.items() if k != "MLX_DISABLE_COMPILE"} | ONE_THREAD
        command = [sys.executable, "-m", "tests.benchmarks.compiled", *sys.argv[1:]]
        os.execve(sys.executable, command, environment)  # these are read when MLX is imported
    if hasattr(os, "sched_setaffinity"):  # as cpu_per_token does it
        os.sched_setaffinity(0, PROCESSORS[-1:])
    with tempfile.TemporaryDirectory() as directory:
        model = random_model(Path(directory)) if args.random else DEMO
        num_layers = json.loads((model / "config.json").read_text())["num_hidden_layers"]
        shard, compiled = load_shard(model, 0, num_layers), Compiled()
        greedy, random = compiled.greedy(), compiled.random()
        compiled.take_over(shard._model)
        with patch("cluster.sampler.most_probable", greedy), patch("cluster.sampler.draw_tokens", random):
            for wish in args.wishes.split("|"):
                measured(Engine(shard), compiled, wish, args)


if __name__ == "__main__":
    main()
