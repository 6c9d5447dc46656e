"""What work costs that is too small to count: launching a layer's kernels, waking a stage; and a copy. MLX.

For the thread that owns MLX.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models.llama import Model, ModelArgs

from cluster.engine import Engine
from proto import ring_pb2
from shard_loader.carry import to_wire
from shard_loader.weights import load_shard

FEW_LAYERS, MANY_LAYERS = 4, 20
NUM_WAKES = 10
_CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": MANY_LAYERS,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "rms_norm_eps": 1e-5,
    "vocab_size": 64,
    "max_position_embeddings": 1 << 20,
}


def step_cases(folder: Path) -> dict[str, Callable[[], None]]:
    """One token through FEW_LAYERS and MANY_LAYERS tiny layers, as a stage of a ring computes it.

    The weights are so small that launching is all there is to do; building the graph in Python, the frame and
    the sampler count, as they do in a ring. The difference of the two, over the layers between, is what one
    layer costs; what is left of one is the stage's. `folder` takes the tiny model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(_CONFIG))
    model = Model(ModelArgs.from_dict(_CONFIG))
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    return {_name(num): _step_case(folder, num) for num in (FEW_LAYERS, MANY_LAYERS)}


def layer_ms(ms: Mapping[str, float]) -> float:
    """One layer's part of the times of `step_cases`, never below 0."""
    return max(0.0, (ms[_name(MANY_LAYERS)] - ms[_name(FEW_LAYERS)]) / (MANY_LAYERS - FEW_LAYERS))


def stage_ms(ms: Mapping[str, float]) -> float:
    """The stage's part of the times of `step_cases`, never below 0."""
    return max(0.0, ms[_name(FEW_LAYERS)] - FEW_LAYERS * layer_ms(ms))


def _name(num_layers: int) -> str:
    return f"{num_layers} layers"


def _step_case(folder: Path, num_layers: int) -> Callable[[], None]:
    engine = Engine(load_shard(folder, MANY_LAYERS - num_layers, MANY_LAYERS))
    carry = [] if num_layers == MANY_LAYERS else [mx.zeros((1, 1, _CONFIG["hidden_size"]))]
    mx.eval(carry)
    sent = [to_wire(array) for array in carry]
    position = 0

    def run() -> None:
        nonlocal position
        frame = ring_pb2.Frame(kind=ring_pb2.STEP, epoch=1, seq=position + 1)
        if not position:
            frame.opens.add(session=1, prompt_tokens=1, max_tokens=_CONFIG["max_position_embeddings"])
        frame.slots.add(session=1, position=position, tokens=[1], is_sampled=True, num_tensors=len(sent))
        position += 1
        output = engine.step(frame, sent)
        if output is None or output[0].slots[0].error:
            raise RuntimeError(f"a tiny model of {num_layers} layers does not run on this device")

    return run


def wake_case() -> Callable[[], None]:
    """NUM_WAKES times to another thread and back, as a frame comes in and a result goes out."""
    other = ThreadPoolExecutor(1)

    def run() -> None:
        for _ in range(NUM_WAKES):
            other.submit(int).result()

    return run


def copy_case(num_bytes: int) -> Callable[[], None]:
    """Reads num_bytes and writes as many."""
    a = mx.ones((num_bytes // 4,), dtype=mx.float32)
    mx.eval(a)

    def run() -> None:
        mx.eval(mx.negative(a))

    return run
