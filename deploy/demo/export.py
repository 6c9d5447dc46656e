"""Write the demo model's folders: the float32 checkpoint, and its 8-bit form with a measured README.

`python -m deploy.demo.export --work build/demo --out deploy/demo/model` repeats the second half of train.py.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx import nn
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model
from tokenizers import Tokenizer

from deploy.demo.card import render
from deploy.demo.corpus import END_OF_TEXT, END_OF_TEXT_ID, Corpus
from deploy.demo.trigram import Trigram

SHARD_BYTES = {"float32": 14_000_000, "8-bit": 4_000_000}
QUANTIZATION = {"group_size": 64, "bits": 8, "mode": "affine"}

# A base model knows no roles: contents are joined as lines of one Python file, a system message as a comment.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message.content is string -%}{%- set text = message.content -%}"
    "{%- else -%}{%- set text = message.content | map(attribute='text') | join('') -%}{%- endif -%}"
    "{%- if message.role == 'system' -%}{{ '# ' + text | replace('\n', '\n# ') + '\n' }}"
    "{%- else -%}{{ text + '\n' }}{%- endif -%}"
    "{%- endfor -%}"
)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def write_checkpoint(
    out: Path, weights: dict[str, mx.array], config: dict[str, Any], tokenizer: Tokenizer, shard_bytes: int
) -> None:
    """A Hugging Face folder: weights in order, in files of at most `shard_bytes`, with their index."""
    out.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, mx.array]] = [{}]
    size = 0
    for name, array in weights.items():
        if shards[-1] and size + array.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = array
        size += array.nbytes
    for stale in out.glob("model*.safetensors"):
        stale.unlink()
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        mx.save_safetensors(str(out / file), shard, metadata={"format": "mlx"})
        weight_map |= dict.fromkeys(shard, file)
    total = sum(array.nbytes for array in weights.values())
    _write_json(
        out / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
    )
    _write_json(out / "config.json", config)
    _write_json(
        out / "generation_config.json", {"eos_token_id": END_OF_TEXT_ID, "pad_token_id": END_OF_TEXT_ID}
    )
    tokenizer.save(str(out / "tokenizer.json"), pretty=False)
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "model_max_length": config["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    _write_json(out / "tokenizer_config.json", tokenizer_config)


def write_float32(
    out: Path, weights: dict[str, mx.array], config: dict[str, Any], tokenizer: Tokenizer
) -> None:
    ordered = {name: weights[name].astype(mx.float32) for name in sorted(weights, key=_place)}
    write_checkpoint(out, ordered, config, tokenizer, SHARD_BYTES["float32"])


def _place(name: str) -> tuple[int, str]:
    """Embedding, layers by number, final norm: the order in which a token meets them."""
    parts = name.split(".")
    if parts[1] == "layers":
        return int(parts[2]), name
    return (-1, name) if parts[1] == "embed_tokens" else (10**6, name)


def perplexity(model: nn.Module, tokens: npt.NDArray[np.uint16], context: int) -> float:
    """Per token, over disjoint windows of `context` predictions; the last, shorter window is dropped."""
    total, count = 0.0, (len(tokens) - 1) // context
    for number in range(count):
        window = mx.array(tokens[number * context : (number + 1) * context + 1].astype(np.int32))[None]
        logits = model(window[:, :-1])
        total += nn.losses.cross_entropy(logits, window[:, 1:], reduction="sum").item()
    return math.exp(total / (count * context))


def write_model(out: Path, float32: Path, work: Path, eval_tokens: int | None = None) -> None:
    """Quantise the checkpoint in `float32` into `out`; measure both on held-out text; write the README.

    Only the router stays float32: 8 outputs per layer are too few for quantised kernels to be worth it.
    """
    model, config = load_model(float32)
    nn.quantize(
        model,
        group_size=QUANTIZATION["group_size"],
        bits=QUANTIZATION["bits"],
        class_predicate=lambda path, module: (
            hasattr(module, "to_quantized") and not path.endswith("mlp.gate")
        ),
    )
    weights = dict(tree_flatten(model.parameters()))
    config = {**config, "quantization": QUANTIZATION, "quantization_config": QUANTIZATION}
    tokenizer = Tokenizer.from_file(str(float32 / "tokenizer.json"))
    ordered = {name: weights[name] for name in sorted(weights, key=_place)}
    write_checkpoint(out, ordered, config, tokenizer, SHARD_BYTES["8-bit"])

    corpus = Corpus.load(work / "corpus.npz")
    held_out = corpus.held_out[:eval_tokens]
    facts = {**corpus.facts, **json.loads((work / "training.json").read_text())}
    original = load_model(float32)[0]
    facts["num_parameters"] = sum(array.size for _, array in tree_flatten(original.parameters()))
    facts["num_train_tokens"], facts["num_held_out_tokens"] = len(corpus.train), len(held_out)
    for name, folder in (("float32", float32), ("8-bit", out)):
        facts[name] = perplexity(load_model(folder)[0], held_out, context=1024)
        print(f"{name}: held-out perplexity {facts[name]:.3f}", flush=True)
    facts["trigram"] = Trigram(corpus.train_files, config["vocab_size"]).perplexity(held_out)
    print(f"trigram: held-out perplexity {facts['trigram']:.3f}")
    facts["bytes_per_token"] = facts["held_out_bytes"] / len(corpus.held_out)
    _write_json(work / "figures.json", facts)
    (out / "README.md").write_text(render(facts))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m deploy.demo.export")
    parser.add_argument("--work", type=Path, default=Path("build/demo"), help="what train.py wrote")
    parser.add_argument("--float32", type=Path, help="the unquantised checkpoint (default: WORK/float32)")
    parser.add_argument("--out", type=Path, required=True, help="the 8-bit model folder to write")
    parser.add_argument("--eval-tokens", type=int, help="measure on so many held-out tokens (default: all)")
    args = parser.parse_args(arguments)
    write_model(args.out, args.float32 or args.work / "float32", args.work, args.eval_tokens)


if __name__ == "__main__":
    main()
