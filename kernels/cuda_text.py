"""The text pass from a Metal body to a CUDA one for mx.fast.cuda_kernel: a simdgroup is a warp, a threadgroup
a block. Values only, any thread.

Words for address spaces go, storage of a threadgroup becomes __shared__, tables in a header __constant__, and
what stands in [[brackets]] in Metal becomes a local variable. The rest is Metal's names in
kernels/cuda/metal_library.h.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import mlx.core as mx

from kernels.emulator.translate import DECLARATION
from kernels.msl_text import ATTRIBUTES, Operand, TemplateValue
from kernels.msl_text import TYPE_NAMES as METAL_NAMES

LIBRARY = Path(__file__).resolve().parent / "cuda" / "metal_library.h"
TYPE_NAMES = {**METAL_NAMES, mx.float16: "__half", mx.bfloat16: "__nv_bfloat16"}
_SPACE = re.compile(r"\b(?:threadgroup|device|constant|thread)\b\s+(?=[\w:]|\()")
_TABLE = re.compile(r"^(?:constant\s+constexpr|constexpr\s+constant|constant)\s+(?=[\w:<> ]+\[)", flags=re.M)
_SCALAR = re.compile(r"^(?:constant\s+constexpr|constexpr\s+constant|constant)\s+(?=[\w:<> ]+=)", flags=re.M)
_LINEAR = "(threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z))"
_THREADS = "(blockDim.x * blockDim.y * blockDim.z)"
_ATTRIBUTES = {
    "dispatch_simdgroups_per_threadgroup": f"({_THREADS} + 31) / 32",
    "dispatch_threads_per_threadgroup": "make_uint3(blockDim.x, blockDim.y, blockDim.z)",
    "simdgroup_index_in_threadgroup": f"{_LINEAR} / 32",
    "simdgroups_per_threadgroup": f"({_THREADS} + 31) / 32",
    "thread_execution_width": "32",
    "thread_index_in_simdgroup": f"{_LINEAR} % 32",
    "thread_index_in_threadgroup": _LINEAR,
    "thread_position_in_grid": (
        "make_uint3(blockIdx.x * blockDim.x + threadIdx.x, "
        "blockIdx.y * blockDim.y + threadIdx.y, blockIdx.z * blockDim.z + threadIdx.z)"
    ),
    "thread_position_in_threadgroup": "make_uint3(threadIdx.x, threadIdx.y, threadIdx.z)",
    "threadgroup_position_in_grid": "make_uint3(blockIdx.x, blockIdx.y, blockIdx.z)",
    "threadgroups_per_grid": "make_uint3(gridDim.x, gridDim.y, gridDim.z)",
    "threads_per_grid": "make_uint3(gridDim.x * blockDim.x, gridDim.y * blockDim.y, gridDim.z * blockDim.z)",
    "threads_per_simdgroup": "32",
    "threads_per_threadgroup": "make_uint3(blockDim.x, blockDim.y, blockDim.z)",
}


def _without_spaces(source: str) -> str:
    def declare(match: re.Match[str]) -> str:
        declared = re.split(r"[=;]", match[2])[0]
        is_pointer = "*" in declared or "&" in declared
        return match[0] if is_pointer else f"{match[1]}__shared__ {match[2]}"

    return _SPACE.sub("", DECLARATION.sub(declare, source))


def body(source: str) -> str:
    """The body of a Metal function as the body of a CUDA one.

    Raises ValueError for an attribute of the thread that CUDA has no equal of."""
    used = [name for name in ATTRIBUTES if re.search(rf"\b{name}\b", source)]
    missing = [name for name in used if name not in _ATTRIBUTES]
    if missing:
        raise ValueError(f"CUDA has no {', '.join(missing)}: write the kernel without.")
    known = "".join(f"  const {ATTRIBUTES[name]} {name} = {_ATTRIBUTES[name]};\n" for name in used)
    return known + _without_spaces(source)


@functools.cache
def library() -> str:
    return LIBRARY.read_text(encoding="utf-8")


def header(source: str) -> str:
    """Metal's library for CUDA, then a kernel's own headers."""
    tables = _SCALAR.sub("constexpr ", _TABLE.sub("__constant__ ", source))
    return library() + _without_spaces(tables)


def frame(
    name: str,
    headers: str,
    text: str,
    *,
    inputs: Sequence[Operand],
    outputs: Sequence[Operand],
    template: Mapping[str, TemplateValue],
) -> str:
    """The CUDA source of one instantiation, as MLX makes it (mlx/backend/cuda/custom_kernel.cpp), but for
    its own header of device functions, which is compiled into MLX."""
    arguments: list[str] = []
    for x in inputs:
        arguments.append(f"const {TYPE_NAMES[x.dtype]}* {x.name}")
        if x.ndim and f"{x.name}_shape" in text:
            arguments.append(f"const __grid_constant__ Shape {x.name}_shape")
        if x.ndim and f"{x.name}_strides" in text:
            arguments.append(f"const __grid_constant__ Strides {x.name}_strides")
        if x.ndim and f"{x.name}_ndim" in text:
            arguments.append(f"const __grid_constant__ int {x.name}_ndim")
    arguments.extend(f"{TYPE_NAMES[x.dtype]}* {x.name}" for x in outputs)
    constants = ""
    for key, value in template.items():
        if isinstance(value, mx.Dtype):
            constants += f"  using {key} = {TYPE_NAMES[value]};\n"
        else:
            is_bool = isinstance(value, bool)
            constants += f"  constexpr {'bool' if is_bool else 'int'} {key} = {str(value).lower()};\n"
    parameters = ",\n    ".join(arguments)
    shapes = ""
    if "__grid_constant__ S" in parameters:
        shapes = (
            "using Shape = cuda::std::array<int32_t, 10>;\nusing Strides = cuda::std::array<int64_t, 10>;\n"
        )
    includes = ("cuda_bf16.h", "cuda_fp16.h", "cuda/std/cstdint", *(["cuda/std/array"] if shapes else []))
    return (
        "".join(f"#include <{include}>\n" for include in includes)
        + f"{headers}namespace mlx::core::cu {{\n{shapes}"
        + f"__global__ void {name}(\n    {parameters}) {{\n{constants}\n{text}\n}}\n}}\n"
    )
