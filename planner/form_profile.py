"""The blocks of experts and EXL3 matrices of a layer, by the form that a node's self-test knows. Pure.

What has no such form, as experts with bits of their own each, is reckoned with by the rates of its formats.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from planner.exl3_shapes import EXPERT
from planner.forms import Form
from planner.headers import TensorHeader
from planner.layer_profile import FormUse, WeightFormat
from planner.loaded_bytes import LoadedBytes
from planner.speeds import EXL3

GATELESS = {"up_proj", "down_proj", "fc1", "fc2"}  # what experts without a gate call their matrices
Tensors = Mapping[str, TensorHeader]  # by the name after the layer's index


@dataclass(frozen=True, slots=True)
class Routing:
    """How a router chooses in this layer."""

    num_experts: int
    top_k: int
    hidden_size: int

    @property
    def share(self) -> float:
        """Of the experts, that one token chooses."""
        return min(self.top_k / self.num_experts, 1.0) if self.num_experts else 1.0


def layer_forms(
    tensors: LoadedBytes, dense: Tensors, routed: Tensors, routing: Routing
) -> tuple[FormUse, ...]:
    """Those of one layer; routed: what of its tensors a router chooses."""
    linears = [header for header in dense.values() if tensors.format_of(header).startswith(EXL3)]
    forms = _matrices(tensors, linears)
    if any(tensors.format_of(header).startswith(EXL3) for header in routed.values()):
        return (*forms, *_exl3_experts(tensors, routed, routing))
    block = _block(tensors, list(routed.values()), routing)
    return forms if block is None else (*forms, block)


def matrix_form(tensors: LoadedBytes, header: TensorHeader) -> FormUse | None:
    """A single matrix; None where it is not EXL3's."""
    return (
        next(iter(_matrices(tensors, [header])), None) if tensors.format_of(header).startswith(EXL3) else None
    )


def _matrices(tensors: LoadedBytes, headers: Iterable[TensorHeader]) -> tuple[FormUse, ...]:
    found: dict[Form, list[TensorHeader]] = {}
    for header in headers:
        num_out, num_in = header.shape
        found.setdefault(Form(1, 1, num_in, num_out, (tensors.format_of(header),)), []).append(header)
    return tuple(
        FormUse(form, len(same), _weights(tensors, same, is_routed=False, share=1.0))
        for form, same in found.items()
    )


def _exl3_experts(tensors: LoadedBytes, routed: Tensors, routing: Routing) -> Iterable[FormUse]:
    """A matrix of all experts is one call."""
    lists: dict[tuple[str, str], list[TensorHeader]] = {}
    for rest, header in routed.items():
        if found := EXPERT.match(rest):
            lists.setdefault((found[1], found[3]), []).append(header)
    for same in lists.values():
        formats, shapes = {tensors.format_of(header) for header in same}, {header.shape for header in same}
        if len(formats) == len(shapes) == 1 and len(same) == routing.num_experts:
            num_out, num_in = same[0].shape
            form = Form(routing.num_experts, routing.top_k, num_in, num_out, tuple(formats))
            yield FormUse(form, 1, _weights(tensors, same, is_routed=True, share=routing.share))


def _block(tensors: LoadedBytes, routed: Sequence[TensorHeader], routing: Routing) -> FormUse | None:
    """Gate, where there is one, up and down have equally many weights, however a checkpoint joins them."""
    matrices = [header for header in routed if not header.name.endswith("bias")]
    params: dict[str, int] = {}
    for header in matrices:
        if count := tensors.params_of(header):
            name = tensors.format_of(header)
            params[name] = params.get(name, 0) + count
    is_gateless = {header.name.split(".")[-2] for header in matrices} <= GATELESS
    each, rest = divmod(sum(params.values()), 2 if is_gateless else 3)
    width, more = divmod(each, max(1, routing.num_experts * routing.hidden_size))
    if not width or rest or more or any(count % each for count in params.values()):
        return None
    formats = tuple(sorted(name for name, count in params.items() for _ in range(count // each)))
    form = Form(routing.num_experts, routing.top_k, routing.hidden_size, width, formats)
    return FormUse(form, 1, _weights(tensors, routed, is_routed=True, share=routing.share))


def _weights(
    tensors: LoadedBytes, headers: Iterable[TensorHeader], *, is_routed: bool, share: float
) -> tuple[WeightFormat, ...]:
    """What the layer's own sums have of these tensors, format by format."""
    sums: dict[str, list[int]] = {}
    for header in headers:
        own = sums.setdefault(tensors.format_of(header), [0, 0, 0])
        own[is_routed] += tensors.bytes_of(header)
        own[2] += round(tensors.params_of(header) * share)
    return tuple(WeightFormat(name, *amounts) for name, amounts in sums.items())
