"""One stage's layers inside the whole, lazy model.

The model's own forward pass runs unchanged; only the classes of some layer objects are swapped. A layer
before `start` returns what the previous stage sent, own layers run, and the last own layer of a stage that is
not the last raises StageDone, so that norm and head never run. Nothing that is not owned is ever evaluated.
Threads: a Shard and its states belong to the compute thread. `forward` is not re-entrant.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.cache import make_prompt_cache

from shard_loader.footprint import Footprint
from shard_loader.layout import (
    TRACE_TOKENS,
    CarrySpec,
    Layout,
    decoder_layers,
    from_plain,
    ghost,
    parameters_read,
    subclass,
    swapped,
    to_plain,
    trace,
)

WARM_UP_GROUP = 5  # layers per evaluation: Metal ends command buffers of about 5 s


class ShardError(ValueError):
    """A layer range that this model cannot be cut to; one sentence."""


class StageDone(Exception):  # noqa: N818  (not an error: it ends the forward pass of a stage)
    """Carries the last own layer's return value out of the model's forward pass."""

    def __init__(self, value: Any) -> None:
        self.value = value


class ShardState:
    """One sequence's state on one stage: its own caches, and how many tokens they have seen.

    own: {index in the model's cache list: cache}. A state whose `forward` raised is spoilt: drop it.
    """

    __slots__ = ("_shadows", "_view", "own", "position")

    def __init__(self, own: dict[int, Any], view: list[Any], shadows: list[Any]) -> None:
        self.own = own
        self.position = 0
        self._view = view  # full length, foreign entries alias own ones of the same kind
        self._shadows = shadows  # parts of foreign caches of no own kind: only their offset is ever read

    def arrays(self) -> list[mx.array]:
        """Every array of the own caches, for mx.eval."""
        return list(_cache_arrays(self.own))

    @property
    def nbytes(self) -> int:
        """Bytes the own caches hold; reads shapes only."""
        return sum(array.nbytes for array in _cache_arrays(self.own))


def _cache_arrays(value: Any) -> Iterator[mx.array]:
    if isinstance(value, mx.array):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _cache_arrays(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _cache_arrays(item)
    elif hasattr(value, "__dict__"):
        yield from _cache_arrays(value.__dict__)


def _with_offset(cache: Any) -> Iterator[Any]:
    """The parts of a cache that count tokens in an integer `offset`."""
    for part in getattr(cache, "caches", None) or (cache,):
        if type(getattr(part, "offset", None)) is int:
            yield part


class Shard:
    """Layers [start, stop) of a model; start 0 owns the embedding, stop == num_layers norm and head.

    Takes `model` over: it is the whole model with lazy parameters, and afterwards only good for this shard.
    Foreign parameters are replaced by NaN without memory, so that a use of one cannot pass unseen.
    Raises ShardError if the range is empty or the model cannot be cut there.
    """

    def __init__(self, model: nn.Module, start: int, stop: int) -> None:
        layout = trace(model)
        if not 0 <= start < stop <= layout.num_layers:
            raise ShardError(
                f"layers [{start}, {stop}) do not lie within the model's {layout.num_layers} layers"
            )
        self.start, self.stop, self.num_layers = start, stop, layout.num_layers
        self.is_first, self.is_last = start == 0, stop == layout.num_layers
        self.vocab_size = layout.vocab_size
        self._layers = decoder_layers(model)
        self._model = model
        self._incoming = None if self.is_first else _cut(layout, start)
        self._outgoing = None if self.is_last else _cut(layout, stop)
        self._own_caches, self._stand_in = _own_caches(layout, start, stop)
        self._payload: list[Any] = [
            None
        ]  # what layers before `start` return; filled for one forward at a time
        self._swap_classes()
        self.full_model_bytes = sum(
            a.nbytes for a in _unique(dict(tree_flatten(model.parameters()))).values()
        )
        self.parameters = self._drop_foreign_parameters()
        self.footprint = self._measure()

    @property
    def dtype(self) -> str:
        """The dtype of the carry that leaves this stage (on the last: that enters it), as "bfloat16"."""
        spec = self._outgoing or self._incoming
        if spec is None:
            floats = (a.dtype for a in self.parameters.values() if mx.issubdtype(a.dtype, mx.floating))
            return str(next(floats, mx.float32)).removeprefix("mlx.core.")
        return str(spec.dtypes[0]).removeprefix("mlx.core.")

    def new_state(self) -> ShardState:
        """State for one sequence that has seen no token yet."""
        fresh = make_prompt_cache(self._model)
        own = {i: fresh[i] for i in self._own_caches}
        view = [fresh[i if same is None else same] for i, same in enumerate(self._stand_in)]
        shadows = [
            part
            for i, same in enumerate(self._stand_in)
            if same is None and i not in own
            for part in _with_offset(fresh[i])
        ]
        return ShardState(own, view, shadows)

    def forward(self, tokens: mx.array, carry: Any | None, state: ShardState) -> Any:
        """Builds, without evaluating, this stage's part of the forward pass of `tokens` (B, T).

        carry: what the previous stage returned (any value on the first). Returns the carry for the next
        stage, or on the last stage the logits (B, T, vocab_size). Advances `state.position` by T.
        """
        position = state.position
        for part in state._shadows:
            part.offset = position
        incoming = self._incoming
        if incoming is not None and incoming.template is not None:
            carry = from_plain(carry, incoming.template)
        payload = self._payload
        payload[0] = carry
        try:
            out = self._model(tokens, cache=state._view)
        except StageDone as done:
            out = done.value
        finally:
            payload[0] = None
        state.position = position + tokens.shape[1]
        outgoing = self._outgoing
        if outgoing is not None and outgoing.template is not None:
            return to_plain(out)
        return out

    def warm_up(self) -> None:
        """One forward pass of a throw-away state, evaluated a few layers at a time: kernels get compiled."""
        breathers = self._layers[self.start + WARM_UP_GROUP - 1 : self.stop - 1 : WARM_UP_GROUP]
        state = self.new_state()
        with swapped(breathers, _breather):
            out = self.forward(*self._placeholders(), state)
        mx.eval(_arrays(out), state.arrays())

    def _swap_classes(self) -> None:
        payload = self._payload
        start, stop = self.start, self.stop

        def before(self: Any, *args: Any, **kwargs: Any) -> Any:
            return payload[0]

        def beyond(self: Any, *args: Any, **kwargs: Any) -> Any:
            raise ShardError(f"the model called a layer beyond this stage's [{start}, {stop})")

        made: dict[tuple[type, Any], type] = {}

        def swap(layer: nn.Module, call: Any) -> None:
            key = (type(layer), call)
            if key not in made:
                made[key] = subclass(type(layer), call)
            layer.__class__ = made[key]

        for layer in self._layers[:start]:
            swap(layer, before)
        for layer in self._layers[stop:]:
            swap(layer, beyond)
        if not self.is_last:
            last = self._layers[stop - 1]
            base = type(last)

            def done(self: Any, *args: Any, **kwargs: Any) -> Any:
                raise StageDone(base.__call__(self, *args, **kwargs))

            swap(last, done)

    def _drop_foreign_parameters(self) -> dict[str, mx.array]:
        """Puts ghosts where this stage never reads, and returns what it does read, by name."""
        everything = dict(tree_flatten(self._model.parameters()))
        own_ids = _array_ids(self._layers[self.start : self.stop])
        foreign_ids = _array_ids(self._layers[: self.start] + self._layers[self.stop :]) - own_ids
        outside = _unique({n: a for n, a in everything.items() if id(a) not in own_ids | foreign_ids})
        read_ids = own_ids | {id(outside[name]) for name in self._read_outside(outside)}
        dropped = [(name, ghost(array)) for name, array in everything.items() if id(array) not in read_ids]
        self._model.update(tree_unflatten(dropped), strict=False)
        return _unique({name: array for name, array in everything.items() if id(array) in read_ids})

    def _read_outside(self, outside: dict[str, mx.array]) -> set[str]:
        """Names of the parameters outside the layers that this stage's forward pass reads."""
        state = self.new_state()
        out = self.forward(*self._placeholders(), state)
        return parameters_read((out, state.arrays()), outside)

    def _placeholders(self) -> tuple[mx.array, Any]:
        """Tokens (1, TRACE_TOKENS) and the carry that would come with them."""
        tokens = mx.zeros((1, TRACE_TOKENS), mx.int32)
        return tokens, None if self._incoming is None else self._incoming.zeros()

    def layer_parameters(self) -> list[dict[str, mx.array]]:
        """The parameters in the order to load them: one dict per own layer, and a last one for all others."""
        names = {id(array): name for name, array in self.parameters.items()}
        groups = []
        for layer in self._layers[self.start : self.stop]:
            arrays = (array for _, array in tree_flatten(layer.parameters()))
            groups.append({names.pop(id(array)): array for array in arrays if id(array) in names})
        groups.append({name: self.parameters[name] for name in names.values()})
        return groups

    def _measure(self) -> Footprint:
        *layers, outside = self.layer_parameters()
        modules = dict(self._model.named_modules())
        parts = {"embed": 0, "norm": 0, "head": 0, "other": 0}
        for name, array in outside.items():
            parts[self._part(name, modules[name.rpartition(".")[0]])] += array.nbytes
        if self.is_last and not self.is_first and not parts["head"]:
            parts["head"], parts["embed"] = parts["embed"], 0  # the tied table
        elif not self.is_first:
            parts["other"], parts["embed"] = parts["other"] + parts["embed"], 0
        return Footprint(
            layers_bytes=sum(array.nbytes for group in layers for array in group.values()),
            embed_bytes=parts["embed"],
            norm_bytes=parts["norm"],
            head_bytes=parts["head"],
            other_bytes=parts["other"],
            full_model_bytes=self.full_model_bytes,
        )

    def _part(self, name: str, module: nn.Module) -> str:
        kind = type(module).__name__
        if isinstance(module, (nn.Embedding, nn.QuantizedEmbedding)):
            return "embed"
        if "norm" in kind.lower() or "norm" in name.lower():
            return "norm"
        if "linear" in kind.lower() and self.is_last:
            return "head"
        return "other"


def _cut(layout: Layout, boundary: int) -> CarrySpec:
    """The carry between layers boundary - 1 and boundary; raises ShardError where there can be none."""
    repeated = next((i for i, n in enumerate(layout.num_calls) if n > 1), None)
    if repeated is not None:
        raise ShardError(
            f"layer {repeated} runs {layout.num_calls[repeated]} times a pass, so no cut is possible"
        )
    spec = layout.carries[boundary - 1]
    if isinstance(spec, str):
        raise ShardError(f"the model cannot be cut at layer {boundary}: {spec}")
    return spec


def _own_caches(layout: Layout, start: int, stop: int) -> tuple[list[int], list[int | None]]:
    """Own cache indices, and per cache of the model the own one that stands in for it (None: itself)."""
    own = sorted(layout.unreceived.union(*layout.received[start:stop]))
    by_kind = {layout.cache_kinds[i]: i for i in reversed(own)}
    stand_in = [None if i in own else by_kind.get(kind) for i, kind in enumerate(layout.cache_kinds)]
    return own, stand_in


def _breather(base: type, _: int) -> type:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = base.__call__(self, *args, **kwargs)
        mx.eval(_arrays(out))
        return out

    return subclass(base, call)


def _arrays(value: Any) -> list[mx.array]:
    return [v for _, v in tree_flatten({"value": to_plain(value)}) if isinstance(v, mx.array)]


def _array_ids(layers: list[nn.Module]) -> set[int]:
    return {id(array) for layer in layers for _, array in tree_flatten(layer.parameters())}


def _unique(arrays: dict[str, mx.array]) -> dict[str, mx.array]:
    """Each array once, under its first name."""
    names = {id(array): name for name, array in reversed(arrays.items())}
    return {name: array for name, array in arrays.items() if names[id(array)] == name}
