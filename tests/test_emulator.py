"""The emulator: Metal's library as Metal has it, and kernels that are wrong on purpose."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from kernels import row_sums
from kernels.emulator import build, launch
from kernels.source import Kernel
from tests.emulated import needs_compiler

pytestmark = [needs_compiler, pytest.mark.usefixtures("emulated")]

FAULTS = """
    threadgroup float s[64];
    const uint i = thread_index_in_threadgroup;
    const uint g = threadgroup_position_in_grid.x * 64 + i;
    s[i] = x[i];
    switch (which[0]) {
    case 0:  // right
        threadgroup_barrier(mem_flags::mem_threadgroup);
        out[g] = s[63 - i];
        break;
    case 1:  // no barrier
        out[g] = s[63 - i];
        break;
    case 2:  // a barrier that orders other memory
        threadgroup_barrier(mem_flags::mem_device);
        out[g] = s[63 - i];
        break;
    case 3:  // a barrier of the simdgroup, for its neighbour in it
        simdgroup_barrier(mem_flags::mem_threadgroup);
        out[g] = s[i ^ 1];
        break;
    case 4:  // the same, for one of the other simdgroup
        simdgroup_barrier(mem_flags::mem_threadgroup);
        out[g] = s[i ^ 32];
        break;
    case 5:  // written while others still read
        threadgroup_barrier(mem_flags::mem_threadgroup);
        out[g] = s[i ^ 32];
        s[i] = 0.0f;
        break;
    case 6:
        out[g] = x[i + 1];
        break;
    case 7:
        out[g + 1] = x[i];
        break;
    case 8:
        ((device float*)x)[i] = 1.0f;
        break;
    case 9:  // every threadgroup writes the same
        out[i] = x[i];
        break;
    case 13:  // half of the lanes load the same
        out[g] = x[i / 2];
        break;
    case 12:
        s[i + 1] = 1.0f;
        break;
    case 10:
        if (i < 10) return;
        threadgroup_barrier(mem_flags::mem_threadgroup);
        break;
    case 11:
        if (i % 2) out[g] = simd_sum(x[i]);
        else out[g] = simd_max(x[i]);
        break;
    }
"""


def run_faulty(which: int, order: launch.Order = "forward") -> launch.Launch:
    kernel = Kernel("faulty", ("x", "which"), ("out",), text=FAULTS)
    with launch.options(order=order, mode="watched") as log:
        kernel(
            [mx.arange(64).astype(mx.float32), mx.array([which])],
            grid=(128, 1, 1),
            threadgroup=(64, 1, 1),
            shapes=[(128,)],
            dtypes=[mx.float32],
        )
    return log.launches[0]


@pytest.mark.parametrize("order", launch.ORDERS)
def test_what_a_kernel_moves_is_counted(order: launch.Order) -> None:
    traffic = run_faulty(0, order).traffic
    read = traffic["x"]
    assert (read.requested_bytes, read.touched_bytes, read.written_bytes) == (2 * 64 * 4, 64 * 4, 0)
    assert traffic["out"].written_bytes == 128 * 4
    run_faulty(3, order)
    halves = run_faulty(13, order).traffic["x"]
    # each thread loads its own for s besides
    assert (halves.loaded_bytes, halves.requested_bytes) == (2 * 64 * 4 * 2, 2 * 64 * 4 + 2 * 32 * 4)


@pytest.mark.parametrize("order", launch.ORDERS)
@pytest.mark.parametrize(
    ("which", "message"),
    [
        (1, "race: thread .* of s, which .* of this threadgroup .* with no barrier between"),
        (2, "race: thread .* of s, which"),
        (4, "race: thread .* of s, which"),
        (5, "race: thread .* of s, which"),
        (6, "reads 4 bytes at byte 256 of x, which has 256"),
        (7, "writes 4 bytes at byte 512 of out, which has 512|race: thread .* of out"),
        (12, "writes 4 bytes at byte 256 of the threadgroup's s, which has 256|race: thread .* of s, which"),
        (8, "writes to its input x"),
        (9, "race: thread .* writes byte .* of out, which thread .* of another threadgroup writes"),
        (10, "deadlock: 54 threads wait .thread .. at threadgroup_barrier in line .*, 10 have returned"),
        (11, "divergent collective: some threads are at simd_.* in line .*, others at simd_.* in line"),
    ],
)
def test_what_is_wrong_is_found_in_every_order(which: int, message: str, order: launch.Order) -> None:
    with pytest.raises(build.EmulatorError, match=f"faulty: .*({message})"):
        run_faulty(which, order)


LIBRARY = """
    const uint i = thread_position_in_grid.x;
    const float v = x[i];
    out[i] = simd_sum(v);
    out[32 + i] = simd_max(v);
    out[64 + i] = simd_shuffle_xor(v, ushort(1));
    out[96 + i] = simd_shuffle_down(v, ushort(2));
    out[128 + i] = simd_prefix_exclusive_sum(v);
    out[160 + i] = float(half(v) * half(3.0f) + half(0.1f));
    out[192 + i] = float(bfloat16_t(v) * bfloat16_t(1.1f) + bfloat16_t(0.3f));
    out[224 + i] = float(extract_bits(uint(i) * 2654435761u, 5u, 7u));
    float4 f = float4(v, v + 1.0f, 2.0f, 3.0f) * 2.0f;
    out[256 + i] = dot(f, float4(1.0f)) + f.xy.y + f[2] + metal::fma(v, v, 1.0f);
    out[288 + i] = float(as_type<half>(ushort(0x3c00 + i)));
    simdgroup_matrix<float, 8, 8> a, b, c = make_filled_simdgroup_matrix<float>(1.0f);
    simdgroup_load(a, x, 8);
    simdgroup_load(b, x, 8);
    simdgroup_multiply_accumulate(c, a, b, c);
    simdgroup_store(c, out + 320, 8);
    if (i == 0) half_out[0] = bfloat16_t(1.0f);
