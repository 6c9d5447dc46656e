"""One stage's layers inside the whole, lazy model.

The model's own forward pass runs unchanged; only the classes of some layer objects are swapped. A layer
before `start` returns what the previous stage sent, own layers run, and the last own layer of a stage that is
not the last raises StageDone, so that norm and head never run. Nothing that is not owned is ever evaluated.
Threads: a Shard and its states belong to the compute thread. `forward` is not re-entrant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten

from planner.kv_quant import KvQuantization
from shard_loader.batch_state import BatchState
from shard_loader.crossing import Crossing, Passage
from shard_loader.inner_model import inner_model
from shard_loader.layout import (
    NEVER,
    TRACE_TOKENS,
    CarrySpec,
    Layout,
    decoder_layers,
    from_plain,
    subclass,
    swapped,
    to_plain,
    trace,
)
from shard_loader.ownership import Ownership
from shard_loader.reach import Reach
from shard_loader.state import CachePlan, ShardState, unquantizable

WARM_UP_GROUP = 5  # layers per evaluation: Metal ends command buffers of about 5 s


class ShardError(ValueError):
    """A layer range that this model cannot be cut to; one sentence."""


class StageDone(Exception):  # noqa: N818  (not an error: it ends the forward pass of a stage)
    """Carries the last own layer's return value out of the model's forward pass."""

    def __init__(self, value: Any) -> None:
        self.value = value


class Shard:
    """Layers [start, stop) of a model; start 0 owns the embedding, stop == num_layers norm and head.

    Takes `model` over: it is the whole model with lazy parameters, and afterwards only good for this shard.
    Foreign parameters are replaced by NaN without memory, so that a use of one cannot pass unseen.
    Raises ShardError if the range is empty or the model cannot be cut there.

    Attributes beside the range: footprint (bytes by part), vocab_size, dtype ("bfloat16": of the carry that
    leaves this stage, on the last of the one that enters; of the parameters where there is none).
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
        self._model = self._called = model
        self._incoming = None if self.is_first else _cut(layout, start)
        self._outgoing = None if self.is_last else _cut(layout, stop)
        self._caches = CachePlan.of(layout, start, stop)
        self._payload: list[Any] = [None]  # what layers before `start` return in the running pass
        self._passage = self._make_passage(layout)
        self._swap_classes(decoder_layers(model))
        self.ownership = Ownership(model, start, stop, self._placeholder_pass)
        self.footprint = self.ownership.footprint(self.is_first, self.is_last)
        self.dtype = self._dtype()

    @property
    def own_modules(self) -> list[nn.Module]:
        """Layers [start, stop), and the modules outside of them whose parameters are this stage's."""
        layers = decoder_layers(self._model)[self.start : self.stop]
        return [*layers, *self.ownership.outside_modules]

    def new_state(self) -> ShardState:
        """State for one sequence that has seen no token yet."""
        return self._caches.new_state(self._model)

    @property
    def is_batchable(self) -> bool:
        """Whether the states of several sequences can be merged into one."""
        return self._caches.is_mergeable(self._model)

    @property
    def is_whole(self) -> bool:
        """It is the whole model."""
        return self.is_first and self.is_last

    @property
    def trim_window(self) -> int | None:
        """While a state holds fewer tokens, a copy may begin with any of them; at or above it, only with all.

        0: only with all of them, ever. None: a state cannot be copied.
        """
        return self._caches.trim_window(self._model)

    @property
    def reach(self) -> Reach:
        """How far back its states can go, for tokens that were only guessed (`ShardState.rewind`)."""
        return self._caches.reach(self._model)

    def fork(self, source: ShardState, num_tokens: int) -> ShardState:
        """A copy of `source` with its first `num_tokens` tokens, as `trim_window` allows. Evaluates nothing.

        Raises ValueError where it does not.
        """
        window = self.trim_window
        if not 0 < num_tokens <= source.position:
            raise ValueError(f"a state of {source.position} tokens has no copy of {num_tokens}")
        if window is None or (num_tokens < source.position and source.position >= window):
            raise ValueError(
                f"a state of {source.position} tokens cannot be cut to {num_tokens} on this stage"
            )
        state = self.new_state()
        state.take_over(source, num_tokens)
        return state

    def merge(self, states: Sequence[ShardState]) -> BatchState:
        """One row for each state; they are used up. Only where `is_batchable`; evaluates nothing."""
        model, caches = self._model, self._caches
        return BatchState.of(states, lambda own, num_rows: caches.batch_view(model, own, num_rows))

    def split(self, batch: BatchState, row: int) -> ShardState:
        """One row as a state of its own; it stays in the batch too."""
        return batch.extract(row, self.new_state())

    def quantize_kv(self, kv: KvQuantization) -> None:
        """States made from now on keep their keys and values in `kv.bits` bits.

        Raises ShardError where the model's caches or its attention allow no such thing; evaluates nothing.
        """
        kind = unquantizable(self._model)
        if kind:
            raise ShardError(
                f"kv_bits = {kv.bits}: this model's cache is of the kind {kind}, which cannot be quantised; "
                "use kv_bits null"
            )
        self._caches = replace(self._caches, kv=kv)
        try:
            state = self.new_state()
            for _ in range(2):  # plain, then quantised
                self.forward(mx.zeros((1, TRACE_TOKENS), mx.int32), self._zero_carry(), state)
        except (ValueError, TypeError, AttributeError, IndexError, RuntimeError) as error:
            why = " ".join(str(error).split())
            raise ShardError(
                f"kv_bits = {kv.bits}, kv_group_size = {kv.group_size}: this model's attention cannot read a "
                f"QuantizedKVCache ({why}); use kv_bits null"
            ) from error

    def forward(self, tokens: mx.array, carry: Any | None, state: ShardState | BatchState) -> Any:
        """Builds, without evaluating, this stage's part of the forward pass of `tokens` (B, T).

        carry: what the previous stage returned; ignored on the first. Returns the carry for the next stage,
        or on the last stage the logits (B, T, vocab_size). Advances the state by T.
        """
        state.begin(tokens.shape[1])
        incoming = self._incoming
        if incoming is not None and incoming.template is not None:
            carry = from_plain(carry, incoming.template)
        payload, passage = self._payload, self._passage
        payload[0] = carry
        try:
            if passage is not None:
                passage.begin(carry, state.view)
            out = self._called(tokens, cache=state.view)
        except StageDone as done:
            out = done.value
        finally:
            payload[0] = None
            if passage is not None:
                passage.end()
        state.advance(tokens.shape[1])
        outgoing = self._outgoing
        if outgoing is not None and outgoing.template is not None:
            return to_plain(out)
        return out

    @contextmanager
    def before_head(self) -> Iterator[None]:
        """Within the block, `forward` on the last stage returns hidden states (B, T, hidden_size), no logits.

        Only for an architecture of which `hidden_proof` shows that they are what the head gets. Raises
        ShardError for a model that has nothing before its head.
        """
        inner = inner_model(self._model)
        if inner is None:
            raise ShardError("the model has no part that ends before its head, so it gives no hidden states")
        self._called = inner
        try:
            yield
        finally:
            self._called = self._model

    def forward_in_groups(
        self,
        tokens: mx.array,
        carry: Any | None,
        state: ShardState | BatchState,
        num_layers: int,
        on_evaluated: Callable[[int], None],
    ) -> Any:
        """As `forward`, but after every `num_layers` own layers, and the last, what they return is evaluated.

        on_evaluated(stop): the own layers before `stop` are.
        """
        layers = decoder_layers(self._model)
        stops = [*range(self.start + num_layers, self.stop, num_layers), self.stop]

        def evaluating(base: type, i: int) -> type:
            def call(self: Any, *args: Any, **kwargs: Any) -> Any:
                try:
                    out = base.__call__(self, *args, **kwargs)
                except StageDone as done:
                    mx.eval(_arrays(done.value))
                    on_evaluated(stops[i])
                    raise
                mx.eval(_arrays(out))
                on_evaluated(stops[i])
                return out

            return subclass(base, call)

        with swapped([layers[stop - 1] for stop in stops], evaluating):
            return self.forward(tokens, carry, state)

    def dry_run(self) -> None:
        """One forward pass of a throw-away state that is built and not evaluated."""
        self._placeholder_pass()

    def warm_up(self) -> None:
        """One forward pass of a throw-away state, evaluated a few layers at a time: kernels get compiled."""
        layers = decoder_layers(self._model)
        breathers = layers[self.start + WARM_UP_GROUP - 1 : self.stop - 1 : WARM_UP_GROUP]
        with swapped(breathers, _breather):
            out = self._placeholder_pass()
        mx.eval(_arrays(out))

    def _placeholder_pass(self) -> tuple[Any, list[mx.array]]:
        """The output and the state's arrays after a pass of zeros through a fresh state."""
        state = self.new_state()
        out = self.forward(mx.zeros((1, TRACE_TOKENS), mx.int32), self._zero_carry(), state)
        return out, state.arrays()

    def _zero_carry(self) -> Any:
        return None if self._incoming is None else self._incoming.zeros()

    def _make_passage(self, layout: Layout) -> Passage | None:
        """None where plain values cross both cuts of this stage, as in most architectures."""
        sharing = layout.sharing
        crossings = [
            None if is_end else sharing.crossing(cut)
            for is_end, cut in ((self.is_first, self.start), (self.is_last, self.stop))
        ]
        incoming, outgoing = (c if isinstance(c, Crossing) else None for c in crossings)
        if all(crossing is None or crossing.is_plain for crossing in (incoming, outgoing)):
            return None
        mirrors = sharing.needed_by(self.start, self.stop)
        return Passage(incoming, outgoing, sharing.skeletons, mirrors)

    def _swap_classes(self, layers: list[nn.Module]) -> None:
        if self._passage is not None:
            self._swap_for_passage(layers, self._passage)
            return
        payload = self._payload
        start, stop = self.start, self.stop

        def before(self: Any, *args: Any, **kwargs: Any) -> Any:
            return payload[0]

        beyond = _beyond(start, stop)
        made: dict[tuple[type, Any], type] = {}
        foreign = [(layer, before) for layer in layers[:start]] + [(layer, beyond) for layer in layers[stop:]]
        for layer, call in foreign:
            key = (type(layer), call)
            if key not in made:
                made[key] = subclass(type(layer), call)
            layer.__class__ = made[key]
        if not self.is_last:
            last = layers[stop - 1]
            base = type(last)

            def done(self: Any, *args: Any, **kwargs: Any) -> Any:
                raise StageDone(base.__call__(self, *args, **kwargs))

            last.__class__ = subclass(base, done)

    def _swap_for_passage(self, layers: list[nn.Module], passage: Passage) -> None:
        """As `_swap_classes`, where layers of other stages leave more behind than one value."""
        start, stop = self.start, self.stop

        def before(i: int) -> Callable[..., Any]:
            return lambda self, *args, **kwargs: passage.before(i, args, kwargs)

        def own(i: int, base: type) -> Callable[..., Any]:
            def call(self: Any, *args: Any, **kwargs: Any) -> Any:
                value = passage.own(i, lambda: base.__call__(self, *args, **kwargs))
                if i < stop - 1 or stop == len(layers):
                    return value
                raise StageDone(passage.carry(value, args, kwargs))

            return call

        for i, layer in enumerate(layers):
            base = type(layer)
            call = before(i) if i < start else own(i, base) if i < stop else _beyond(start, stop)
            layer.__class__ = subclass(base, call)

    def _dtype(self) -> str:
        spec = self._outgoing or self._incoming
        if spec is not None:
            return _name(spec.dtypes[0])
        owned = (array.dtype for group in self.ownership.groups for array in group.values())
        return _name(next((dtype for dtype in owned if mx.issubdtype(dtype, mx.floating)), mx.float32))


def _beyond(start: int, stop: int) -> Callable[..., Any]:
    def beyond(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise ShardError(f"the model called a layer beyond this stage's [{start}, {stop})")

    return beyond


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("mlx.core.")


def _cut(layout: Layout, boundary: int) -> CarrySpec:
    """The carry between layers boundary - 1 and boundary; raises ShardError where there can be none."""
    if 0 in layout.num_calls:
        raise ShardError(f"the model cannot be cut: {NEVER}")
    repeated = next((i for i, n in enumerate(layout.num_calls) if n > 1), None)
    if repeated is not None:
        raise ShardError(
            f"layer {repeated} runs {layout.num_calls[repeated]} times a pass, so the model cannot be cut"
        )
    spec = layout.carries[boundary - 1]
    if isinstance(spec, str):
        raise ShardError(f"the model cannot be cut before layer {boundary}: {spec}")
    return spec


def _breather(base: type, _: int) -> type:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = base.__call__(self, *args, **kwargs)
        mx.eval(_arrays(out))
        return out

    return subclass(base, call)


def _arrays(value: Any) -> list[mx.array]:
    return [v for _, v in tree_flatten({"value": to_plain(value)}) if isinstance(v, mx.array)]
