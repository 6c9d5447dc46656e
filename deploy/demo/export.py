"""Write the demo model's folders: the float32 checkpoint, and its 8-bit form with a measured README.

`python -m deploy.demo.export --work build/demo --out deploy/demo/model` repeats the second half of train.py.
"""

from __future__ import annotations

import argparse
import json
import math
from importlib.metadata import version
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

FLOAT32_SHARD_BYTES = 14_000_000
SHARD_BYTES = 4_000_000
QUANTIZATION = {"group_size": 64, "bits": 8, "mode": "affine"}

# A base model knows no roles: contents are joined as lines of one Python file, a system message as a comment.
# The last line stays open, so that an answer starts with its own newline and no indentation is lost.
CHAT_TEMPLATE = r"""{%- for message in messages -%}
{%- if message.content is string -%}{%- set text = message.content -%}
{%- else -%}{%- set text = message.content | map(attribute='text') | join('') -%}{%- endif -%}
{%- if message.role == 'system' -%}{%- set text = '# ' + text | replace('\n', '\n# ') -%}{%- endif -%}
{{- '' if loop.first else '\n' -}}{{- text -}}
{%- endfor -%}"""


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def _place(name: str) -> tuple[int, str]:
    """Embedding, layers by number, final norm: the order in which a token meets them."""
    parts = name.split(".")
    if parts[1] == "layers":
        return int(parts[2]), name
    return (-1, name) if parts[1] == "embed_tokens" else (10**6, name)


def write_checkpoint(
    out: Path, weights: dict[str, mx.array], config: dict[str, Any], shard_bytes: int
) -> None:
    """config.json, the index, and the weights in the order of use, in files of at most `shard_bytes`."""
    out.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, mx.array]] = [{}]
    size = 0
    for name in sorted(weights, key=_place):
        if shards[-1] and size + weights[name].nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = weights[name]
        size += weights[name].nbytes
    for stale in out.glob("model*.safetensors"):
        stale.unlink()
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        mx.save_safetensors(str(out / file), shard, metadata={"format": "mlx"})
        weight_map |= dict.fromkeys(shard, file)
    total = sum(array.nbytes for array in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_json(out / "model.safetensors.index.json", index)
    _write_json(out / "config.json", config)


def write_tokenizer(out: Path, tokenizer: Tokenizer, context: int) -> None:
    """tokenizer.json, its config with the chat template, and generation_config.json, which names the end."""
    end = {"eos_token_id": END_OF_TEXT_ID, "pad_token_id": END_OF_TEXT_ID}
    _write_json(out / "generation_config.json", end)
    tokenizer.save(str(out / "tokenizer.json"), pretty=False)
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    _write_json(out / "tokenizer_config.json", tokenizer_config)


def write_float32(
    out: Path, weights: dict[str, mx.array], config: dict[str, Any], tokenizer: Tokenizer
) -> None:
    """The unquantised checkpoint, as a folder that mlx-lm loads."""
    write_checkpoint(out, {n: w.astype(mx.float32) for n, w in weights.items()}, config, FLOAT32_SHARD_BYTES)
    write_tokenizer(out, tokenizer, config["max_position_embeddings"])


def quantise(out: Path, float32: Path) -> None:
    """Write the 8-bit form of the checkpoint in `float32` to `out`; scales and biases stay float32.

    So does the router: its 8 outputs per layer are too few for quantised kernels to be worth it.
    """
    model, config = load_model(float32)
    nn.quantize(
        model,
        group_size=QUANTIZATION["group_size"],
        bits=QUANTIZATION["bits"],
        class_predicate=lambda path, layer: hasattr(layer, "to_quantized") and not path.endswith("mlp.gate"),
    )
    config = {**config, "quantization": QUANTIZATION, "quantization_config": QUANTIZATION}
    write_checkpoint(out, dict(tree_flatten(model.parameters())), config, SHARD_BYTES)
    tokenizer = Tokenizer.from_file(str(float32 / "tokenizer.json"))
    write_tokenizer(out, tokenizer, config["max_position_embeddings"])


def held_out_loss(model: nn.Module, tokens: npt.NDArray[np.uint16], context: int, batch: int) -> float:
    """Mean nats per token over disjoint windows of `context` predictions, the last one dropped if shorter."""
    count = (len(tokens) - 1) // context
    offsets = np.arange(count)[:, None] * context + np.arange(context + 1)
    total = 0.0
    for first in range(0, count, batch):
        windows = mx.array(tokens[offsets[first : first + batch]].astype(np.int32))  # (batch, context + 1)
        logits = model(windows[:, :-1]).astype(mx.float32)
        total += nn.losses.cross_entropy(logits, windows[:, 1:], reduction="sum").item()
    return total / (count * context)


def measure(out: Path, float32: Path, work: Path) -> dict[str, Any]:
    """What the README says: facts of corpus and training in `work`, perplexities on all held-out tokens."""
    corpus = Corpus.load(work / "corpus.npz")
    facts = {**corpus.facts, **json.loads((work / "training.json").read_text()), "mlx": version("mlx")}
    original, config = load_model(float32)
    eight_bit, _ = load_model(out)
    facts["num_parameters"] = sum(array.size for _, array in tree_flatten(original.parameters()))
    facts["num_train_tokens"], facts["num_held_out_tokens"] = len(corpus.train), len(corpus.held_out)
    facts["bytes_per_token"] = facts["held_out_bytes"] / len(corpus.held_out)
    facts["ppl_float32"] = math.exp(held_out_loss(original, corpus.held_out, context=1024, batch=4))
    facts["ppl_8bit"] = math.exp(held_out_loss(eight_bit, corpus.held_out, context=1024, batch=4))
    facts["ppl_long"] = math.exp(
        held_out_loss(eight_bit, corpus.held_out, context=config["max_position_embeddings"], batch=4)
    )
    facts["ppl_trigram"] = Trigram(corpus.train_files, config["vocab_size"]).perplexity(corpus.held_out)
    return facts


def write_model(out: Path, float32: Path, work: Path) -> None:
    """Quantise the checkpoint in `float32` into `out`, measure both, write the figures and the README."""
    quantise(out, float32)
    facts = measure(out, float32, work)
    _write_json(work / "figures.json", facts)
    for name in ("ppl_float32", "ppl_8bit", "ppl_long", "ppl_trigram"):
        print(f"{name} {facts[name]:.3f}")
    config = json.loads((out / "config.json").read_text())
    (out / "README.md").write_text(render(facts, config))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m deploy.demo.export")
    parser.add_argument("--work", type=Path, default=Path("build/demo"), help="what train.py wrote")
    parser.add_argument("--float32", type=Path, help="the unquantised checkpoint (default: WORK/float32)")
    parser.add_argument("--out", type=Path, required=True, help="the 8-bit model folder to write")
    args = parser.parse_args(arguments)
    write_model(args.out, args.float32 or args.work / "float32", args.work)


if __name__ == "__main__":
    main()
