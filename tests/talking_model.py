"""A tiny model that says what a test wants, through all its layers: each of its words decides the next one.

The words are tokens of their own. Attention and MLP add nothing, so that what reaches the head is the last
token's embedding, and the head's row of a word is the embedding of the word before it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import mlx.core as mx

from tests.tiny_models import EOS_ID, NUM_BYTES, SPECIALS, VOCAB_SIZE, write_checkpoint
from tests.tool_models import FIRST_ID, write_tokens

SILENT = ("self_attn.o_proj.weight", "mlp.down_proj.weight")


def write_talking_model(
    directory: Path, answers: Mapping[str, Sequence[str]], template: str, *, num_layers: int
) -> Path:
    """A llama that says `answers[token]` after a prompt that ends with this special token, and then ends.

    Each word of the answers must be unique among all of them.
    """
    write_checkpoint("llama", directory, num_layers=num_layers)
    words = [word for answer in answers.values() for word in answer]
    if len({*words}) < len(words) or FIRST_ID + len(words) > VOCAB_SIZE:
        raise ValueError("the words are not unique, or more than the vocabulary holds")
    ids = {word: FIRST_ID + i for i, word in enumerate(words)}
    path = str(directory / "model.safetensors")
    weights = dict(mx.load(path))
    embeddings = mx.sign(mx.random.normal(weights["model.embed_tokens.weight"].shape, key=mx.random.key(1)))
    head = mx.zeros(weights["lm_head.weight"].shape)
    for last, answer in answers.items():
        chain = [NUM_BYTES + SPECIALS.index(last), *(ids[word] for word in answer), EOS_ID]
        for before, token in pairwise(chain):
            head[token] = head[token] + embeddings[before]
    weights |= {"model.embed_tokens.weight": embeddings, "lm_head.weight": head}
    weights |= {name: mx.zeros_like(w) for name, w in weights.items() if name.endswith(SILENT)}
    mx.eval(list(weights.values()))
    mx.save_safetensors(path, weights, {"format": "mlx"})
    write_tokens(directory, words, template)
    return directory
