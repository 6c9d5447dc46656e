"""Checkpoints of large models with headers but only zeros behind them, and clusters to plan them on.

    python -m tests.big_shapes FOLDER            writes all of them, with a cluster file for each cluster
    python -m tests.big_shapes FOLDER --time     also times plan-dry-run on each, as a process
    python -m tests.big_shapes FOLDER --picture docs/plan.svg    draws the example of the documents, no more

Names and shapes are those of mlx-lm's own model classes, made lazily and quantised as `mlx_lm.convert` does:
no weight is made, read or fetched, and the files are holes. The configs have the shapes of
Qwen/Qwen3-1.7B, zai-org/GLM-4.7-Flash, Qwen/Qwen3-235B-A22B and deepseek-ai/DeepSeek-V3 as they are known
from mlx-lm's defaults, converted copies and reports; they are not those models' own files, without token ids,
dtype and what training alone reads.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten
from mlx_lm.utils import quantize_model

from planner.headers import DTYPE_BITS
from tests.fake_models import Tensors, write_model

GB = 10**9
FILE_BYTES = 5 * GB  # of one safetensors file, as mlx-lm writes them
_DTYPES = {mx.bfloat16: "BF16", mx.float16: "F16", mx.float32: "F32", mx.uint32: "U32", mx.uint8: "U8"}
# fmt: off
_QWEN3_SMALL: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "head_dim": 128, "hidden_act": "silu",
    "hidden_size": 2048, "intermediate_size": 6144, "max_position_embeddings": 40960,
    "max_window_layers": 28, "model_type": "qwen3", "num_attention_heads": 16, "num_hidden_layers": 28,
    "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000,
    "sliding_window": None, "tie_word_embeddings": True, "use_sliding_window": False, "vocab_size": 151936,
}
_GLM_FLASH: dict[str, Any] = {
    "architectures": ["Glm4MoeLiteForCausalLM"], "attention_bias": False, "hidden_act": "silu",
    "hidden_size": 2048, "intermediate_size": 10240, "max_position_embeddings": 202752,
    "model_type": "glm4_moe_lite", "moe_intermediate_size": 1536, "topk_method": "noaux_tc",
    "norm_topk_prob": True, "num_attention_heads": 20, "n_group": 1, "topk_group": 1,
    "n_routed_experts": 64, "n_shared_experts": 1, "routed_scaling_factor": 1.8, "num_experts_per_tok": 4,
    "first_k_dense_replace": 1, "num_hidden_layers": 47, "num_key_value_heads": 20,
    "num_nextn_predict_layers": 1, "partial_rotary_factor": 1.0, "rms_norm_eps": 1e-05,
    "rope_scaling": None, "rope_theta": 1000000, "tie_word_embeddings": False, "q_lora_rank": 768,
    "kv_lora_rank": 512, "qk_nope_head_dim": 192, "qk_rope_head_dim": 64, "v_head_dim": 256,
    "vocab_size": 154880,
}
_QWEN3_LARGE: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "decoder_sparse_step": 1,
    "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 12288,
    "max_position_embeddings": 40960, "max_window_layers": 94, "mlp_only_layers": [],
    "model_type": "qwen3_moe", "moe_intermediate_size": 1536, "norm_topk_prob": True,
    "num_attention_heads": 64, "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 94,
    "num_key_value_heads": 4, "output_router_logits": False, "rms_norm_eps": 1e-06, "rope_scaling": None,
    "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "sliding_window": None,
    "tie_word_embeddings": False, "use_sliding_window": False, "vocab_size": 151936,
}
_DEEPSEEK: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "aux_loss_alpha": 0.001,
    "ep_size": 1, "first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168,
    "intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 163840,
    "model_type": "deepseek_v3", "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8,
    "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 128,
    "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1, "pretraining_tp": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06, "rope_scaling": {"beta_fast": 32, "beta_slow": 1,
    "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096,
    "type": "yarn"}, "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid",
    "seq_aux": True, "tie_word_embeddings": False, "topk_group": 4, "topk_method": "noaux_tc",
    "v_head_dim": 128, "vocab_size": 129280,
}
# fmt: on


@dataclass(frozen=True, slots=True)
class Shape:
    """A model. bits: None is bf16. is_stacked: False writes each expert's tensors alone."""

    config: dict[str, Any]
    bits: int | None = None
    is_stacked: bool = True


PUBLISHED = (_QWEN3_SMALL, _GLM_FLASH, _QWEN3_LARGE, _DEEPSEEK)
SHAPES: dict[str, Shape] = {
    "Qwen3-1.7B-8bit": Shape(_QWEN3_SMALL, 8),
    "GLM-4.7-Flash-4bit": Shape(_GLM_FLASH, 4),
    "GLM-4.7-Flash-bf16": Shape(_GLM_FLASH, is_stacked=False),
    "Qwen3-235B-A22B-4bit": Shape(_QWEN3_LARGE, 4),
    "DeepSeek-V3-4bit": Shape(_DEEPSEEK, 4),
    "DeepSeek-V3-bf16": Shape(_DEEPSEEK, is_stacked=False),
}
# name: (memory in GB, chip, GPU cores) of each Mac
CLUSTERS: dict[str, tuple[tuple[int, str, int], ...]] = {
    "minis": ((16, "M4", 10),) * 3,
    "desk": ((64, "M4 Pro", 20), (64, "M1 Max", 32), (16, "M4", 10)),
    "studios": ((192, "M2 Ultra", 76),) * 4,
    "ultras": ((512, "M3 Ultra", 80),) * 5,
    "mixed": ((512, "M3 Ultra", 80), (128, "M4 Max", 40), (16, "M4", 10), (16, "M4", 10)),
    "many": (
        *((128, "M4 Max", 40), (192, "M2 Ultra", 60), (96, "M3 Ultra", 60), (64, "M4 Pro", 20)),
        *((128, "M3 Max", 40), (64, "M1 Max", 32), (64, "M2 Max", 38), (24, "M4", 10)),
    ),
}
# Each shape on a cluster that holds it.
CASES = (
    *(("Qwen3-1.7B-8bit", "minis"), ("GLM-4.7-Flash-4bit", "minis"), ("GLM-4.7-Flash-4bit", "desk")),
    *(("GLM-4.7-Flash-bf16", "desk"), ("Qwen3-235B-A22B-4bit", "studios"), ("Qwen3-235B-A22B-4bit", "mixed")),
    *(("Qwen3-235B-A22B-4bit", "many"), ("DeepSeek-V3-4bit", "studios"), ("DeepSeek-V3-4bit", "mixed")),
    *(("DeepSeek-V3-4bit", "many"), ("DeepSeek-V3-bf16", "ultras")),
)


