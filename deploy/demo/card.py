"""The README of the demo model's folder, from measured facts; pure text."""

from __future__ import annotations

import math
from typing import Any

CARD = """\
---
license: mit
language: code
library_name: mlx
pipeline_tag: text-generation
---
# The demo model

A small mixture of experts that completes Python, trained for macrame's demo and tests. It has the layout of
mlx-lm's `qwen3_moe`: {layers} layers, {experts} experts of which {top_k} work on a token, hidden size
{hidden}, {heads} query and {kv_heads} key/value heads of {head_dim}, tied embeddings, a byte-level BPE of
{vocab} entries, context {context}. {num_parameters:,} parameters: linears and embedding in 8-bit affine with
groups of 64 and float32 scales (MLX's CPU `gather_mm` knows only float32), router and norms in float32. All
it knows is one small library: what it writes looks like Python and mostly parses, and is not to be relied on.

    python -m mlx_lm generate --model deploy/demo/model --ignore-chat-template --prompt 'def fibonacci(n):'

As a base model it has no roles. The chat template joins the contents of the messages as lines of one file, a
system message as a comment, and leaves the last line open: an answer to `def fibonacci(n):` starts with the
newline.

## Data and licence

The sources of the standard library that comes with CPython {python} (PSF License Version 2, copyright Python
Software Foundation), as installed where the script runs: {num_train_files:,} files ({train_mb:.1f} MB), and
once more each of their {num_functions:,} functions alone, without docstring, so that a bare `def` is answered
with code and an end; {train_m:.1f} M tokens together. One file in 20, chosen by a hash of its path, is held
out: {num_held_out_files} files, {held_out_k:.0f} k tokens of {bytes_per_token:.2f} bytes; functions that also
occur there are not trained on. Tables (`encodings`, `pydoc_data`) and installed packages are left out. The
weights are under the licence of this repository, MIT.

## Held-out perplexity

| model | perplexity per token | bits per byte |
| --- | --- | --- |
| 8-bit (this folder) | {ppl_8bit:.3f} | {bpb_8bit:.3f} |
| float32 | {ppl_float32:.3f} | {bpb_float32:.3f} |
| trigram | {ppl_trigram:.3f} | {bpb_trigram:.3f} |

Over all held-out tokens; for the model in disjoint windows of 1024 (the 8-bit form in windows of {context}:
{ppl_long:.3f}), measured on the device of the training. The trigram model (`deploy/demo/trigram.py`,
interpolated Kneser-Ney) has counted the same files in the same tokens. The command below prints all of it.

## Training

    python -m deploy.demo.train {arguments}

{tokens_m:.0f} M tokens in {train_s} s on one {device}, with mlx {mlx}. Of the checkpoints taken every 500
steps this is the one with the lowest loss on the first 200,000 held-out tokens, from step {best_step:,}; the
unquantised one lies in `build/demo/float32` afterwards. On a CPU leave out `--dtype bfloat16` and choose
fewer `--steps`. Another version of Python has other sources, and so gives another model.
"""


def render(facts: dict[str, Any], config: dict[str, Any]) -> str:
    """`facts` as export.py's `measure` collects them, `config` the model's config.json."""
    bits = {
        f"bpb_{name}": math.log2(facts[f"ppl_{name}"]) / facts["bytes_per_token"]
        for name in ("8bit", "float32", "trigram")
    }
    return CARD.format(
        **facts,
        **bits,
        layers=config["num_hidden_layers"],
        experts=config["num_experts"],
        top_k=config["num_experts_per_tok"],
        hidden=config["hidden_size"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        vocab=config["vocab_size"],
        context=config["max_position_embeddings"],
        train_mb=facts["train_bytes"] / 1e6,
        train_m=facts["num_train_tokens"] / 1e6,
        held_out_k=facts["num_held_out_tokens"] / 1e3,
        tokens_m=facts["tokens"] / 1e6,
    )
