"""Which of a checkpoint's lazy tensors lazy arrays are made from, by MLX's own export of their graph.

Evaluates nothing; compute thread only.
https://ml-explore.github.io/mlx/build/html/python/_autosummary/mlx.core.export_to_dot.html
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import mlx.core as mx

MAX_NAMES = 1000  # that one export takes: a call into MLX has at most 1024 keyword arguments


@dataclass(frozen=True, slots=True)
class _Graph:
    """What one export says: the candidates that something reads, and the leaves that the arrays have."""

    read: set[str]
    num_loads: int
    num_broadcasts: int  # ghosts are such, but so may be what sanitize makes


def tensors_read(
    groups: Iterable[Mapping[str, mx.array]], candidates: Mapping[str, mx.array], *, are_ghosts: bool = False
) -> set[str]:
    """Which of the `candidates` the arrays in `groups` are, or are made from.

    candidates: as `mx.load` gives them, with ghosts (`shard_loader.layout.ghost`) among them or, with
    `are_ghosts`, nothing but ghosts. A group is one layer's arrays by parameter name: tensors with the same
    layer number are tried first, so that a model of many thousand tensors takes seconds, not minutes.
    """
    name_of = {id(array): name for name, array in candidates.items()}
    by_number: dict[str, list[str]] = {}
    for name in candidates:
        by_number.setdefault(_number(name), []).append(name)
    read: set[str] = set()
    for group in groups:
        read |= {name_of[id(array)] for array in group.values() if id(array) in name_of}
        made = [array for array in group.values() if id(array) not in name_of]
        if made:
            read |= _made_from(made, candidates, _in_order(by_number, group), are_ghosts)
    return read


def _made_from(
    arrays: list[mx.array], candidates: Mapping[str, mx.array], order: Iterator[str], are_ghosts: bool
) -> set[str]:
    names = list(order)
    read: set[str] = set()
    for at in range(0, len(names), MAX_NAMES):
        graph = _export(arrays, {name: candidates[name] for name in names[at : at + MAX_NAMES]})
        read |= graph.read
        num_unread = min(MAX_NAMES, len(names) - at) - len(graph.read)  # named leaves are in the export too
        num_leaves = graph.num_broadcasts + (0 if are_ghosts else graph.num_loads) - num_unread
        if num_leaves == len(read):
            break  # every leaf has its name
    return read


def _in_order(by_number: Mapping[str, list[str]], group: Mapping[str, mx.array]) -> Iterator[str]:
    """The candidates' names: those with the group's numbers first, then those without, then others."""
    numbers = dict.fromkeys([*map(_number, group), ""])
    for number in [*numbers, *(n for n in by_number if n not in numbers)]:
        yield from by_number.get(number, ())


def _number(name: str) -> str:
    return next((part for part in name.split(".") if part.isdecimal()), "")


def _export(arrays: list[mx.array], candidates: Mapping[str, mx.array]) -> _Graph:
    """In the export every array has a name: ours where it is a candidate; an arrow from it is a read."""
    aliases = {f"p{i}": name for i, name in enumerate(candidates)}
    text = io.StringIO()
    # A reshape to the same shape is another Python object around the same array: the stop reads that too.
    ends = [mx.stop_gradient(array) for array in arrays]
    mx.export_to_dot(text, *ends, **{alias: candidates[name] for alias, name in aliases.items()})
    graph = text.getvalue()
    read = {aliases[alias] for alias in set(re.findall(r'^"(p\d+)" -> ', graph, re.MULTILINE))}
    return _Graph(read, graph.count('[label ="Load"'), graph.count('[label ="Broadcast"'))
