"""Watches one traced forward pass: which layers read what other layers left behind.

Three ways are seen: a cache that one layer updates and another is handed or that the model reads in between;
arrays of one layer's value that a layer further on is handed; a dict that all are handed and some change.
Whatever stays unseen shows as a cut that is not exact: nothing but this crosses it. Compute thread only.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from shard_loader.crossing import Call, Crossing, Fetched, Leaf, Name, Written, dismantle, pack


class Sharing:
    """Told by `watching`, `entered`, `received` and `left` during a pass; then asked for what crosses."""

    def __init__(self, num_layers: int) -> None:
        self.num_layers = num_layers
        self.skeletons: list[Any] = [None] * num_layers
        self._values: list[Any] = [None] * num_layers
        self._layer: int | None = None  # whose call is running
        self._next = 0  # the layer that runs next
        self._is_open = False
        self._calls: dict[Written, list[Call]] = defaultdict(list)
        self._writers: dict[int, list[int]] = defaultdict(list)  # per cache, in the order of the layers
        self._readers: dict[int, set[int]] = defaultdict(set)  # num_layers: what follows the last layer
        self._fetched: dict[int, Fetched] = {}  # id of an array -> where it came out of a cache
        self._returned: dict[int, list[Leaf]] = defaultdict(list)  # id of an array -> who returned it
        self._sources: dict[Leaf, Fetched] = {}
        self._taken: dict[int, int] = {}  # id of an array that was returned -> the last layer handed it
        self._boxes: dict[int, dict[int, Name]] = defaultdict(dict)  # id of a dict -> per layer its name
        self._changed: dict[int, int] = {}  # id of a dict -> the first layer that changes it
        self._contents: dict[tuple[int, Name], dict[str, Any]] = {}  # of a box after the layer
        self._before: dict[int, list[tuple[Any, int]]] = {}
        self._alive: list[Any] = []  # ids stay unique while their objects live

    # -- during the pass ----------------------------------------------------------------------------------
    @contextmanager
    def watching(self, caches: Sequence[Any]) -> Iterator[None]:
        """Within the block, calls and reads of these caches are seen."""
        watched = [(i, c, type(c)) for i, c in enumerate(caches) if hasattr(c, "update_and_fetch")]
        for i, cache, base in watched:
            cache.__class__ = self._watched_class(base, i)
        self._is_open = True
        try:
            yield
        finally:
            self._is_open = False
            for _, cache, base in watched:
                cache.__class__ = base

    def received(self, layer: int, caches: set[int]) -> None:
        """Layer `layer`, whose call is running, was handed these caches."""
        for index in caches:
            self._readers[index].add(layer)

    def entered(self, layer: int, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Layer `layer` is called with these arguments."""
        self._layer = layer
        for array in dismantle([args, dict(kwargs)])[1]:
            if id(array) in self._fetched:
                self._readers[self._fetched[id(array)].written[1]].add(layer)
            if id(array) in self._returned:
                self._taken[id(array)] = layer
        for name, box in _boxes(args, kwargs):
            self._alive.append(box)
            self._boxes[id(box)][layer] = name
            self._before[id(box)] = _contents(box)

    def left(self, layer: int, value: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """It returned `value`."""
        self._layer, self._next = None, layer + 1
        skeleton, arrays = dismantle(value)
        self.skeletons[layer], self._values[layer] = skeleton, value
        self._alive.append(arrays)
        for number, array in enumerate(arrays):
            self._returned[id(array)].append((layer, number))
            if id(array) in self._fetched:
                self._sources[layer, number] = self._fetched[id(array)]
        for name, box in _boxes(args, kwargs):
            self._contents[layer, name] = dict(box)
            if _contents(box) != self._before[id(box)]:
                self._changed.setdefault(id(box), layer)

    def _watched_class(self, base: type, index: int) -> type:
        watch = self

        def read(cache: Any, name: str) -> Any:
            watch._read(index)
            return object.__getattribute__(cache, name)

        def update_and_fetch(cache: Any, *args: Any) -> Any:
            out = base.update_and_fetch(cache, *args)  # type: ignore[attr-defined]
            watch._called(index, args, out)
            return out

        members = {"__getattribute__": read, "update_and_fetch": update_and_fetch}
        return type(base.__name__, (base,), {**members, "__module__": base.__module__})

    def _read(self, index: int) -> None:
        """The model itself looks at a cache that a layer has filled: every layer from here on may use it."""
        if self._is_open and self._layer is None and index in self._writers:
            self._readers[index].update(range(self._next, self.num_layers + 1))

    def _called(self, index: int, args: Call, out: Any) -> None:
        if self._layer is None:
            return
        written = (self._layer, index)
        if written not in self._calls:
            self._writers[index].append(self._layer)
        self._calls[written].append(args)
        arrays = dismantle(out)[1]
        self._alive.append(arrays)
        for item, array in enumerate(arrays):
            self._fetched[id(array)] = Fetched(written, len(self._calls[written]) - 1, item)

    # -- afterwards ---------------------------------------------------------------------------------------
    def needed_by(self, start: int, stop: int) -> frozenset[int]:
        """Caches that a layer before `start` fills and one of [start, stop) reads, besides those handed over.

        What follows the last layer counts to the last stage.
        """
        last = stop + 1 if stop == self.num_layers else stop
        return frozenset(
            cache
            for layer, cache in self._calls
            if layer < start and any(start <= reader < last for reader in self._readers[cache])
        )

    def crossing(self, cut: int) -> Crossing | str:
        """What the cut before layer `cut` needs, or why it cannot be made."""
        for layers in self._writers.values():
            behind = [layer for layer in layers if layer >= cut]
            if behind and layers[0] < cut:
                return f"layers {layers[0]} and {behind[0]} write to one cache"
        leaves, aliases = self._crossing_leaves(cut)
        return Crossing(
            cut=cut,
            calls=tuple(
                (layer, cache)
                for layer, cache in self._calls
                if layer < cut <= max(self._readers[cache], default=0)
            ),
            leaves=leaves,
            aliases=aliases,
            boxes=tuple(self._crossing_boxes(cut)),
            fetched=tuple((leaf, source) for leaf, source in self._sources.items() if leaf[0] < cut),
        )

    def _crossing_leaves(self, cut: int) -> tuple[tuple[Leaf, ...], tuple[tuple[Leaf, Leaf], ...]]:
        """Arrays to carry beside the value, and the layers that returned one of the carried arrays too."""
        leaves: list[Leaf] = []
        aliases: list[tuple[Leaf, Leaf]] = []
        for array, last in self._taken.items():
            origins = [leaf for leaf in self._returned[array] if leaf[0] < cut]
            if last < cut or not origins or origins[-1] in self._sources:
                continue
            if origins[-1][0] < cut - 1:
                leaves.append(origins[-1])
            aliases += [(leaf, origins[-1]) for leaf in origins[:-1]]
        return tuple(leaves), tuple(aliases)

    def _crossing_boxes(self, cut: int) -> Iterator[Name]:
        for box, names in self._boxes.items():
            is_changed = self._changed.get(box, self.num_layers) < cut
            if is_changed and cut - 1 in names and any(layer >= cut for layer in names):
                yield names[cut - 1]

    def carry(self, crossing: Crossing) -> Any:
        """The carry that the traced pass had at this cut."""
        layer = crossing.cut - 1
        arrays = {at: dismantle(self._values[at])[1] for at, _ in crossing.leaves}
        return pack(
            crossing,
            self._values[layer],
            self._calls,
            {(at, number): arrays[at][number] for at, number in crossing.leaves},
            {name: self._contents[layer, name] for name in crossing.boxes},
        )


def _boxes(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[tuple[Name, dict[str, Any]]]:
    named: list[tuple[Name, Any]] = [*enumerate(args), *kwargs.items()]
    for name, value in named:
        if type(value) is dict:
            yield name, value


def _contents(box: Mapping[str, Any]) -> list[tuple[Any, int]]:
    return [(key, id(value)) for key, value in box.items()]
