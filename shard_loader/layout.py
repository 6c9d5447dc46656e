"""What one lazy forward pass tells about a model: which caches, calls and carries its layers have.

Everything is traced on stand-ins without memory, so no weight is read or evaluated. Compute thread only.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models.cache import make_prompt_cache

from shard_loader.carry import CarryError, flatten, unflatten
from shard_loader.sharing import Sharing

TRACE_TOKENS = 1  # what a decode step has
NEVER = "the model uses the parts of its layers, never a layer as a whole"


@dataclass(frozen=True, slots=True)
class CarrySpec:
    """The carry that leaves one layer, without its numbers. Shapes are those of TRACE_TOKENS tokens."""

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[Any, ...]
    structure: str
    template: Any  # the pytree with objects as `ObjectTemplate`; None where no object occurs

    def zeros(self) -> Any:
        """A placeholder carry of TRACE_TOKENS tokens, as it comes from the wire."""
        arrays = [mx.zeros(shape, dtype) for shape, dtype in zip(self.shapes, self.dtypes, strict=True)]
        return unflatten(arrays, self.structure)


@dataclass(frozen=True, slots=True)
class ObjectTemplate:
    """A Python object in a carry: it crosses the cut as the dict of its attributes."""

    cls: type
    attributes: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Layout:
    """One model's layers as its own forward pass uses them."""

    num_layers: int
    cache_kinds: tuple[Any, ...]  # one entry per cache; equal kinds can stand in for each other
    received: tuple[frozenset[int], ...]  # per layer: the caches it is given
    num_calls: tuple[int, ...]  # per layer and forward pass
    carries: tuple[CarrySpec | str, ...]  # per layer: what crosses a cut behind it, or why nothing can
    vocab_size: int
    sharing: Sharing  # what layers read of other layers

    @property
    def unreceived(self) -> frozenset[int]:
        """Caches that no layer is given (the model itself uses them): every stage needs its own."""
        return frozenset(range(len(self.cache_kinds))).difference(*self.received)


def ghost(array: mx.array) -> mx.array:
    """An array of the same shape and dtype that takes no memory; floats are NaN, so that a use shows."""
    fill = float("nan") if mx.issubdtype(array.dtype, mx.inexact) else 0
    return mx.broadcast_to(mx.array(fill, array.dtype), array.shape)


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The decoder layers of a model, in order."""
    return list(model.layers)


@contextmanager
def swapped(layers: Sequence[nn.Module], make: Callable[[type, int], type]) -> Iterator[None]:
    """Within the block, layer i has the class make(its class, i)."""
    bases = [type(layer) for layer in layers]
    for i, (layer, base) in enumerate(zip(layers, bases, strict=True)):
        layer.__class__ = make(base, i)
    try:
        yield
    finally:
        for layer, base in zip(layers, bases, strict=True):
            layer.__class__ = base


def subclass(base: type, call: Callable[..., Any]) -> type:
    """`base` with another `__call__`, under the same name, so that the model cannot tell them apart."""
    return type(base.__name__, (base,), {"__call__": call, "__module__": base.__module__})


def trace(model: nn.Module) -> Layout:
    """Runs `model` once on stand-ins and tells what each of its layers received and returned.

    `model` is left exactly as it was. Raises ValueError if its layers are not all distinct objects.
    """
    layers = decoder_layers(model)
    if len({id(layer) for layer in layers}) != len(layers):
        raise ValueError("some decoder layers of this model are the same object, so they cannot be cut apart")
    with _stand_ins(model):
        caches = make_prompt_cache(model)
        index_of = _cache_ids(caches)
        received: list[set[int]] = [set() for _ in layers]
        num_calls = [0 for _ in layers]
        sharing = Sharing(len(layers))

        def make(base: type, i: int) -> type:
            def call(self: Any, *args: Any, **kwargs: Any) -> Any:
                sharing.entered(i, args, kwargs)
                for value in _objects((*args, *kwargs.values())):
                    if id(value) in index_of:
                        received[i].add(index_of[id(value)])
                sharing.received(i, received[i])
                out = base.__call__(self, *args, **kwargs)
                sharing.left(i, out, args, kwargs)
                num_calls[i] += 1
                return out

            return subclass(base, call)

        with swapped(layers, make), sharing.watching(caches):
            logits = model(mx.zeros((1, TRACE_TOKENS), mx.int32), cache=caches)
        carries = tuple(_carry_at(sharing, i + 1) if num_calls[i] else NEVER for i in range(len(layers)))
    return Layout(
        num_layers=len(layers),
        cache_kinds=tuple(cache_kind(cache) for cache in caches),
        received=tuple(frozenset(indices) for indices in received),
        num_calls=tuple(num_calls),
        carries=carries,
        vocab_size=int(logits.shape[-1]),
        sharing=sharing,
    )


@contextmanager
def _stand_ins(model: nn.Module) -> Iterator[None]:
    """Ghosts instead of parameters; whatever the modules remember of them is forgotten afterwards."""
    parameters = model.parameters()
    remembered = [(module, dict(module), dict(module.__dict__)) for module in model.modules()]
    model.update(tree_map(ghost, parameters))
    try:
        yield
    finally:
        model.update(parameters)
        for module, items, attributes in remembered:
            module.clear()
            dict.update(module, items)
            module.__dict__.clear()
            module.__dict__.update(attributes)


def _cache_ids(caches: Sequence[Any]) -> dict[int, int]:
    """id of each cache and of its parts -> index in the cache list."""
    return {id(part): i for i, cache in enumerate(caches) for part in _objects((cache,)) if part is not None}


def _objects(values: Sequence[Any]) -> Iterator[Any]:
    """The values, and what tuples, lists and mlx-lm's CacheList among them hold."""
    for value in values:
        yield value
        inner = getattr(value, "caches", value)
        if isinstance(inner, (tuple, list)):
            yield from _objects(inner)


