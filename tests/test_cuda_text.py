"""The text pass from Metal to CUDA."""

from __future__ import annotations

import mlx.core as mx
import pytest

from kernels import cuda_text
from kernels.msl_text import Operand


def test_address_spaces_go_and_storage_is_shared() -> None:
    body = """
    threadgroup float s[32];
    threadgroup T a[2][3], b;
    const device T* p = x + thread_position_in_grid.x;
    threadgroup float* q = s;
    thread float& r = v[0];
    threadgroup_barrier(mem_flags::mem_threadgroup);
    f((const device uchar*)x);
"""
    assert (
        cuda_text.body(body).partition(";\n")[2]
        == """
    __shared__ float s[32];
    __shared__ T a[2][3], b;
    const T* p = x + thread_position_in_grid.x;
    float* q = s;
    float& r = v[0];
    threadgroup_barrier(mem_flags::mem_threadgroup);
    f((const uchar*)x);
"""
    )


def test_tables_are_constant_memory_and_numbers_are_constants() -> None:
    source = (
        "constant float table[2] = {1, 2};\n"
        "constant constexpr uint n = 3;\n"
        "constexpr constant half t[1] = {1};\n"
    )
    assert cuda_text.header(source).endswith(
        "__constant__ float table[2] = {1, 2};\nconstexpr uint n = 3;\n__constant__ half t[1] = {1};\n"
    )


def test_what_cuda_has_no_equal_of_is_refused() -> None:
    with pytest.raises(
        ValueError, match="CUDA has no quadgroup_index_in_threadgroup: write the kernel without"
    ):
        cuda_text.body("out[0] = quadgroup_index_in_threadgroup;")


def test_the_frame_is_mlxs() -> None:
    text = cuda_text.frame(
        "k",
        "// header\n",
        "out[0] = x[x_shape[0]];",
        inputs=[Operand("x", mx.bfloat16, 1, 9)],
        outputs=[Operand("out", mx.float32, 1, 9)],
        template={"T": mx.float16, "N": 3, "IS": True},
    )
    assert text.endswith(
        """__global__ void k(
    const __nv_bfloat16* x,
    const __grid_constant__ Shape x_shape,
    float* out) {
  using T = __half;
  constexpr int N = 3;
  constexpr bool IS = true;

out[0] = x[x_shape[0]];
}
}
"""
    )
