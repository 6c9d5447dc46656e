"""How long each layer of a model takes on a node: a decode step, or a chunk of a prompt. Pure.

A pass over a layer multiplies with its weights, format by format, and each is bound by the bytes that it
reads, by decoding them or by its arithmetic, whichever takes longest. Shapes: F weight formats; L + 1 parts,
which are the layers and, last, norm and head.

Where a node has timed a whole block of experts or an EXL3 matrix at so many rows, that time stands in the
place of its weights' bytes and arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from planner.forms import Form, form_ms
from planner.layer_profile import FormUse, LayerProfile, WeightFormat
from planner.model_profile import ModelProfile
from planner.speeds import Speeds
from planner.workload import Workload

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class _Weights:
    """What one pass does with some weights of each part."""

    read_bytes: Floats  # (F, L + 1)
    products: Floats  # (F, L + 1) weights multiplied, for all tokens together


@dataclass(frozen=True, slots=True)
class _Pass:
    """What one pass does with each part."""

    tokens: int
    formats: tuple[str, ...]  # F
    weights: _Weights
    forms: Mapping[Form, tuple[Floats, _Weights]]  # (L + 1,) how many, and what of `weights` is theirs
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
        timed_ms, weights = _timed(speeds, work)
        bound_ms = np.maximum(weights.read_bytes / bytes_ms[:, None], weights.products / products_ms[:, None])
        total_ms = bound_ms.sum(axis=0) + timed_ms
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
        rows = {name: number for number, name in enumerate(names)}
        shares = [*(layer.batch_share(tokens) for layer in model.layers), 1.0]

        def add(weights: _Weights, at: int, part: Iterable[WeightFormat]) -> None:
            for f in part:
                weights.read_bytes[rows[f.format], at] += f.dense_bytes + f.routed_bytes * shares[at]
                weights.products[rows[f.format], at] += f.active_params * tokens

        def nothing() -> _Weights:
            return _Weights(*np.zeros((2, len(names), len(parts))))

        whole, forms = nothing(), dict[Form, tuple[Floats, _Weights]]()
        for at, part in enumerate(parts):
            add(whole, at, part)
            for use in self._forms_of(at) if part else ():
                counts, own = forms.setdefault(use.form, (np.zeros(len(parts)), nothing()))
                counts[at] += use.count
                add(own, at, use.weights)
        floats = (np.array(values, dtype=np.float64) for values in (cache, attention))
        return _Pass(tokens, names, whole, forms, *floats)

    def _forms_of(self, at: int) -> Sequence[FormUse]:
        """Of a layer or, last, of the head."""
        model = self._model
        if at < model.num_layers:
            return model.layers[at].forms
        return () if model.head_form is None else (model.head_form,)

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


def _timed(speeds: Speeds, work: _Pass) -> tuple[Floats | float, _Weights]:
    """What the node timed as a whole, for each part, and the weights that are left."""
    timed_ms: Floats | float = 0.0
    left = work.weights
    for form, (counts, own) in work.forms.items() if speeds.forms else ():
        if (ms := form_ms(speeds.forms, form, work.tokens)) is not None:
            timed_ms = timed_ms + counts * ms
            left = _Weights(left.read_bytes - own.read_bytes, left.products - own.products)
    # Shares of bytes are no whole numbers: what is left of nothing may be a little less.
    return timed_ms, _Weights(np.maximum(left.read_bytes, 0.0), np.maximum(left.products, 0.0))
