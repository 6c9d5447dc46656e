"""A ring on this machine's own device (Metal, CUDA or CPU) against plain mlx-lm: equal tokens, and speed.

    python -m tests.benchmarks.device [--model DIR] [--cuts 9,19] [--tokens 128] [--rounds 3]

Without --model a random model of Qwen3-1.7B's shape in 8 bits is made. Rounds alternate: mlx-lm's
generate_step in a process of its own, then the ring, one user. Where kernels change with the shape, greedy
tokens may part at a near tie: allowed where mlx-lm's own two best logits are closer there than twice the
largest difference that it shows between batches of one and of four on this device.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from proto import head_pb2, head_pb2_grpc, ring_pb2
from tests.ring_processes import NO_GUESSES, RingProcesses

DEMO = Path(__file__).parent.parent.parent / "deploy" / "demo" / "model"
QWEN3_1_7B = {
    "model_type": "qwen3",
    "hidden_size": 2048,
    "num_hidden_layers": 28,
    "intermediate_size": 6144,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
# 10.3 GB in 8 bits
MOE = QWEN3_1_7B | {
    "model_type": "qwen3_moe",
    "num_hidden_layers": 16,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}
PROMPTS = [[40 + (7 * i + 13 * k) % 900 for i in range(64)] for k in range(4)]

REFERENCE = """
import json, sys, time
from pathlib import Path
import mlx.core as mx
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model
model, _ = load_model(Path(sys.argv[1]))
def speed(prompt, count):
    tokens, first = [], 0.0
    for token, _ in generate_step(mx.array(prompt), model, max_tokens=count):
        first = first or time.perf_counter()
        tokens.append(int(token))
    return {"tokens": tokens, "tok_s": (count - 1) / (time.perf_counter() - first)}
def logits(prompt, answer, batch):
    cache, found = make_prompt_cache(model), []
    rows = lambda ids: mx.array([ids] * batch)
    model(rows(prompt[:-1]), cache=cache)
    for token in [prompt[-1], *answer[:-1]]:
        found.append(model(rows([token]), cache=cache)[0, -1].astype(mx.float32))
        mx.eval(found[-1])
    return mx.stack(found)
def ties(prompt, answer):
    one, four = logits(prompt, answer, 1), logits(prompt, answer, 4)
    best = mx.sort(one, axis=-1)[:, -2:]
    return {"gaps": (best[:, 1] - best[:, 0]).tolist(), "bound": 2 * float(mx.abs(one - four).max())}
for line in sys.stdin:
    job = json.loads(line)
    print(json.dumps(ties(*job["ties"]) if "ties" in job else speed(*job["speed"])), flush=True)
print(str(mx.default_device()))
"""


def random_model(directory: Path, shape: dict[str, Any] = QWEN3_1_7B) -> Path:
    """Random weights, 8 bits in groups of 64."""
    import mlx.core as mx
    from mlx import nn
    from mlx.utils import tree_flatten
    from mlx_lm.utils import _get_classes

    model_class, args_class = _get_classes(shape)
    mx.random.seed(1)
    model = model_class(args_class.from_dict(shape))
    model.set_dtype(mx.bfloat16)
    nn.quantize(model, group_size=64, bits=8)
    weights = dict(tree_flatten(model.parameters()))
    for array in weights.values():  # one by one: what they are made of is larger
        mx.eval(array)
    directory.mkdir()
    mx.save_safetensors(str(directory / "model.safetensors"), weights, metadata={"format": "mlx"})
    config = shape | {"quantization": {"group_size": 64, "bits": 8}}
    (directory / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, directory / name)
    return directory


class Reference:
    """mlx-lm in a process that answers one job at a time."""

    def __init__(self, model: Path) -> None:
        environment = {key: value for key, value in os.environ.items() if key != "MLX_DISABLE_COMPILE"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", REFERENCE, str(model)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def ask(self, **job: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer

    def close(self) -> str:
        """Ends it; the name of its device."""
        output, _ = self.process.communicate()
        return output.strip()


def measure(
    model: Path, cuts: Sequence[int], num_tokens: int, rounds: int, devices: Sequence[str] | None = None
) -> dict[str, Any]:
    """Tokens that differ, which of them at a near tie, and tokens per second of both sides."""
    num_layers = json.loads((model / "config.json").read_text())["num_hidden_layers"]
    layers = list(pairwise([0, *cuts, num_layers]))
    reference = Reference(model)
    expected = [reference.ask(speed=[prompt, num_tokens])["tokens"] for prompt in PROMPTS]
    plain, ring_tok_s, answers = [], [], []
    with (
        tempfile.TemporaryDirectory() as directory,
        RingProcesses(
            Path(directory),
            model,
            layers,
            env={"MLX_DISABLE_COMPILE": None},
            devices=devices,
            speculation=NO_GUESSES,
        ) as ring,
    ):
        ring.wait_ok(300.0)
        answers = [ring.tokens(prompt, num_tokens) for prompt in PROMPTS]
        for _ in range(rounds):
            plain.append(reference.ask(speed=[PROMPTS[0], num_tokens])["tok_s"])
            ring_tok_s.append(_ring_speed(ring, num_tokens))
        step_ms = [statistics.median(ring.node_status(r).stats.recent_step_ms) for r in range(len(layers))]
    parted = [
        _parted(reference, prompt, one, other)
        for prompt, one, other in zip(PROMPTS, expected, answers, strict=True)
    ]
    return {
        "stages": len(layers),
        "devices": devices,
        "answers": len(PROMPTS),
        "equal": sum(part is None for part in parted),
        "parted_at_a_near_tie": sum(part is not None and part["gap"] < part["bound"] for part in parted),
        "parted": [part for part in parted if part is not None],
        "mlx_lm_tok_s": statistics.median(plain),
        "ring_tok_s": statistics.median(ring_tok_s),
        "ratio": statistics.median(ring_tok_s) / statistics.median(plain),
        "stage_ms": step_ms,
        "device": reference.close(),
    }


def _ring_speed(ring: RingProcesses, num_tokens: int) -> float:
    """Tokens per second after the first."""
    first = 0.0
    request = head_pb2.GenerateRequest(prompt=PROMPTS[0], max_tokens=num_tokens, sampling=ring_pb2.Sampling())
    with ring.channel() as channel:
        for _ in head_pb2_grpc.HeadStub(channel).Generate(request, timeout=300.0):
            first = first or time.perf_counter()
    return (num_tokens - 1) / (time.perf_counter() - first)


def _parted(
    reference: Reference, prompt: list[int], expected: list[int], got: list[int]
) -> dict[str, float] | None:
    """Where two answers part, with mlx-lm's own gap there; None where they are equal."""
    index = next((i for i, (a, b) in enumerate(zip(expected, got, strict=True)) if a != b), None)
    if index is None:
        return None
    ties = reference.ask(ties=[prompt, expected])
    return {"index": index, "gap": ties["gaps"][index], "bound": ties["bound"]}


def main() -> None:
    parser = argparse.ArgumentParser(description="A ring on this device against plain mlx-lm.")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--cuts", default="", help="layers to cut before, as 9,19; several rings: 9,19/14/")
    parser.add_argument("--devices", default="", help="of the stages, as gpu,cpu")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        model = args.model or random_model(Path(directory) / "model")
        devices = args.devices.split(",") if args.devices else None
        for cuts in args.cuts.split("/"):
            places = [int(c) for c in cuts.split(",") if c]
            found = measure(model, places, args.tokens, args.rounds, devices)
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
