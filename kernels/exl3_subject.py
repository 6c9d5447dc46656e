"""EXL3 matrices under test: the kernels that decode, beside the reference, and beside MLX's operations.

For the thread that owns MLX.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import mlx.core as mx
import numpy as np

from kernels.exl3 import MAX_PAIRS, MAX_ROWS, Exl3Linear
from kernels.exl3_choice import Called, Choice, Way
from kernels.exl3_trials import Exl3Layer, Reference, Rows, describe, draw, product, reference_of
from kernels.measure import CACHE_BYTES, MAX_CALLS, Path, Run
from kernels.verdicts import Form, Verdict

TOLERANCE = {mx.float32: 1e-3, mx.float16: 1e-3, mx.bfloat16: 8e-3}  # of the largest value
ENDS = (1, 8)  # rows of the first classes: `Matrix.product` decodes once for up to 8
# Bytes that go to memory and come back for a weight that is decoded by MLX's operations, or to float16.
PLAIN_BYTES, FLOAT16_BYTES = 14, 4


@dataclass(frozen=True)
class Exl3Subject:
    """A form of matrix, with the layers that have it. pool: streams of these and of other matrices."""

    name: str
    layers: Sequence[Exl3Layer]
    called: Called
    pool: Sequence[mx.array] = ()

    @property
    def form(self) -> Form | None:
        """None for experts of several kinds: how long they take depends on how many there are of each."""
        layer, top_k = self.layers[0], self.called.top_k
        bits = {layer.bits} if isinstance(layer, Exl3Linear) else {bits for bits, _ in layer.kinds}
        if len(bits) > 1:
            return None
        sizes = int(layer.suh.shape[-1]), int(layer.svh.shape[-1])
        return Form(_num_experts(layer), top_k, *sizes, (f"exl3/{bits.pop()}",))

    @property
    def classes(self) -> Sequence[tuple[int, int]]:
        """To 1, to 8, to all that are decoded in place, and more."""
        ends = [*(end for end in ENDS if end < self._most), self._most]
        return tuple(zip([1, *(end + 1 for end in ends)], [*ends, 0], strict=True))

    @property
    def tolerance(self) -> float:
        return TOLERANCE[self.called.dtype]

    def has_kernels(self, _: int) -> bool:
        return True

    def answers(self, num_tokens: int) -> Iterator[tuple[Callable[[], mx.array], mx.array]]:
        """The whole answer beside that of MLX's operations here, and some columns beside the reference's."""
        layer, reference, kept = self.layers[0], self._reference, list[mx.array]()
        one = draw(layer, self.called, reference.x, num_tokens, seed=num_tokens, known=reference.experts)
        as_rows = (len(one.rows), layer.output_dims)

        def whole() -> mx.array:
            kept.append(product(layer, one.x, one, self.way(num_tokens)).reshape(as_rows))
            return kept[0]

        yield whole, product(layer, one.x.astype(mx.float32), one, "operations").reshape(as_rows)
        yield (lambda: kept[0][:, reference.columns]), reference.of(one)

    def inputs(self, num_tokens: int, seed: int) -> Rows:
        every = np.arange(_num_experts(self.layers[0]))
        return draw(self.layers[0], self.called, self._reference.x, num_tokens, seed=seed, known=every)

    def needed_bytes(self, one: Rows) -> int:
        return len(np.unique(one.experts)) * stored_bytes(self.layers[0]) // _num_experts(self.layers[0])

    def paths(self, num_tokens: int) -> tuple[Path, Path]:
        """A call takes a number of the answer before it. One by MLX's operations may take 100 ms."""
        return self._path(self.way(num_tokens), 4), self._path("operations", 1)

    def _path(self, way: Way, min_calls: int) -> Path:
        layer = self.layers[0]
        each = layer.suh.shape[-1] * layer.svh.shape[-1]
        decoded = {"in place": 0, "unpacked": FLOAT16_BYTES, "operations": PLAIN_BYTES}[way]

        def moved_bytes(one: Rows) -> int:
            num_matrices = min(len(one.experts), _num_experts(layer))
            return self.needed_bytes(one) + decoded * each * num_matrices

        return Path([_run(one, way) for one in self._all_layers], moved_bytes, min_calls)

    def use(self, verdicts: Sequence[Verdict]) -> Sequence[Exl3Layer]:
        choice = Choice(tuple((one.first, one.last, self.way(one.first)) for one in verdicts if one.is_taken))
        for layer in self.layers:
            layer.choice = choice
        return self.layers

    def way(self, num_tokens: int) -> Way:
        """Of the kernels. Experts of several kinds have no product in place."""
        layer = self.layers[0]
        is_one_kind = isinstance(layer, Exl3Linear) or len(layer.kinds) == 1
        return "in place" if is_one_kind and num_tokens <= self._most else "unpacked"

    @property
    def _most(self) -> int:
        """Tokens that are decoded in place."""
        is_linear = isinstance(self.layers[0], Exl3Linear)
        return MAX_ROWS if is_linear else max(1, MAX_PAIRS // self.called.top_k)

    @cached_property
    def _reference(self) -> Reference:
        return reference_of(self.layers[0], self.called)

    @cached_property
    def _all_layers(self) -> list[Exl3Layer]:
        """Those of the form and, where they are too few to fill a cache, some with pieces of other streams.

        Any bits are a stream, and a piece takes no memory.
        """
        layer = self.layers[0]
        if not isinstance(layer, Exl3Linear):
            return list(self.layers)
        size = layer.trellis.size
        missing = min(MAX_CALLS, -(-CACHE_BYTES // layer.trellis.nbytes)) - len(self.layers)
        own = {id(one.trellis) for one in self.layers}
        every = (
            stream.reshape(-1)[at : at + size].reshape(layer.trellis.shape)
            for stream in self.pool
            if id(stream) not in own
            for at in range(0, stream.size - size + 1, size)
        )
        pieces = list(itertools.islice(every, max(0, missing)))
        mx.eval(pieces)
        return [*self.layers, *(_with_stream(layer, piece) for piece in pieces)]


def exl3_subjects(layers: Iterable[Exl3Layer]) -> list[Exl3Subject]:
    """Of layers that were called once; those that hold most first."""
    found: dict[tuple[str, Called], list[Exl3Layer]] = {}
    for layer in layers:
        if layer.called is not None:
            found.setdefault((describe(layer, layer.called), layer.called), []).append(layer)
    members = [layer for same in found.values() for layer in same]
    pool = [layer.trellis for layer in members if isinstance(layer, Exl3Linear)]
    subjects = [Exl3Subject(name, same, called, pool) for (name, called), same in found.items()]
    return sorted(subjects, key=lambda one: -sum(map(stored_bytes, one.layers)))


def stored_bytes(layer: Exl3Layer) -> int:
    """Of all its tensors."""
    streams = [layer.trellis] if isinstance(layer, Exl3Linear) else layer.trellis
    own = [*streams, layer.suh, layer.svh, *([layer.bias] if "bias" in layer else [])]
    return sum(int(array.nbytes) for array in own)


def _num_experts(layer: Exl3Layer) -> int:
    return 1 if isinstance(layer, Exl3Linear) else layer.num_experts


def _run(layer: Exl3Layer, way: Way) -> Run:
    def run(x: mx.array, one: Rows) -> mx.array:
        y = product(layer, x, one, way)
        if y.shape[:-1] != one.x.shape[:-1]:  # x has one row for all experts of a token
            y = y[:, :1]
        return one.x + y[..., :1]

    return run


def _with_stream(layer: Exl3Linear, stream: mx.array) -> Exl3Linear:
    made = Exl3Linear(layer.input_dims, layer.output_dims, layer.bits, layer.codebook)
    made.trellis, made.suh, made.svh = stream, layer.suh, layer.svh
    if "bias" in layer:
        made.bias = layer.bias
    return made
