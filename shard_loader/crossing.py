"""What crosses a cut beside the value that the last layer before it returns.

Some layers read what others left behind: a cache that an earlier layer has filled, keys and values that it
returned for later ones, a dict that all layers are handed. Where a cut separates the two, the carry becomes a
dict of four entries:

- `value`: what the layer returned; arrays that came out of a cache are left out;
- `calls`: the new keys and values that layers before the cut gave to caches that layers behind it need. The
  stage behind repeats the very calls on caches of its own, so that only new tokens cross the cut;
- `leaves`: arrays that earlier layers returned and layers behind the cut take;
- `boxes`: what the dicts hold that layers on both sides are handed.

A cut that needs none of this carries the plain value. Compute thread only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from shard_loader.carry import CarryError

Name = str | int  # of a layer's argument: its keyword, or its place
Call = tuple[Any, ...]  # the arguments of one update_and_fetch
Written = tuple[int, int]  # (layer, cache that it gave new keys and values)
Leaf = tuple[int, int]  # (layer, number of an array in what it returned)


@dataclass(frozen=True, slots=True)
class Hole:
    """Stands for array `number` in the skeleton of a value."""

    number: int


@dataclass(frozen=True, slots=True)
class Fetched:
    """Array number `item` of what call `call` of (layer, cache) returned."""

    written: Written
    call: int
    item: int


@dataclass(frozen=True, slots=True)
class Crossing:
    """What the cut before layer `cut` needs; everything empty where the plain value is enough."""

    cut: int
    calls: tuple[Written, ...] = ()
    leaves: tuple[Leaf, ...] = ()
    aliases: tuple[tuple[Leaf, Leaf], ...] = ()  # (one array, the same where it crosses)
    boxes: tuple[Name, ...] = ()
    fetched: tuple[tuple[Leaf, Fetched], ...] = ()  # arrays that come out of caches, returned before the cut

    @property
    def is_plain(self) -> bool:
        """Whether the value alone crosses, and may stand for the value of every layer before the cut."""
        is_moved = any(alias[1] != leaf[1] for alias, leaf in self.aliases)
        is_fetched = any(leaf[0] == self.cut - 1 for leaf, _ in self.fetched)
        return not (self.calls or self.leaves or self.boxes or is_moved or is_fetched)


def dismantle(value: Any) -> tuple[Any, list[mx.array]]:
    """The skeleton of nested tuples, lists and dicts, and its arrays in order."""
    arrays: list[mx.array] = []

    def walk(part: Any) -> Any:
        if isinstance(part, mx.array):
            arrays.append(part)
            return Hole(len(arrays) - 1)
        if type(part) in (tuple, list):
            return type(part)(walk(item) for item in part)
        if type(part) is dict:
            return {key: walk(item) for key, item in part.items()}
        return part

    return walk(value), arrays


def assemble(skeleton: Any, array: Callable[[int], Any]) -> Any:
    """The inverse of `dismantle`; array(number) gives each."""
    if isinstance(skeleton, Hole):
        return array(skeleton.number)
    if type(skeleton) in (tuple, list):
        return type(skeleton)(assemble(item, array) for item in skeleton)
    if type(skeleton) is dict:
        return {key: assemble(item, array) for key, item in skeleton.items()}
    return skeleton


def argument(name: Name, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The argument of that name in a call."""
    return kwargs[name] if isinstance(name, str) else args[name]


def pack(
    crossing: Crossing,
    value: Any,
    calls: Mapping[Written, list[Call]],
    leaves: Mapping[Leaf, Any],
    boxes: Mapping[Name, dict[str, Any]],
) -> Any:
    """The carry of a cut: the plain value, or the dict of four entries."""
    if crossing.is_plain:
        return value
    skeleton, arrays = dismantle(value)
    left_out = {number for (layer, number), _ in crossing.fetched if layer == crossing.cut - 1}
    return {
        "value": assemble(skeleton, lambda number: None if number in left_out else arrays[number]),
        "calls": [[list(call) for call in calls[written]] for written in crossing.calls],
        "leaves": [leaves[leaf] for leaf in crossing.leaves],
        "boxes": [dict(boxes[name]) for name in crossing.boxes],
    }


