"""Whether the EXL3 weights of a checkpoint suit each other: every expert is there, and none is wider than
others of its kind. Pure.

The planner knows no model class, so a weight is compared with those that are like it in every one: other
experts, what reads and writes the same hidden state, the other products of one MLP, and the same weight of
other layers.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from planner.exl3 import BLOCK, bits_of
from planner.headers import ModelFilesError, TensorHeader

EXPERT = re.compile(r"(.*\bexperts)\.(\d+)\.(\w+)\.weight$")
_OUT, _IN = 0, 1  # of a folded shape
# The ends of a linear that have the width of the hidden state, in two modules: attention and MLP.
_ATTENTION = {"q_proj": _IN, "k_proj": _IN, "v_proj": _IN, "o_proj": _OUT}
_MLP = {"gate_proj": _IN, "up_proj": _IN, "down_proj": _OUT}

Layer = Mapping[str, TensorHeader]  # folded, by the name after the layer's index
Ends = list[tuple[TensorHeader, int]]  # a weight and one of its axes


def check_shapes(layers: Sequence[Layer], flat: Mapping[str, Any], num_experts: int, model: str) -> None:
    """flat: config.json, its text part on top. num_experts: as it names them; 0 where it does not.

    Raises ModelFilesError for an expert without its tensors, and for a weight of another width.
    """
    layers = [layer for layer in layers if any(bits_of(header.dtype) for header in layer.values())]
    for layer in layers:
        for parts in _experts(layer):
            _check_experts(parts, num_experts, model)
        for ends in _joined(layer):
            _check_alike("what it works with has", ends, model)
    is_uniform = not any(isinstance(value, list) and len(value) >= len(layers) for value in flat.values())
    for ends in _across(layers, is_uniform=is_uniform):
        _check_alike("other layers have", ends, model)


def _experts(layer: Layer) -> Iterator[dict[str, dict[int, TensorHeader]]]:
    """For each list of experts with an EXL3 weight: its weights by their part of an expert, and number."""
    lists: dict[str, dict[str, dict[int, TensorHeader]]] = {}
    for rest, header in layer.items():
        if found := EXPERT.match(rest):
            lists.setdefault(found[1], {}).setdefault(found[3], {})[int(found[2])] = header
    for parts in lists.values():
        if any(bits_of(header.dtype) for part in parts.values() for header in part.values()):
            yield parts


def _check_experts(parts: Mapping[str, Mapping[int, TensorHeader]], num_experts: int, model: str) -> None:
    wanted = num_experts or 1 + max(number for part in parts.values() for number in part)
    for part in parts.values():
        lost = next((number for number in range(wanted) if number not in part), None)
        if lost is not None:
            name = EXPERT.sub(rf"\g<1>.{lost}.\3.trellis", next(iter(part.values())).name)
            raise ModelFilesError(f"{model}: the checkpoint lacks tensor '{name}': download the model again")
        for axis in (_OUT, _IN):
            _check_alike("other experts have", [(header, axis) for header in part.values()], model)


def _joined(layer: Layer) -> Iterator[Ends]:
    """Ends of the weights of one module that have one width."""
    modules: dict[str, dict[str, TensorHeader]] = {}
    for rest, header in _folded(layer):
        module, _, leaf = rest.rpartition(".")
        modules.setdefault(module, {})[leaf] = header
    for linears in modules.values():
        for known in (_ATTENTION, _MLP):
            yield [(linears[leaf], axis) for leaf, axis in known.items() if leaf in linears]
        if linears.keys() >= _MLP.keys():
            yield [(linears[leaf], 1 - axis) for leaf, axis in _MLP.items()]


def _across(layers: Iterable[Layer], *, is_uniform: bool) -> Iterator[Ends]:
    """The same end of the same weight in each layer; other ends than hidden states only in layers whose
    tensors have the same names.
    """
    found: dict[tuple[str, int, int], Ends] = {}
    kinds: dict[tuple[str, ...], int] = {}
    known = _ATTENTION | _MLP
    for layer in layers:
        kind = kinds.setdefault(tuple(sorted(layer)), len(kinds))
        one_each: dict[str, TensorHeader] = {}  # experts of a layer are alike
        for rest, header in _folded(layer):
            expert = EXPERT.match(f"{rest}.weight")
            one_each.setdefault(f"{expert[1]}.{expert[3]}" if expert else rest, header)
        for name, header in one_each.items():
            for axis in (_OUT, _IN):
                is_hidden = known.get(name.rpartition(".")[2]) == axis
                if is_hidden or is_uniform:
                    found.setdefault((name, axis, -1 if is_hidden else kind), []).append((header, axis))
    yield from found.values()


def _folded(layer: Layer) -> Iterator[tuple[str, TensorHeader]]:
    """The EXL3 weights, by name without the last part."""
    return ((rest.removesuffix(".weight"), h) for rest, h in layer.items() if bits_of(h.dtype))


def _check_alike(others: str, ends: Ends, model: str) -> None:
    """Widths are compared as EXL3 pads them."""
    widths = [-(-header.shape[axis] // BLOCK) * BLOCK for header, axis in ends]
    if len(set(widths)) < 2:
        return
    usual = Counter(widths).most_common(1)[0][0]
    header, axis = next(end for end, width in zip(ends, widths, strict=True) if width != usual)
    raise ModelFilesError(
        f"{model}: {header.name.removesuffix('.weight')} has {header.shape[axis]} "
        f"{'inputs' if axis == _IN else 'outputs'}, where {others} {usual}: download the model again"
    )