"""


def test_metals_library_and_nan_where_nothing_is_written() -> None:
    kernel = Kernel("library", ("x",), ("out", "number", "half_out"), text=LIBRARY)
    x = mx.random.normal((64,), key=mx.random.key(1))
    out, number, half_out = kernel(
        [x],
        grid=(32, 1, 1),
        threadgroup=(32, 1, 1),
        shapes=[(390,), (2,), (3,)],
        dtypes=[mx.float32, mx.uint32, mx.bfloat16],
    )
    assert mx.isnan(out).tolist() == [False] * 384 + [True] * 6
    assert mx.isnan(half_out).tolist() == [False, True, True]
    assert number.tolist() == [0xFFFFFFFF] * 2
    v, i = np.array(x)[:32], np.arange(32)
    found = np.array(out)[:320].reshape(-1, 32)
    assert np.allclose(found[0], v.sum(), atol=1e-5)
    assert (found[1] == v.max()).all()
    assert (found[2] == v[i ^ 1]).all()
    assert (found[3] == np.concatenate([v[2:], v[30:]])).all()
    assert np.allclose(found[4], np.concatenate([[0], np.cumsum(v)[:-1]]), atol=1e-5)
    assert (found[5] == (v.astype(np.float16) * np.float16(3) + np.float16(0.1)).astype(np.float32)).all()
    bf = mx.array(v).astype(mx.bfloat16) * mx.array(1.1, mx.bfloat16) + mx.array(0.3, mx.bfloat16)
    assert found[6].tolist() == bf.astype(mx.float32).tolist()
    assert (found[7] == ((i.astype(np.uint32) * np.uint32(2654435761)) >> 5 & 127)).all()
    assert np.allclose(found[8], 2 * (2 * v + 1 + 5) + 2 * (v + 1) + 4 + v * v + 1, atol=1e-5)
    assert (found[9] == (0x3C00 + i).astype(np.uint16).view(np.float16)).all()
    square = np.array(x).reshape(8, 8)
    assert np.allclose(np.array(out)[320:384].reshape(8, 8), square @ square + 1, atol=1e-5)


def test_a_kernel_is_compiled_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    x = mx.ones((2, 1000), mx.bfloat16)
    row_sums.row_sums(x)
    monkeypatch.setattr(build, "_run", lambda command: pytest.fail(f"compiles again: {command}"))
    launch._loaded.cache_clear()
    assert row_sums.row_sums(x).tolist() == [1000.0, 1000.0]


def test_without_a_compiler_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "compiler", lambda: None)
    with pytest.raises(
        build.EmulatorError, match=r"needs a C\+\+ compiler: install g\+\+ or clang\+\+, or set CXX"
    ):
        row_sums.row_sums(mx.ones((2, 41)))


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("exit 3", r"the C\+\+ compiler \S+broken does not work, set CXX to another: it ended with code 3$"),
        (
            '[ "$1" = --version ] && exit; echo In file: >&2; echo b: fatal error: no cc1plus >&2; exit 1',
            r"^the kernel does not compile with \S+broken: b: fatal error: no cc1plus\n",
        ),
    ],
)
def test_a_compiler_that_fails_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str, said: str
) -> None:
    path = tmp_path / "broken"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setattr(build, "compiler", lambda: str(path))
    launch._loaded.cache_clear()
    with pytest.raises(build.EmulatorError, match=said):
        row_sums.row_sums(mx.ones((2, 41)))


@pytest.mark.long
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("out[0] = foo(x[0]);", r"does not compile with \S+: \S+: error: .*foo"),
        (
            "threadgroup float s[8448]; s[0] = x[0]; out[0] = s[0];",
            "threadgroup memory of 33792 bytes, the limit is 32768",
        ),
        (
            "float v[100000]; for (int k = 0; k < 100000; k++) v[k] = x[k & 7]; out[0] = v[int(x[0])];",
            "own arrays take more than 64 KiB",
        ),
    ],
)
def test_what_no_gpu_takes_is_refused(text: str, message: str) -> None:
    kernel = Kernel("refused", ("x",), ("out",), text=text)
    with pytest.raises(build.EmulatorError, match=message):
        kernel([mx.zeros((8,))], grid=(32, 1, 1), threadgroup=(32, 1, 1), shapes=[(1,)], dtypes=[mx.float32])
