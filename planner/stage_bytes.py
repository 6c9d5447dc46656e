"""What a stage takes of its node's memory, part by part, from a model profile and a workload. Pure.

Layer ranges are half-open. docs/memory.md explains the terms.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from planner.kv_profile import CacheProfile
from planner.model_profile import ModelProfile
from planner.workload import Workload

MASKS = 3  # of one byte for each score of one head: what a window's mask is made of


@dataclass(frozen=True, slots=True)
class StageWeights:
    """A stage's weights by part. A head tied to the embedding counts as head, unless the stage has both."""

    layers_bytes: int
    embed_bytes: int
    norm_bytes: int  # and what else stands outside the layers of the last stage
    head_bytes: int
    other_bytes: int = 0  # what the layers of every stage read

    @property
    def total_bytes(self) -> int:
        return self.layers_bytes + self.embed_bytes + self.norm_bytes + self.head_bytes + self.other_bytes


class StageBytes:
    """Bytes of any stage, from sums prepared once."""

    def __init__(self, model: ModelProfile, work: Workload) -> None:
        self.model, self.work = model, work
        layers = model.layers
        self._sources = {i: x.cache_source for i, x in enumerate(layers) if x.cache_source is not None}
        self._weight = _sums(layer.weight_bytes for layer in layers)
        self._kv = _sums(self._cache_bytes(layer.cache) * work.concurrency for layer in layers)
        self._unquantized = _sums(
            CacheProfile(layer.cache.plain_token_bytes).nbytes(self.chunk_tokens) for layer in layers
        )
        self._scratch = {
            is_fused: [self._layer_scratch_bytes(i, is_fused) for i in range(len(layers))]
            for is_fused in (False, True)
        }

    @property
    def chunk_tokens(self) -> int:
        """Tokens of the largest prefill chunk."""
        return min(self.work.chunk_tokens, self.work.context)

    def weights(self, start: int, stop: int) -> StageWeights:
        """Weights of a stage, with the embedding, norm and head that it owns; a tied copy counts."""
        model = self.model
        is_first, is_last = start == 0, stop == model.num_layers
        is_tied_copy = is_last and model.is_tied and not is_first
        read_bytes = 0 if is_first else model.shared_embed_bytes  # of the embedding, by every stage
        tied_bytes = (read_bytes or model.embed_bytes) if is_tied_copy else 0
        return StageWeights(
            layers_bytes=self._weight[stop] - self._weight[start],
            embed_bytes=model.embed_bytes if is_first else 0,
            norm_bytes=model.norm_bytes if is_last else 0,
            head_bytes=model.head_bytes + tied_bytes if is_last else 0,
            other_bytes=model.table_bytes + (0 if is_tied_copy else read_bytes),
        )

    def kv(self, start: int, stop: int) -> int:
        """Caches of a stage for context x concurrency, with its copies of those that it shares."""
        return self._kv[stop] - self._kv[start] + self._copies(start, stop)

    def activation(self, start: int, stop: int, is_fused: bool) -> int:
        """Scratch of a stage for one prefill chunk: an upper bound.

        The fullest layer counts the outputs of all its linears, four hidden states, the attention scores
        and masks where they are written to memory, the scan of a recurrent layer, the decoding of EXL3
        weights, and a second copy of one session's cache (it is copied when it grows). Where caches are
        quantised, those of one session's first chunk count in plain, and attention scores are always written
        to memory. The last stage adds the logits of the chunk, and four rows of them in float32 for the
        sampler.
        """
        model = self.model
        total = max(self._scratch[is_fused][start:stop])
        total += self._unquantized[stop] - self._unquantized[start]
        if stop == model.num_layers:
            total += self.chunk_tokens * model.vocab_size * model.dtype_bytes + 16 * model.vocab_size
        return total

    def need(self, start: int, stop: int, is_fused: bool) -> int:
        """All that a stage takes of its node's budget."""
        kv_bytes, activation_bytes = self.kv(start, stop), self.activation(start, stop, is_fused)
        return self.weights(start, stop).total_bytes + kv_bytes + activation_bytes

    def need_table(self, bounds: Sequence[int], is_fused: bool) -> NDArray[np.int64]:
        """(B, B) `need` of the stages between B boundaries, from 0 to the number of layers; 0 elsewhere."""
        model, ends, last = self.model, np.array(bounds), len(bounds) - 1
        sums = np.array(self._weight) + np.array(self._kv) + np.array(self._unquantized)
        table = sums[ends][None, :] - sums[ends][:, None] + model.table_bytes + model.shared_embed_bytes
        scratch = np.array(self._scratch[is_fused])
        for at, start in enumerate(bounds[:-1]):
            table[at, at + 1 :] += np.maximum.accumulate(scratch[start:])[ends[at + 1 :] - start - 1]
        special = [(0, stop) for stop in range(1, last + 1)] + [(start, last) for start in range(1, last)]
        if self._sources:  # copies of caches depend on the whole range
            special = [(start, stop) for start in range(last) for stop in range(start + 1, last + 1)]
        for start, stop in special:
            table[start, stop] = self.need(bounds[start], bounds[stop], is_fused)
        return np.triu(table, 1)

    def layer(self, layer: int) -> int:
        """Weights and caches of one layer alone, which is the least that it takes of a stage."""
        return self._weight[layer + 1] - self._weight[layer] + self._kv[layer + 1] - self._kv[layer]

    def _cache_bytes(self, cache: CacheProfile) -> int:
        """For one session."""
        return cache.nbytes(self.work.context, self.work.chunk_tokens)

    def _copies(self, start: int, stop: int) -> int:
        """Caches of layers of earlier stages that layers of this one read: the stage has them too."""
        if not self._sources:
            return 0
        layers = self.model.layers
        copied = {s for i, s in self._sources.items() if start <= i < stop and s < start}
        return sum(self._cache_bytes(layers[s].cache) for s in copied) * self.work.concurrency

    def _layer_scratch_bytes(self, i: int, is_fused: bool) -> int:
        model, layer, context = self.model, self.model.layers[i], self.work.context
        mask_bytes = 0
        elements = self.chunk_tokens * (layer.output_width + 4 * model.hidden_size)
        if not is_fused or layer.cache.is_quantized:
            seen = min(context, (layer.cache.window or context) + self.work.chunk_tokens)
            elements += layer.score_copies * model.num_heads * self.chunk_tokens * seen
            mask_bytes = MASKS * self.chunk_tokens * seen if layer.score_copies else 0
        decode_bytes = layer.decode_bytes + self.chunk_tokens * layer.token_decode_bytes
        plain_bytes = elements * model.dtype_bytes + mask_bytes + layer.scan_bytes
        return plain_bytes + decode_bytes + self._cache_bytes(layer.cache)


def _sums(values: Iterable[int]) -> list[int]:
    return [0, *itertools.accumulate(values)]
