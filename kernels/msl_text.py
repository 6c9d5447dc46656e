"""The Metal source that MLX makes around a kernel's body, made here: signature, template, instantiation.

mx.fast.metal_kernel writes it in C++ (mlx/backend/common/metal_kernel.cpp) and shows it only by printing it
while a function is exported; the emulator and the compile checks need it in a running node.
tests/test_golden_msl.py holds both to the same text, character by character. Values only, any thread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import mlx.core as mx

MAX_CONSTANT_SIZE = 8  # an input of fewer elements lies in the constant address space
TYPE_NAMES = {
    mx.bool_: "bool",
    mx.uint8: "uint8_t",
    mx.uint16: "uint16_t",
    mx.uint32: "uint32_t",
    mx.uint64: "uint64_t",
    mx.int8: "int8_t",
    mx.int16: "int16_t",
    mx.int32: "int32_t",
    mx.int64: "int64_t",
    mx.float16: "float16_t",
    mx.bfloat16: "bfloat16_t",
    mx.float32: "float",
}
ATTRIBUTES = {
    "dispatch_quadgroups_per_threadgroup": "uint",
    "dispatch_simdgroups_per_threadgroup": "uint",
    "dispatch_threads_per_threadgroup": "uint3",
    "grid_origin": "uint3",
    "grid_size": "uint3",
    "quadgroup_index_in_threadgroup": "uint",
    "quadgroups_per_threadgroup": "uint",
    "simdgroup_index_in_threadgroup": "uint",
    "simdgroups_per_threadgroup": "uint",
    "thread_execution_width": "uint",
    "thread_index_in_quadgroup": "uint",
    "thread_index_in_simdgroup": "uint",
    "thread_index_in_threadgroup": "uint",
    "thread_position_in_grid": "uint3",
    "thread_position_in_threadgroup": "uint3",
    "threadgroup_position_in_grid": "uint3",
    "threadgroups_per_grid": "uint3",
    "threads_per_grid": "uint3",
    "threads_per_simdgroup": "uint",
    "threads_per_threadgroup": "uint3",
}
TemplateValue = int | bool | mx.Dtype


@dataclass(frozen=True, slots=True)
class Operand:
    """An input or output as the generated text sees it: name in the body, dtype, rank, elements."""

    name: str
    dtype: mx.Dtype
    ndim: int
    size: int

    @property
    def is_constant(self) -> bool:
        return self.size < MAX_CONSTANT_SIZE


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of the generated function; `operand` names the input or output it belongs to."""

    kind: Literal["input", "shape", "strides", "ndim", "output", "attribute"]
    operand: str
    c_type: str  # without address space: "const float*", "const int&", "uint3"
    declaration: str


@dataclass(frozen=True, slots=True)
class Generated:
    """The whole source of one instantiation, and what a caller has to know of it."""

    entry: str  # the function's name
    arguments: str  # "<bfloat16_t, 4>", or "" without a template
    parameters: tuple[Parameter, ...]
    text: str


def template_text(value: TemplateValue) -> str:
    return TYPE_NAMES[value] if isinstance(value, mx.Dtype) else str(int(value))


def _template_kind(value: TemplateValue) -> str:
    if isinstance(value, mx.Dtype):
        return "typename"
    return "bool" if isinstance(value, bool) else "int"


def parameters(body: str, inputs: Sequence[Operand], outputs: Sequence[Operand]) -> list[Parameter]:
    """In the order of the buffers, attributes last. A shape is passed where the body says NAME_shape."""
    found: list[Parameter] = []

    def buffer(kind: Literal["input", "shape", "strides", "ndim", "output"], of: str, text: str) -> None:
        c_type, name = text.rsplit(" ", 1)
        plain = c_type.replace("constant ", "").replace("device ", "")
        found.append(Parameter(kind, of, plain, f"  {c_type} {name} [[buffer({len(found)})]]"))

    for x in inputs:
        space = "constant" if x.is_constant else "device"
        reference = "*" if x.ndim else "&"
        buffer("input", x.name, f"const {space} {TYPE_NAMES[x.dtype]}{reference} {x.name}")
        if x.ndim and f"{x.name}_shape" in body:
            buffer("shape", x.name, f"const constant int* {x.name}_shape")
        if x.ndim and f"{x.name}_strides" in body:
            buffer("strides", x.name, f"const constant int64_t* {x.name}_strides")
        if x.ndim and f"{x.name}_ndim" in body:
            buffer("ndim", x.name, f"const constant int& {x.name}_ndim")
    for x in outputs:
        buffer("output", x.name, f"device {TYPE_NAMES[x.dtype]}* {x.name}")
    for name, c_type in ATTRIBUTES.items():
        if name in body:
            found.append(Parameter("attribute", name, c_type, f"  {c_type} {name} [[{name}]]"))
    return found


def generate(
    name: str,
    header: str,
    body: str,
    *,
    inputs: Sequence[Operand],
    outputs: Sequence[Operand],
    template: Mapping[str, TemplateValue],
) -> Generated:
    """What MLX hands to Metal for one call of kernel `name`."""
    values = [template_text(value) for value in template.values()]
    arguments = f"<{', '.join(values)}>" if values else ""
    entry = f"custom_kernel_{name}" + (f"__{'_'.join(values)}" if values else "")
    for x in inputs:
        entry += f"_{TYPE_NAMES[x.dtype]}" + ("s" if x.ndim == 0 else "c" if x.is_constant else "")
    for x in outputs:
        entry += f"_{TYPE_NAMES[x.dtype]}"
    declared = parameters(body, inputs, outputs)
    text = header
    if values:
        kinds = ", ".join(f"{_template_kind(value)} {key}" for key, value in template.items())
        text += f"template <{kinds}>\n"
    signature = ",\n".join(p.declaration for p in declared)
    text += f"[[kernel]] void {entry}(\n{signature}) {{\n{body}\n}}\n"
    if values:
        instance = f"{entry}{arguments}"
        text += f'\ntemplate [[host_name("{entry}")]] [[kernel]] decltype({instance}) {instance};\n'
    return Generated(entry, arguments, tuple(declared), text)
