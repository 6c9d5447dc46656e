"""How long each layer of a model takes on a node: a decode step, or a chunk of a prompt. Pure.

A pass over a layer multiplies with its weights, format by format, and each is bound by the bytes that it
reads, by decoding them or by its arithmetic, whichever takes longest. Shapes: F weight formats; L + 1 parts,
which are the layers and, last, norm and head.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from planner.layer_profile import LayerProfile, WeightFormat
from planner.model_profile import ModelProfile
from planner.speeds import Speeds
from planner.workload import Workload

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class _Pass:
    """What one pass does with each part."""

    formats: tuple[str, ...]  # F
    weight_bytes: Floats  # (F, L + 1) read
    products: Floats  # (F, L + 1) weights multiplied, for all tokens together
    cache_bytes: Floats  # (L + 1,) read
    attention_flops: Floats  # (L + 1,) of scores and their use


class LayerTimes:
    """Times of a model's parts for one workload, on any node."""

    def __init__(self, model: ModelProfile, work: Workload) -> None:
        self._model, self._work = model, work
        self._one = self._decode(1)
        self._rows = self._one if work.rows == 1 else self._decode(work.rows)
        self._chunk = self._prefill()

    def decode_ms(self, speeds: Speeds, *, is_batched: bool = False) -> Floats:
        """(L + 2,) sums from the first part on, of one token of one user, or of each of `rows` users."""
        work = self._rows if is_batched else self._one
        rates = [(rate.weights_ms if (rate := speeds.of(name)) else np.inf) for name in work.formats]
        return self._sums(speeds, work, np.array(rates))

    def chunk_ms(self, speeds: Speeds) -> Floats:
        """(L + 2,) sums from the first part on, of one chunk of the prompt; without norm and head."""
        work = self._chunk
        flops = [(rate.flops_ms if (rate := speeds.of(name)) else speeds.flops_ms) for name in work.formats]
        return self._sums(speeds, work, np.array(flops) / 2)

    def _sums(self, speeds: Speeds, work: _Pass, products_ms: Floats) -> Floats:
        bytes_ms = np.array([speeds.weight_bytes_ms(name) for name in work.formats])
        bound_ms = np.maximum(work.weight_bytes / bytes_ms[:, None], work.products / products_ms[:, None])
        total_ms = bound_ms.sum(axis=0)
        total_ms += work.cache_bytes / speeds.read_bytes_ms + work.attention_flops / speeds.flops_ms
        total_ms[:-1] += speeds.layer_ms
        return np.concatenate([[0.0], np.cumsum(total_ms)])

    def _decode(self, rows: int) -> _Pass:
        model, middle = self._model, self._work.decode_context
        cache = [rows * layer.cache.read_bytes(middle) for layer in model.layers]
        return self._pass(rows, [*cache, 0], [0] * (model.num_layers + 1), has_head=True)

    def _prefill(self) -> _Pass:
        model, tokens = self._model, self._work.mean_chunk_tokens
        attention = [self._attention_flops(layer, tokens) for layer in model.layers]
        return self._pass(tokens, [0] * (model.num_layers + 1), [*attention, 0], has_head=False)

    def _pass(self, tokens: int, cache: list[int], attention: list[int], *, has_head: bool) -> _Pass:
        model = self._model
        parts = [layer.weight_formats for layer in model.layers]
        parts.append(self._head_formats() if has_head else ())
        names = tuple(dict.fromkeys(f.format for part in parts for f in part))
        row = {name: number for number, name in enumerate(names)}
        weight_bytes, products = np.zeros((2, len(names), len(parts)))
        for at, part in enumerate(parts):
            share = model.layers[at].batch_share(tokens) if at < model.num_layers else 1.0
            for f in part:
                weight_bytes[row[f.format], at] += f.dense_bytes + f.routed_bytes * share
                products[row[f.format], at] += f.active_params * tokens
        floats = (np.array(values, dtype=np.float64) for values in (cache, attention))
        return _Pass(names, weight_bytes, products, *floats)

    def _head_formats(self) -> tuple[WeightFormat, ...]:
        model = self._model
        nbytes = model.embed_bytes if model.is_tied else model.head_bytes
        return (WeightFormat(model.head_format, nbytes + model.norm_bytes, 0, model.head_params),)

    def _attention_flops(self, layer: LayerProfile, tokens: int) -> int:
        """Scores and their use cost two for each key and query element."""
        if not layer.score_copies:
            return 0
        model, work = self._model, self._work
        seen = min(work.prompt_tokens // 2, layer.cache.window or work.prompt_tokens)
        return 4 * model.num_heads * model.head_dim * seen * tokens
