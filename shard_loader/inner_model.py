"""What of a model comes before its head: the part that turns tokens into hidden states.

mlx-lm's text models are that part with a head behind it. Embedding models are often saved without a head, and
with names as the inner part alone has them. Evaluates nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
from mlx import nn

from planner.parts import HEADS
from shard_loader.layout import decoder_layers

Weights = dict[str, mx.array]


class NoHead(nn.Module):  # type: ignore[misc]
    """Stands where a checkpoint has no head: its logits are no numbers, and depend on what comes before."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self._vocab_size = vocab_size

    def __call__(self, hidden: mx.array) -> mx.array:
        """(B, T, hidden_size) to (B, T, vocab_size), without memory."""
        nothing = hidden[..., :1] * mx.array(float("nan"), hidden.dtype)
        return mx.broadcast_to(nothing, (*hidden.shape[:-1], self._vocab_size))


def inner_path(model: nn.Module) -> str:
    """The path of the module whose own list the decoder layers are; empty: the model itself, or not found."""
    first = decoder_layers(model)[0]
    path = next((name for name, module in model.named_modules() if module is first), "")
    return path.rpartition(".")[0].rpartition(".")[0]


def inner_model(model: nn.Module) -> nn.Module | None:
    """That module; None where it is the model itself: then nothing comes before the head by itself."""
    path = inner_path(model)
    return dict(model.named_modules())[path] if path else None


def possible_heads(
    model: nn.Module, hidden_size: int, vocab_size: int
) -> Iterator[Callable[[mx.array], mx.array]]:
    """What may make logits of hidden states: linears outside the layers, then tables of the vocabulary."""
    layers = {id(part) for layer in decoder_layers(model) for part in layer.modules()}
    outside = [module for _, module in model.named_modules() if id(module) not in layers]
    for kind, call in (((nn.Linear,), "__call__"), ((nn.Embedding,), "as_linear")):
        for module in outside:
            if isinstance(module, kind) and module["weight"].shape == (vocab_size, hidden_size):
                yield getattr(module, call)


def as_whole(model: nn.Module, weights: Weights) -> Weights:
    """The tensors of a checkpoint under the whole model's names, where they have those of its inner part."""
    path = inner_path(model)
    if not path or any(name.startswith(f"{path}.") for name in weights):
        return weights
    own = set(dict(model.named_modules())[path])
    return {f"{path}.{name}" if name.partition(".")[0] in own else name: x for name, x in weights.items()}


def drop_missing_head(model: Any, weights: Weights) -> None:
    """Where `weights`, which have the model's names, have none of a head's: the model has NoHead there."""
    layers = {id(part) for layer in decoder_layers(model) for part in layer.modules()}
    for path, module in model.named_modules():
        parent, _, leaf = path.rpartition(".")
        is_head = leaf in HEADS and isinstance(module, nn.Linear) and id(module) not in layers
        if not is_head or any(name.startswith(f"{path}.") for name in weights):
            continue
        holder = dict(model.named_modules())[parent]
        setattr(holder, leaf, NoHead(module["weight"].shape[0]))
