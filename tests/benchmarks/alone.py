"""What a node does alone with a model's layers: no ring, no other stage. Prints its speeds as JSON.

    python -m tests.benchmarks.alone MODEL --context 96

Two shards of different depth and the whole model, steps in turn with a rest before each, as a stage rests
between its frames. A layer is the difference of two depths, the stage what is left of one, the head what the
whole model takes besides. An injected layer_delay_ms (cluster/fault.py) is part of the node.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from cluster.engine import Engine
from cluster.fault import Fault, injected
from planner.model_profile import read_model_profile
from planner.speeds import Speeds
from planner.workload import Workload
from proto import ring_pb2
from shard_loader.weights import load_shard

REST_S = 0.02  # about what a stage waits for its next frame
CHUNK_ROUNDS = 4


class Alone:
    """One shard, fed by hand."""

    def __init__(self, model: Path, stop: int) -> None:
        self.engine = Engine(load_shard(model, 0, stop))
        self.position = self.num_sessions = self.num_frames = 0

    def _run(self, frame: ring_pb2.Frame, tokens: Sequence[int], *, is_sampled: bool) -> float:
        frame.slots.add(
            session=self.num_sessions, position=self.position, tokens=tokens, is_sampled=is_sampled
        )
        time.sleep(REST_S)
        started = time.perf_counter()
        output = self.engine.step(frame, ())
        took_ms = (time.perf_counter() - started) * 1e3
        assert output is not None
        assert not output[0].slots[0].error, output[0].slots[0].error
        self.position += len(tokens)
        return took_ms

    def _frame(self) -> ring_pb2.Frame:
        self.num_frames += 1
        return ring_pb2.Frame(kind=ring_pb2.STEP, epoch=1, seq=self.num_frames)

    def chunk_ms(self, num_tokens: int) -> float:
        """The first chunk of a new prompt; the one before is forgotten."""
        frame = self._frame()
        if self.num_sessions:
            frame.closes.append(self.num_sessions)
        self.num_sessions, self.position = self.num_sessions + 1, 0
        frame.opens.add(session=self.num_sessions, prompt_tokens=num_tokens + 1, max_tokens=1 << 20)
        return self._run(frame, [1 + i % 255 for i in range(num_tokens)], is_sampled=False)

    def step_ms(self) -> float:
        """One more token."""
        return self._run(self._frame(), [1], is_sampled=True)


def measure(directory: Path, context: int, rounds: int) -> Speeds:
    """The speeds with which the cost model gives back what was measured."""
    model = read_model_profile(directory)
    work, layer, num_layers = Workload(context, 1), model.layers[0], model.num_layers
    depths = (max(1, num_layers // 6), max(2, num_layers // 2), num_layers)
    shards = [Alone(directory, depth) for depth in depths]
    chunks = [[s.chunk_ms(work.mean_chunk_tokens) for s in shards] for _ in range(CHUNK_ROUNDS)][1:]
    steps = [[s.step_ms() for s in shards] for _ in range(rounds + 3)][3:]
    low_ms, high_ms, all_ms = (statistics.median(times) for times in zip(*steps, strict=True))
    layer_ms = (high_ms - low_ms) / (depths[1] - depths[0])
    stage_ms = max(0.0, low_ms - depths[0] * layer_ms)
    head_ms = all_ms - stage_ms - num_layers * layer_ms
    head_bytes = model.norm_bytes + (model.embed_bytes if model.is_tied else model.head_bytes)
    delay_ms = injected(Fault.LAYER_DELAY_MS)
    layer_bytes = layer.active_bytes + layer.cache.read_bytes(work.decode_context)
    read_bytes_ms = layer_bytes / (layer_ms - delay_ms)
    if head_bytes > layer_bytes and head_ms > 0:  # else a layer's launches cannot be told from its bytes
        read_bytes_ms = max(read_bytes_ms, head_bytes / head_ms)
    launch_ms = layer_ms - layer_bytes / read_bytes_ms
    first_ms, second_ms, _ = (statistics.median(times) for times in zip(*chunks, strict=True))
    chunk_ms = (second_ms - first_ms) / (depths[1] - depths[0]) - launch_ms
    products = layer.active_params + model.num_heads * model.head_dim * work.prompt_tokens  # and attention's
    flops_ms = 2 * work.mean_chunk_tokens * products / max(chunk_ms, 1e-6)
    return Speeds(read_bytes_ms, flops_ms, max(0.0, launch_ms), stage_ms, source="measured")


def main() -> None:
    parser = argparse.ArgumentParser(description="One node's speeds with a model, alone.")
    parser.add_argument("model", type=Path)
    parser.add_argument("--context", type=int, required=True)
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    print(json.dumps(asdict(measure(args.model, args.context, args.rounds))))


if __name__ == "__main__":
    main()
