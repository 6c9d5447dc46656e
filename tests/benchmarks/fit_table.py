"""The tables of docs/memory.md: `macrame fit` on the shapes of published models.

    python -m tests.benchmarks.fit_table [--names Qwen3-32B] [--memory 16GB 32GB] [--kv-bits 8]

Writes for each model a folder with its config.json and safetensors headers in front of a hole in the file
system (mlx-lm builds the modules, nothing is evaluated), and asks `macrame fit --json` about it.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import tempfile
from pathlib import Path
from typing import Any

from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes

from deploy.fit import main as fit_main
from tests.fake_models import write_model

_LLAMA = {
    "model_type": "llama",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 131072,
    "vocab_size": 128256,
    "head_dim": 128,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}
_QWEN3 = {
    "model_type": "qwen3",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "max_position_embeddings": 40960,
    "vocab_size": 151936,
    "head_dim": 128,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}
_QWEN3_MOE = _QWEN3 | {
    "model_type": "qwen3_moe",
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_key_value_heads": 4,
}


def _shape(layers: int, hidden: int, width: int, heads: int) -> dict[str, int]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": width,
        "num_attention_heads": heads,
    }


# The dimensions are those of the models' published config.json files.
MODELS: dict[str, dict[str, Any]] = {
    "Qwen3-1.7B": _QWEN3 | _shape(28, 2048, 6144, 16) | {"tie_word_embeddings": True},
    "Llama-3.1-8B": _LLAMA | _shape(32, 4096, 14336, 32),
    "Qwen3-14B": _QWEN3 | _shape(40, 5120, 17408, 40),
    "Qwen3-32B": _QWEN3 | _shape(64, 5120, 25600, 64),
    "Llama-3.3-70B": _LLAMA | _shape(80, 8192, 28672, 64),
    "Qwen3-30B-A3B": _QWEN3_MOE | _shape(48, 2048, 6144, 32) | {"moe_intermediate_size": 768},
    "Qwen3-235B-A22B": _QWEN3_MOE | _shape(94, 4096, 12288, 64) | {"moe_intermediate_size": 1536},
}


def headers_only(name: str, folder: Path) -> Path:
    """A model folder of bfloat16 headers, without weights."""
    config = MODELS[name]
    model_class, args_class = _get_classes(config=config)
    parameters = tree_flatten(model_class(args_class.from_dict(config)).parameters())
    return write_model(
        folder / name, config, {path: ("BF16", tuple(value.shape)) for path, value in parameters}
    )


def ask(folder: Path, *arguments: str) -> dict[str, Any]:
    """What `macrame fit --json` prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        fit_main(["--model", str(folder), "--json", *arguments])
    return dict(json.loads(printed.getvalue()))


def sizes(folders: dict[str, Path]) -> list[str]:
    """Weights by precision."""
    lines = []
    for name, folder in folders.items():
        found = {p["precision"]: p for p in ask(folder, "--memory", "16GB")["precisions"]}
        if not lines:
            lines = [_row("model", *list(found)[1:]), _row(*["---"] * len(found))]
        lines.append(_row(name, *(_gb(p["weight_bytes"]) for key, p in found.items() if key != "as stored")))
    return lines


def limits(folders: dict[str, Path], memory: list[str], precision: str, *more: str) -> list[str]:
    """Largest context of one request / most requests of 8192 tokens, by the machine's memory."""
    lines = [_row(f"{precision}", *memory), _row(*["---"] * (len(memory) + 1))]
    for name, folder in folders.items():
        cells = []
        for size in memory:
            answer = ask(folder, "--memory", size, *more)
            found = next(p for p in answer["precisions"] if p["precision"] == precision)
            cells.append(
                f"{found['max_context']} / {found['max_concurrency']}" if found["max_context"] else "-"
            )
        lines.append(_row(name, *cells))
    return lines


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f}" if nbytes < 10e9 else f"{nbytes / 1e9:.1f}"


def main() -> None:
    """Print Markdown."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--names", default=",".join(MODELS))
    parser.add_argument("--memory", nargs="+", default=["16GB", "32GB", "64GB", "128GB"])
    parser.add_argument("--precisions", default="4 bit,8 bit")
    args, more = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as directory:
        folders = {name: headers_only(name, Path(directory)) for name in args.names.split(",")}
        print("\n".join(sizes(folders)))
        for precision in args.precisions.split(","):
            print("\n" + "\n".join(limits(folders, args.memory, precision, *more)))


if __name__ == "__main__":
    main()
