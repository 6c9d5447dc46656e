"""Runs a tiny random model of a config whole and cut, and tells how far the numbers are apart.

Everything is float32. Both runs get the same chunks: one shot, chunked prefill past every window, and decode,
with one row and with two. Between the stages of the cut model each carry goes through the ring's own frames:
to bytes and back. Owns the calling thread's MLX while it runs.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import _get_classes

from proto import ring_pb2
from proto.codec import FrameAssembler, encode
from shard_loader.carry import flatten, from_wire, to_wire, unflatten
from shard_loader.layout import trace
from shard_loader.shard import Shard
from shard_loader.shrink import Config, recipes

Case = tuple[tuple[int, ...], int]  # tokens per forward pass, rows
Wire = Callable[[Sequence[mx.array], str], Any]  # a carry's arrays and structure -> the carry behind the cut

MAX_PARAMETERS = 120_000_000  # of a tiny model; above, a proof would take minutes
SCHEDULES = ((12, 1, 1, 1), (7, 5, 1, 1))  # tokens per forward pass; the prompts are longer than WINDOW
BATCHES = (1, 2)

# What building or running a model of a shrunk config may raise when the shrinking does not suit it.
UNSUITABLE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)


class RehearsalError(ValueError):
    """No tiny model of this config can be built and run; one sentence with the last reason."""


class Rehearsal:
    """A tiny random model of a config with its logits, to be compared with its cut self.

    Raises RehearsalError if no shrinking of the config gives a model that runs. Attributes: model (whole),
    the config it was made of, num_layers, and recipe, the name of the shrinking.
    """

    def __init__(self, config: Config) -> None:
        reasons = []
        for name, small in recipes(_with_defaults(config)):
            try:
                self.config = small
                self.model = _build(small)
                _randomise(self.model)
                self._vocab_size = trace(self.model).vocab_size  # ids beyond it would read beyond the table
                self._expected = {key: list(self._run_whole(*key)) for key in _cases()}
            except UNSUITABLE as error:
                reasons.append(f"{name}: {type(error).__name__}: {' '.join(str(error).split())}")
                continue
            self.num_layers = len(self.model.layers)
            self.recipe = name
            return
        raise RehearsalError(f"no tiny model of this config can be built ({reasons[0]})")

    def error_of(self, boundaries: Sequence[int]) -> float:
        """The largest difference of any logit with the model cut before each of `boundaries`; NaN counts.

        0.0 means bit for bit equal. Raises whatever the cut model raises; ShardError for an impossible cut.
        """
        return self._error(boundaries, through_the_wire, _cases())

    def is_felt_at(self, boundary: int) -> bool:
        """Whether a slightly wrong carry there shows in the logits; a proof that cannot fail is none."""
        return self._error([boundary], _disturbed, _cases()[:1]) != 0.0

    def _error(self, boundaries: Sequence[int], wire: Wire, cases: Sequence[Case]) -> float:
        shards = self.shards(boundaries)
        worst = 0.0
        for key in cases:
            for expected, got in zip(self._expected[key], self._run_cut(shards, wire, *key), strict=True):
                worst = max(worst, _difference(expected, got))
        return worst

    def shards(self, boundaries: Sequence[int]) -> list[Shard]:
        """The tiny model cut before each of `boundaries`; ShardError for an impossible cut."""
        return [self._shard(start, stop) for start, stop in pairwise([0, *boundaries, self.num_layers])]

    def tokens(self, num_rows: int, num_tokens: int) -> mx.array:
        """Reproducible token ids, (num_rows, num_tokens)."""
        return mx.random.randint(0, self._vocab_size, (num_rows, num_tokens), key=mx.random.key(num_rows))

    def is_repeatable(self) -> bool:
        """Whether the whole model gives the same numbers twice: without that no cut can be judged."""
        return all(
            mx.array_equal(first, again).item()
            for key, expected in self._expected.items()
            for first, again in zip(expected, self._run_whole(*key), strict=True)
        )

    def _shard(self, start: int, stop: int) -> Shard:
        twin = _build(self.config)
        twin.update(self.model.parameters())
        return Shard(twin, start, stop)

    def _run_whole(self, schedule: tuple[int, ...], batch: int) -> Iterator[mx.array]:
        cache = make_prompt_cache(self.model)
        for tokens in self._chunks(schedule, batch):
            logits = self.model(tokens, cache=cache)
            if mx.isnan(logits).any().item():
                raise ArithmeticError("the whole model gives logits that are not numbers")
            yield logits

    def _run_cut(
        self, shards: list[Shard], wire: Wire, schedule: tuple[int, ...], batch: int
    ) -> Iterator[mx.array]:
        states = [shard.new_state() for shard in shards]
        for tokens in self._chunks(schedule, batch):
            carry: Any = None
            for shard, state in zip(shards, states, strict=True):
                arrays, structure = flatten(shard.forward(tokens, carry, state))
                mx.eval(arrays, state.arrays())
                carry = arrays[0] if shard.is_last else wire(arrays, structure)
            yield carry

    def _chunks(self, schedule: tuple[int, ...], batch: int) -> Iterator[mx.array]:
        """Reproducible tokens (batch, chunk) for each entry of the schedule."""
        tokens = self.tokens(batch, sum(schedule))
        start = 0
        for length in schedule:
            yield tokens[:, start : start + length]
            start += length


def through_the_wire(arrays: Sequence[mx.array], structure: str) -> Any:
    """The carry as the next stage gets it: every frame's bytes made and taken apart. `arrays` are evaluated.

    Raises CarryError or WireError for what the ring would refuse.
    """
    frame = ring_pb2.Frame(kind=ring_pb2.STEP)
    frame.slots.add(session=1, structure=structure, num_tensors=len(arrays))
    assembler = FrameAssembler()
    got = None
    for message in encode(frame, [to_wire(array) for array in arrays]):
        got = assembler.feed(message)
    assert got is not None
    return unflatten([from_wire(tensor) for tensor in got[1]], got[0].slots[0].structure)


def _disturbed(arrays: Sequence[mx.array], structure: str) -> Any:
    """Another carry than the one that should cross."""
    wrong = [x * 1.01 + 0.01 if mx.issubdtype(x.dtype, mx.floating) else x for x in arrays]
    mx.eval(wrong)
    return through_the_wire(wrong, structure)


def _difference(expected: mx.array, got: mx.array) -> float:
    """The largest difference; infinite for NaN. Equal infinities (masked tokens) are equal."""
    if expected.shape != got.shape:
        return math.inf
    apart: Any = mx.where(expected == got, 0.0, mx.abs(expected - got)).max().item()
    return math.inf if math.isnan(apart) else float(apart)


def _cases() -> list[Case]:
    return [(schedule, batch) for schedule in SCHEDULES for batch in BATCHES]


def _build(config: Config) -> nn.Module:
    model_class, args_class = _get_classes(config=config)
    model = model_class(args_class.from_dict(copy.deepcopy(config)))
    model.eval()
    size = sum(value.size for _, value in tree_flatten(model.parameters()))
    if size > MAX_PARAMETERS:
        raise ValueError(f"the shrunk model would still have {size / 1e6:.0f} M parameters")
    return model


def _randomise(model: nn.Module) -> None:
    """Small float32 noise on top of each parameter's initial value, so that none is zero or constant."""
    key = mx.random.key(7)
    fresh = []
    for name, value in tree_flatten(model.parameters()):
        if mx.issubdtype(value.dtype, mx.floating):
            key, subkey = mx.random.split(key)
            fresh.append((name, value.astype(mx.float32) + 0.05 * mx.random.normal(value.shape, key=subkey)))
    model.update(tree_unflatten(fresh))
    mx.eval(model.parameters())


def _with_defaults(config: Config) -> Config:
    """The config with what its architecture would fill in, so that shrinking sees it; nested models too."""
    try:
        _, args_class = _get_classes(config=config)
    except (KeyError, ValueError):
        return config
    out = dict(config)
    for field in dataclasses.fields(args_class):
        if isinstance(field.default, (int, float)) and field.name not in out:
            out[field.name] = field.default
    for key, value in config.items():
        if isinstance(value, dict) and "model_type" in value and not key.startswith(("vision", "audio")):
            out[key] = _with_defaults(value)
    return out
