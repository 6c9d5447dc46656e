"""How long loading a shard takes and how much memory it needs at its peak, on random checkpoints.

    python -m tests.benchmarks.load [--models llama,mixtral] [--gb 0.8] [--rounds 5] [--quantize affine]

Each load is a process of its own, in turns: `mx.load` + `mx.eval` of the same tensors ("plain"), a load
without the shard cache, one that writes it ("first") and one that finds it ("second"). Files are in the page
cache. Time is from the first look at the files to the last evaluated tensor; the warm-up pass that follows is
counted apart. Peak: the largest resident set above what the process held after its imports, over the
bytes of the shard; it includes the warm-up. Experts are one tensor each, as Hugging Face stores them, in
float32 where they are not quantised: MLX's CPU backend computes with no other.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

NUM_LAYERS = 12
SHARD = (2, 10)
EXPERTS = {"llama": 1, "mixtral": 8, "qwen2_moe": 16, "olmoe": 32}

CHILD = """
import json, sys, time
from pathlib import Path
import mlx.core as mx
from cluster.usage import peak_rss_bytes as peak
from planner.headers import read_headers
from planner.load_options import LoadOptions, Quantization
from shard_loader import weights
from shard_loader.shard_cache import CacheSettings
task = json.loads(sys.argv[1])
folder = Path(task["folder"])
options = LoadOptions(None if task["quantize"] is None else Quantization.of(task["quantize"]))
cache = None if task["cache"] is None else CacheSettings(Path(task["cache"]), True)
done_at = [0.0]
warm_up = weights.Shard.warm_up
def timed(shard):
    done_at[0] = time.perf_counter()
    warm_up(shard)
weights.Shard.warm_up = timed
base, started = peak(), time.perf_counter()
if task["how"] == "plain":
    wanted = set(task["tensors"])
    arrays = []
    for file in sorted({h.file for h in read_headers(folder).values()}):
        arrays += [a for n, a in mx.load(str(folder / file)).items() if n in wanted]
    mx.eval(arrays)
    done_at[0] = time.perf_counter()
    nbytes = sum(a.nbytes for a in arrays)
else:
    nbytes = weights.load_shard(folder, *task["layers"], options=options, cache=cache).footprint.total_bytes
print(json.dumps({"s": done_at[0] - started, "warm_up_s": time.perf_counter() - done_at[0],
                  "bytes": nbytes, "peak": (peak() - base) / nbytes}))
"""


def write(model: str, folder: Path, size_gb: float, dtype: str) -> None:
    """A random checkpoint of about `size_gb`, in a process that is then gone."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    from tests.tiny_models import build

    hidden, experts = 1024, EXPERTS[model]
    item_bytes = 4 if dtype == "float32" else 2
    width = int(size_gb * 1e9 / item_bytes / NUM_LAYERS / 3 / hidden / experts) // 64 * 64
    config: dict[str, Any] = {
        "model_type": model,
        "hidden_size": hidden,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "max_position_embeddings": 4096,
        "torch_dtype": dtype,
        "intermediate_size": width,
        "num_experts_per_tok": 2,
        "num_experts": experts,
        "num_local_experts": experts,
        "moe_intermediate_size": width,
        "shared_expert_intermediate_size": 256,
    }
    names = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"} if model == "mixtral" else {}
    out: dict[str, mx.array] = {}
    for name, value in tree_flatten(build(config, dtype=getattr(mx, dtype)).parameters()):
        if ".switch_mlp." not in name:
            out[name] = value
            continue
        prefix, rest = name.split(".switch_mlp.")
        part, leaf = rest.rsplit(".", 1)
        for i in range(value.shape[0]):
            out[f"{prefix}.experts.{i}.{names.get(part, part)}.{leaf}"] = value[i]
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(folder / "model.safetensors"), out)


def run(folder: Path, how: str, tensors: list[str], quantize: str | None, cache: Path | None) -> Any:
    """One load in a process of its own."""
    task = {
        "folder": str(folder),
        "how": how,
        "tensors": tensors,
        "quantize": quantize,
        "layers": SHARD,
        "cache": None if cache is None else str(cache),
    }
    done = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(task)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout)


def measure(folder: Path, rounds: int, quantize: str | None) -> dict[str, Any]:
    """All ways in turns; the best time and the smallest peak of each."""
    from planner.headers import read_headers

    layers = [f".layers.{i}." for i in range(*SHARD)]
    tensors = [name for name in read_headers(folder) if any(layer in name for layer in layers)]
    cache = folder.parent / "cache"
    found: dict[str, list[Any]] = {"plain": [], "no_cache": [], "first": [], "second": []}
    for _ in range(rounds):
        shutil.rmtree(cache, ignore_errors=True)
        for how, results in found.items():
            kept = cache if how in ("first", "second") else None
            results.append(run(folder, how, tensors, quantize, kept))
    best = {how: min(result["s"] for result in results) for how, results in found.items()}
    peak = {how: round(min(result["peak"] for result in results), 3) for how, results in found.items()}
    return {
        "plain_bytes": found["plain"][0]["bytes"],
        "shard_bytes": found["no_cache"][0]["bytes"],
        "s": {how: round(value, 3) for how, value in best.items()},
        "warm_up_s": round(min(result["warm_up_s"] for result in found["no_cache"]), 3),
        "load_to_plain": round(best["no_cache"] / best["plain"], 2),
        "first_to_second": round(best["first"] / best["second"], 2),
        "no_cache_to_second": round(best["no_cache"] / best["second"], 2),
        "peak": peak,
    }


def main() -> None:
    """Print one JSON object a line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", default=",".join(EXPERTS))
    parser.add_argument("--gb", type=float, default=0.8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quantize", choices=("affine", "mxfp4", "mxfp8", "nvfp4"))
    parser.add_argument("--write", nargs=2, metavar=("FOLDER", "DTYPE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.write:
        write(args.models, Path(args.write[0]), args.gb, args.write[1])
        return
    for model in args.models.split(","):
        with tempfile.TemporaryDirectory() as directory:
            folder = Path(directory) / model
            dtype = "bfloat16" if args.quantize or model == "llama" else "float32"
            command = [sys.executable, "-m", "tests.benchmarks.load", "--models", model, "--gb", str(args.gb)]
            subprocess.run([*command, "--write", str(folder), dtype], check=True)
            found = measure(folder, args.rounds, args.quantize)
        print(json.dumps({"model": model, "quantize": args.quantize, **found}), flush=True)


if __name__ == "__main__":
    main()