def cache_kind(cache: Any) -> Any:
    """Equal for caches whose offsets and masks agree whenever they have seen the same tokens."""
    inner = getattr(cache, "caches", cache)
    if isinstance(inner, (tuple, list)):
        return (type(cache).__name__, *(cache_kind(part) for part in inner))
    attributes = getattr(cache, "__dict__", {})
    return (type(cache).__name__, *sorted((k, v) for k, v in attributes.items() if isinstance(v, (int, str))))


def _carry_at(sharing: Sharing, cut: int) -> CarrySpec | str:
    crossing = sharing.crossing(cut)
    return crossing if isinstance(crossing, str) else _carry_spec(sharing.carry(crossing))


def _carry_spec(out: Any) -> CarrySpec | str:
    template = _template(out)
    try:
        arrays, structure = flatten(to_plain(out))
    except CarryError as error:
        return str(error)
    return CarrySpec(
        shapes=tuple(tuple(a.shape) for a in arrays),
        dtypes=tuple(a.dtype for a in arrays),
        structure=structure,
        template=template,
    )


def _is_object(value: Any) -> bool:
    return hasattr(value, "__dict__") and not isinstance(value, (mx.array, nn.Module, type))


def _template(value: Any) -> Any:
    """None where `value` holds no object, else its containers down to the objects."""
    if _is_object(value):
        return ObjectTemplate(type(value), {k: _template(v) for k, v in vars(value).items()})
    if type(value) in (tuple, list):
        items = [_template(item) for item in value]
        return items if any(item is not None for item in items) else None
    if type(value) is dict:
        entries = {k: _template(v) for k, v in value.items()}
        return entries if any(v is not None for v in entries.values()) else None
    return None


def to_plain(value: Any) -> Any:
    """`value` with each object replaced by the dict of its attributes."""
    if _is_object(value):
        return {k: to_plain(v) for k, v in vars(value).items()}
    if type(value) in (tuple, list):
        return type(value)(to_plain(item) for item in value)
    if type(value) is dict:
        return {k: to_plain(v) for k, v in value.items()}
    return value


def from_plain(plain: Any, template: Any) -> Any:
    """The inverse of `to_plain`; classes come from this process's own trace, never from the wire."""
    if template is None:
        return plain
    if isinstance(template, ObjectTemplate):
        if type(plain) is not dict or plain.keys() != template.attributes.keys():
            raise CarryError(f"a carry does not hold the attributes of a {template.cls.__name__}")
        value: Any = object.__new__(template.cls)
        value.__dict__.update({k: from_plain(v, template.attributes[k]) for k, v in plain.items()})
        return value
    if isinstance(template, dict):
        return {k: from_plain(v, template.get(k)) for k, v in plain.items()}
    return type(plain)(from_plain(v, t) for v, t in zip(plain, template, strict=True))


def parameters_read(outputs: Any, candidates: Mapping[str, mx.array]) -> set[str]:
    """Which of the lazy `candidates` the lazy `outputs` depend on. Evaluates nothing.

    MLX's own graph export lists every primitive that is still to run with the arrays it reads; an array with
    a consumer there is one that evaluating the outputs would have to load.
    https://ml-explore.github.io/mlx/build/html/python/_autosummary/mlx.core.export_to_dot.html
    """
    names = {f"p{i}": name for i, name in enumerate(candidates)}
    arrays = {alias: candidates[name] for alias, name in names.items()}
    roots = [value for _, value in tree_flatten({"outputs": outputs}) if isinstance(value, mx.array)]
    graph = io.StringIO()
    mx.export_to_dot(graph, *roots, **arrays)
    consumed = set(re.findall(r'^"(p\d+)" -> ', graph.getvalue(), re.MULTILINE))
    return {names[alias] for alias in consumed}