def write_shape(name: str, folder: Path) -> Path:
    """The model folder, of files of at most FILE_BYTES unless one tensor is larger; returns it."""
    config, tensors = _converted(SHAPES[name])
    return write_model(folder, config, *_files(tensors))


def cluster_file(name: str, model: str | Path, **values: Any) -> dict[str, Any]:
    """A cluster file of machines on 10 Gbit/s Ethernet."""
    nodes = [
        {
            "name": f"{chip.lower().replace(' ', '-')}-{rank}",
            "host": f"mac{rank}.local",
            "chip": f"Apple {chip}",
            "gpu_cores": cores,
            "memory_gb": memory_gb,
        }
        for rank, (memory_gb, chip, cores) in enumerate(CLUSTERS[name])
    ]
    return {"model": str(model), "nodes": nodes} | values


def _converted(shape: Shape) -> tuple[dict[str, Any], Tensors]:
    """config.json and the tensors that `mlx_lm.convert` would write; nothing is evaluated."""
    module = import_module(f"mlx_lm.models.{shape.config['model_type']}")
    model: nn.Module = module.Model(module.ModelArgs.from_dict(shape.config))
    keep: Callable[[str], bool] = getattr(model, "cast_predicate", lambda _: True)
    model.set_dtype(mx.bfloat16)
    config = dict(shape.config)
    if shape.bits is not None:
        predicate = getattr(model, "quant_predicate", None)
        with contextlib.redirect_stdout(io.StringIO()):  # it says how many bits a weight has
            model, config = quantize_model(model, config, 64, shape.bits, quant_predicate=predicate)
    found = {
        name: (("BF16" if keep(name) else "F32") if x.dtype == mx.bfloat16 else _DTYPES[x.dtype], x.shape)
        for name, x in tree_flatten(model.parameters())
    }
    return config, found if shape.is_stacked else dict(_unstacked(found))


def _unstacked(tensors: Tensors) -> Iterator[tuple[str, tuple[str, tuple[int, ...]]]]:
    for name, (dtype, shape) in tensors.items():
        if ".switch_mlp." not in name:
            yield name, (dtype, shape)
            continue
        for expert in range(shape[0]):
            yield name.replace("switch_mlp", f"experts.{expert}"), (dtype, shape[1:])


def _files(tensors: Tensors) -> list[Tensors]:
    files: list[dict[str, tuple[str, tuple[int, ...]]]] = [{}]
    full_bytes = 0
    for name, (dtype, shape) in tensors.items():
        nbytes = math.prod(shape) * DTYPE_BITS[dtype] // 8
        if files[-1] and full_bytes + nbytes > FILE_BYTES:
            files.append({})
            full_bytes = 0
        files[-1][name] = (dtype, shape)
        full_bytes += nbytes
    return list(files)


def main(argv: list[str] | None = None) -> int:
    """Write all; with --time print a Markdown table of times, the least of three each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--time", action="store_true", help="time plan-dry-run as a process")
    parser.add_argument("--picture", type=Path, metavar="FILE.svg", help="draw one plan")
    args = parser.parse_args(argv)
    if args.picture is not None:
        return _picture(args.folder, args.picture)
    for name in SHAPES:
        if not (args.folder / name).exists():
            write_shape(name, args.folder / name)
    if args.time:
        print("| model | cluster | stages | tok/s | wall s | CPU s |\n| --- | --- | --- | --- | --- | --- |")
    for name, cluster in CASES:
        path = args.folder / f"{name}-{cluster}.json"
        path.write_text(json.dumps(cluster_file(cluster, name), indent=2))
        if args.time:
            print(_timed(name, cluster, path), flush=True)
    return 0


def _picture(folder: Path, picture: Path) -> int:
    """The plan of a model with experts on three minis."""
    name, cluster = CASES[1]
    if not (folder / name).exists():
        write_shape(name, folder / name)
    path = folder / f"{name}-{cluster}.json"
    path.write_text(json.dumps(cluster_file(cluster, name), indent=2))
    command = [sys.executable, "-m", "cluster.dry_run", "--config", str(path), "--plot", str(picture)]
    return subprocess.run(command, check=False).returncode


def _timed(name: str, cluster: str, path: Path) -> str:
    command = [sys.executable, "-m", "cluster.dry_run", "--config", str(path), "--json"]
    walls_s, cpus_s = [], []
    for _ in range(3):
        started_s, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        walls_s.append(time.perf_counter() - started_s)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpus_s.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    plan = json.loads(done.stdout)
    speed, stages = f"{plan['predicted']['decode_tok_s']:.1f}", len(plan["assignments"])
    return f"| {name} | {cluster} | {stages} | {speed} | {min(walls_s):.2f} | {min(cpus_s):.2f} |"


if __name__ == "__main__":
    sys.exit(main())
