"""How steady `macrame profile` is, and how well a plan made from it predicts mlx-lm's own decode step.

    python -m tests.benchmarks.profile --runs 5      the spread of each figure over whole runs
    python -m tests.benchmarks.profile --decode      predicted and measured ms of a step, by precision
    python -m tests.benchmarks.profile --formats bfloat16,exl3/3     ms of a product of 2^19 weights

The model is random, of about 220 million parameters, half of its context cached; it is written to a temporary
folder, because a prediction starts from headers. One thread.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

CONTEXT = 1024
NUM_STEPS = 7
PRECISIONS = ("float32", "bfloat16", "affine8/64", "affine4/64", "mxfp4")
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 1024,
    "num_hidden_layers": 10,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "rms_norm_eps": 1e-5,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
    "max_position_embeddings": CONTEXT,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--runs", type=int, default=0)
    parser.add_argument("--decode", action="store_true")
    parser.add_argument("--formats", default="")
    args = parser.parse_args()
    if args.formats:
        print_products(args.formats.split(","))
    if args.runs:
        print_spread(args.runs)
    if args.decode:
        print_decode()


def print_spread(num_runs: int) -> None:
    """(largest - smallest) / middle of each figure."""
    command = [sys.executable, "-m", "deploy.cli", "profile", "--json", "--no-save"]
    found = [
        json.loads(subprocess.run(command, capture_output=True, check=True).stdout) for _ in range(num_runs)
    ]
    took = [run["took_s"] for run in found]
    print(f"{num_runs} runs of {min(took):.1f} to {max(took):.1f} s\n")
    print("| figure | smallest | middle | largest | spread |\n| --- | --- | --- | --- | --- |")
    figures: dict[str, list[float]] = {}
    for run in found:
        raw, speeds = run["raw"], run["speeds"]
        for key in ("read_bytes_ms", "layer_ms", "stage_ms"):
            figures.setdefault(key, []).append(speeds[key])
        figures.setdefault("copy_bytes_ms", []).append(raw["copy_bytes_ms"])
        figures.setdefault("disk bytes_ms", []).append(raw["disk"]["bytes_ms"])
        for p in raw["products"]:
            weights_ms = p["rows"] * p["num_weights"] / p["ms"]
            figures.setdefault(f"{p['format']} x {p['rows']}, weights a ms", []).append(weights_ms)
    for name, values in figures.items():
        low, middle, high = min(values), median(values), max(values)
        print(f"| {name} | {low:.3g} | {middle:.3g} | {high:.3g} | {(high - low) / middle:.0%} |")


def print_products(names: list[str]) -> None:
    """A profile of these formats alone."""
    from cluster import profile_machine
    from cluster.profile_timing import FULL

    vars(profile_machine).update(MAIN_FORMATS=tuple(names), OTHER_FORMATS=())
    with tempfile.TemporaryDirectory() as folder:
        measured = profile_machine.measure_machine(
            FULL, available_bytes=4 << 30, disk_folder=Path(folder), say=lambda _: None
        )
    rows = sorted({product.rows for product in measured.products})
    print(f"| format | {' | '.join(f'{count} rows' for count in rows)} |\n| --- |{' --- |' * len(rows)}")
    for name in names:
        ms = {p.rows: p.ms * (1 << 19) / p.num_weights for p in measured.products if p.format == name}
        print(f"| {name} | {' | '.join(f'{ms[count]:.1f} ms' if count in ms else '' for count in rows)} |")


def print_decode() -> None:
    """A profile, the steps, and what the cost model makes of the profile."""
    from cluster.probe import seen_machine
    from cluster.profile_machine import measure_machine
    from cluster.profile_timing import FULL

    node = seen_machine()
    with tempfile.TemporaryDirectory() as folder:
        measured = measure_machine(
            FULL, available_bytes=node.memory_bytes // 2, disk_folder=Path(folder), say=lambda _: None
        )
        node = replace(node, measured=measured.speeds)
        print("| precision | by the chip table | predicted ms | wall ms | processor ms | ratio |")
        print("| --- | --- | --- | --- | --- | --- |")
        for precision in PRECISIONS:
            step, path = make_step(precision, Path(folder) / precision.replace("/", "-"))
            wall_ms, processor_ms = time_step(step)
            expected_ms = predicted_ms(path, node)
            unmeasured_ms = predicted_ms(path, replace(node, measured=None))
            times = (unmeasured_ms, expected_ms, wall_ms, processor_ms)
            cells = (precision, *(f"{ms:.1f}" for ms in times), f"{expected_ms / processor_ms:.2f}")
            print(f"| {' | '.join(cells)} |", flush=True)


def time_step(step: Callable[[], None]) -> tuple[float, float]:
    """The shortest of NUM_STEPS, by the clock and by the processor's time.

    On a CPU the second leaves out what other programs took away meanwhile; on a GPU it says little.
    """
    step()
    wall_ms, processor_ms = [], []
    for _ in range(NUM_STEPS):
        wall, processor = time.perf_counter(), time.process_time()
        step()
        processor_ms.append((time.process_time() - processor) * 1e3)
        wall_ms.append((time.perf_counter() - wall) * 1e3)
    return min(wall_ms), min(processor_ms)


def predicted_ms(folder: Path, node: Any) -> float:
    """decode_ms of the whole model on one node."""
    from planner.cost import CostModel
    from planner.model_profile import read_model_profile
    from planner.workload import Workload

    model = read_model_profile(folder, "random")
    return CostModel(model, [node], (), Workload(CONTEXT, 1)).decode_ms(0, 0, model.num_layers)


def make_step(precision: str, folder: Path) -> tuple[Callable[[], None], Path]:
    """One greedy decode step at half the context; the checkpoint is written to `folder`."""
    import mlx.core as mx
    from mlx import nn
    from mlx.utils import tree_flatten
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.models.llama import Model, ModelArgs

    mx.random.seed(0)
    model = Model(ModelArgs.from_dict(CONFIG))
    model.set_dtype(mx.float32 if precision == "float32" else mx.bfloat16)
    config = dict(CONFIG)
    if precision not in ("float32", "bfloat16"):
        how = _packing(precision)
        nn.quantize(model, **how)
        config["quantization"] = how
    mx.eval(model.parameters())
    folder.mkdir()
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    (folder / "config.json").write_text(json.dumps(config))
    caches = make_prompt_cache(model)
    dtype = model.model.norm.weight.dtype
    for cache in caches:
        shape = (1, CONFIG["num_key_value_heads"], CONTEXT // 2, CONFIG["head_dim"])
        cache.update_and_fetch(mx.random.normal(shape).astype(dtype), mx.random.normal(shape).astype(dtype))
    mx.eval([cache.state for cache in caches])
    token = mx.array([[7]])

    def step() -> None:
        for cache in caches:
            cache.offset = CONTEXT // 2
        mx.eval(mx.argmax(model(token, cache=caches)[:, -1], axis=-1))

    return step, folder


def _packing(precision: str) -> dict[str, Any]:
    if precision == "mxfp4":
        return {"bits": 4, "group_size": 32, "mode": "mxfp4"}
    bits, group_size = precision.removeprefix("affine").split("/")
    return {"bits": int(bits), "group_size": int(group_size)}


if __name__ == "__main__":
    main()