class Passage:
    """One forward pass of a stage between two cuts: takes the incoming carry apart, and makes the next.

    skeletons: per layer what it returns. mirrors: caches of this stage that repeat the calls of layers before
    it. view: the stage's full-length cache list.
    """

    def __init__(
        self,
        incoming: Crossing | None,
        outgoing: Crossing | None,
        skeletons: Sequence[Any],
        mirrors: frozenset[int],
    ) -> None:
        self._incoming, self._outgoing = incoming, outgoing
        self._skeletons, self._mirrors = skeletons, mirrors
        self._last = -1 if incoming is None else incoming.cut - 1  # the layer whose value comes in
        self._fetched = dict(incoming.fetched) if incoming is not None else {}
        self._aliases = dict(incoming.aliases) if incoming is not None else {}
        self._own_leaves = () if outgoing is None else outgoing.leaves
        self._view: list[Any] = []
        self._value: Any = None
        self._calls: dict[Written, list[Call]] = {}
        self._leaves: dict[Leaf, Any] = {}
        self._boxes: list[dict[str, Any]] = []
        self._results: dict[Written, list[list[Any]]] = {}

    def begin(self, carry: Any, view: list[Any]) -> None:
        """A new forward pass with this carry; raises CarryError where it lacks what the cut needs."""
        self._view, self._value = view, carry
        crossing = self._incoming
        if crossing is None or crossing.is_plain:
            return
        try:
            self._value, calls = carry["value"], carry["calls"]
            self._calls = {
                w: [tuple(call) for call in made] for w, made in zip(crossing.calls, calls, strict=True)
            }
            self._leaves = dict(zip(crossing.leaves, carry["leaves"], strict=True))
            self._boxes = [dict(box) for box in carry["boxes"]]
            if len(self._boxes) != len(crossing.boxes):
                raise ValueError("boxes")
        except (KeyError, TypeError, ValueError) as error:
            raise CarryError(f"a carry lacks what the cut before layer {crossing.cut} needs") from error

    def end(self) -> None:
        """Forgets everything of the pass."""
        self._view, self._value = [], None
        self._calls, self._leaves, self._boxes, self._results = {}, {}, [], {}

    def before(self, layer: int, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """What a layer of an earlier stage returned."""
        crossing = self._incoming
        assert crossing is not None
        for written, made in self._calls.items():
            if written[0] == layer and written[1] in self._mirrors:
                cache = self._view[written[1]]
                self._results[written] = [dismantle(cache.update_and_fetch(*call))[1] for call in made]
        if layer < crossing.cut - 1:
            return assemble(self._skeletons[layer], lambda number: self._earlier((layer, number)))
        for name, box in zip(crossing.boxes, self._boxes, strict=True):
            target = argument(name, args, kwargs)
            target.clear()
            target.update(box)
        if crossing.is_plain:
            return self._value
        return self._whole_value()

    def _whole_value(self) -> Any:
        """The value of the last layer before this stage, with what came out of caches."""
        layer = self._last
        if not any(leaf[0] == layer for leaf in self._fetched):
            return self._value
        arrays = dismantle(self._value)[1]
        rest = iter(range(len(arrays)))

        def array(number: int) -> Any:
            source = self._fetched.get((layer, number))
            return arrays[next(rest)] if source is None else self._fetch(source)

        return assemble(self._skeletons[layer], array)

    def _earlier(self, leaf: Leaf) -> Any:
        """An array of a layer before the last: as it was, or NaN where no layer of this stage may need it."""
        if leaf in self._fetched:
            return self._fetch(self._fetched[leaf])
        same = self._aliases.get(leaf, leaf)
        if same[0] == self._last:
            return dismantle(self._whole_value())[1][same[1]]
        found = self._leaves.get(same)
        return _nan_like(self._value) if found is None else found

    def _fetch(self, source: Fetched) -> Any:
        results = self._results.get(source.written)
        return mx.array(float("nan")) if results is None else results[source.call][source.item]

    def own(self, layer: int, call: Callable[[], Any]) -> Any:
        """Runs a layer of this stage and keeps what must cross the next cut."""
        crossing = self._outgoing
        if crossing is None:
            return call()
        caches = {cache: self._view[cache] for at, cache in crossing.calls if at == layer}
        for index, cache in caches.items():
            cache.update_and_fetch = _recorder(cache, self._calls.setdefault((layer, index), []))
        try:
            value = call()
        finally:
            for cache in caches.values():
                del cache.update_and_fetch
        wanted = [leaf for leaf in self._own_leaves if leaf[0] == layer]
        if wanted:
            arrays = dismantle(value)[1]
            self._leaves |= {leaf: arrays[leaf[1]] for leaf in wanted}
        return value

    def carry(self, value: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The carry for the next stage, from what the last own layer returned and was given."""
        crossing = self._outgoing
        assert crossing is not None
        boxes = {name: argument(name, args, kwargs) for name in crossing.boxes}
        passed = [leaf for leaf in crossing.leaves if leaf[0] == self._last]
        if passed:  # they came in the value, not among the leaves
            arrays = dismantle(self._whole_value())[1]
            self._leaves |= {leaf: arrays[leaf[1]] for leaf in passed}
        return pack(crossing, value, self._calls, self._leaves, boxes)


def _recorder(cache: Any, made: list[Call]) -> Callable[..., Any]:
    fetch = cache.update_and_fetch

    def update_and_fetch(*args: Any) -> Any:
        made.append(args)
        return fetch(*args)

    return update_and_fetch


def _nan_like(value: Any) -> mx.array:
    arrays = dismantle(value)[1]
    shape = arrays[0].shape if arrays else ()
    return mx.broadcast_to(mx.array(float("nan")), shape)
