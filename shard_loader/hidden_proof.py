"""Whether the hidden states before an architecture's head can be had, tried on a tiny model of its config.

The last stage calls the model's inner part. What that returns is right where the head, put behind it, gives
the whole model's logits bit for bit: then no other step lies between. So an architecture that scales or clips
what its head gets, or returns something else, is refused.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from shard_loader.inner_model import possible_heads
from shard_loader.rehearsal import UNSUITABLE, Rehearsal

CHUNKS = (7, 5, 1)  # tokens of one forward pass after another


def why_no_hidden(rehearsal: Rehearsal) -> str:
    """Why they cannot be had, in words that follow "because"; empty where they can."""
    try:
        return _try(rehearsal)
    except UNSUITABLE as error:
        return f"its inner part fails with {type(error).__name__}: {' '.join(str(error).split())}"


def _try(rehearsal: Rehearsal) -> str:
    model: Any = rehearsal.model
    shard = rehearsal.shards([])[0]
    tokens, state, cache = rehearsal.tokens(1, sum(CHUNKS)), shard.new_state(), make_prompt_cache(model)
    heads, start = None, 0
    for length in CHUNKS:
        chunk = tokens[:, start : start + length]
        logits = model(chunk, cache=cache)
        with shard.before_head():
            hidden = shard.forward(chunk, None, state)
        if not isinstance(hidden, mx.array):
            return "its inner part returns more than hidden states"
        if heads is None:
            heads = list(possible_heads(model, hidden.shape[-1], shard.vocab_size))
        heads = [head for head in heads if mx.array_equal(head(hidden), logits).item()]
        start += length
    return "" if heads else "its head gets something else than its inner part returns"
