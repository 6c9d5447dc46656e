"""The rungs of kernels.ladder: each passes what is right, finds what is wrong, and says what it misses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from kernels import backend, row_sums
from kernels.emulator import build
from kernels.ladder import __main__ as ladder
from kernels.ladder import address_spaces, cuda_compiler, emulation, gpu
from kernels.ladder.case import Case
from kernels.ladder.cases import all_cases
from kernels.ladder.row_cases import row_sum_cases
from kernels.ladder.tracing import traced
from kernels.source import Kernel
from tests.emulated import needs_compiler

ROOT = Path(__file__).resolve().parent.parent
needs_clang = pytest.mark.skipif(
    address_spaces.compiler() is None, reason="no clang with C++ for OpenCL is here"
)
needs_cuda = pytest.mark.skipif(cuda_compiler.tool() is None, reason="neither NVRTC nor nvcc is here")


def case_of(body: str, tolerance: float = 1e-4) -> Case:
    """Row sums, or what is meant to be that."""
    kernel = Kernel("row_sums", ("x",), ("sums",), text=body)

    def run(x: mx.array) -> mx.array:
        return kernel(
            [x],
            template={"T": x.dtype, "COLUMNS": x.shape[1]},
            grid=(256 * x.shape[0], 1, 1),
            threadgroup=(256, 1, 1),
            shapes=[(x.shape[0],)],
            dtypes=[mx.float32],
        )[0]

    good = row_sum_cases()[0]
    return Case("changed", good.inputs, run, good.reference, tolerance, once=("x",))


@needs_compiler
@pytest.mark.parametrize(
    ("before", "after", "trouble"),
    [
        (
            "sum += float(source[i])",
            "sum += 1.01f * float(source[i])",
            "off by .* of the largest value, 1e-04 is allowed",
        ),
        ("threadgroup_barrier(mem_flags::mem_threadgroup);", "", "race: thread"),
        ("sums[row] = sum;", "if (row > 0) sums[row] = sum;", "off by inf of the largest value"),
        (
            "sum += float(source[i]);",
            "sum += 0.5f * float(source[i]) + 0.5f * float(((volatile const device T*)source)[i]);",
            "asks for 2.00 times the bytes of its weights",
        ),
    ],
)
@pytest.mark.long
def test_a_wrong_kernel_falls_off_the_emulators_rung(before: str, after: str, trouble: str) -> None:
    body = row_sums.KERNEL.body
    assert before in body
    result = emulation.emulate(case_of(body.replace(before, after)))
    with pytest.raises(AssertionError, match=trouble):
        assert not result.trouble, result.trouble


@needs_compiler
def test_a_right_kernel_stays_on_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert ladder.main(["emulate", "--only", "row_sums/3x1000-float32"]) == 0
    said = capsys.readouterr().out
    assert "1 launches" in said
    assert "1.00 x its bytes  ok\n1 of 1 cases pass\n" in said


@needs_compiler
@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_the_sanitizers_find_nothing_in_any_kernel(
    sanitizer: emulation.Sanitizer, capsys: pytest.CaptureFixture[str]
) -> None:
    if emulation.runtime(sanitizer) is None:
        pytest.skip(f"no library of the {sanitizer} sanitizer is here")
    assert ladder.main(["emulate", "--sanitizer", sanitizer]) == 0, capsys.readouterr()
    assert "cases pass" in capsys.readouterr().out


@needs_compiler
def test_the_parts_of_a_rung_are_all_of_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(emulation, "emulate", lambda case, _mode: emulation.Result(case, 1, 0.0, None))

    def names(*more: str) -> list[str]:
        assert ladder.main(["emulate", *more]) == 0
        *lines, total = capsys.readouterr().out.splitlines()
        assert total == f"{len(lines)} of {len(lines)} cases pass"
        return [line.split()[0] for line in lines]

    parts = [names("--part", f"{part}/5") for part in range(1, 6)]
    assert sorted(name for part in parts for name in part) == sorted(names())
    assert {len(part) for part in parts} <= {len(parts[0]), len(parts[0]) - 1}
    assert names("--only", "row_sums/3x1000", "--part", "2/2") == names("--only", "row_sums/3x1000")[1::2]


@pytest.mark.parametrize("part", ["0/8", "9/8", "3", "a/b", "1/0", "-1/2"])
def test_a_part_that_is_none_is_refused(part: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        ladder.main(["gpu", f"--part={part}"])
    assert f"{part!r} is no part: 2/8 is the second of eight" in capsys.readouterr().err


def test_the_golden_rung_takes_all_cases(capsys: pytest.CaptureFixture[str]) -> None:
    """Its files are compared as a whole: one that no case makes any more is a difference."""
    with pytest.raises(SystemExit):
        ladder.main(["golden", "--only", "row_sums"])
    assert "unrecognized arguments: --only row_sums" in capsys.readouterr().err


WRONG = """
from kernels.emulator import launch
from kernels.ladder.emulation import emulate
from tests.test_ladder import case_of
from kernels import row_sums
print(emulate(case_of(row_sums.KERNEL.body.replace({before!r}, {after!r})), {mode!r}))
"""


@needs_compiler
@pytest.mark.long
@pytest.mark.parametrize(
    ("sanitizer", "before", "after", "found"),
    [
        ("address", "float(source[i])", "float(source[i + COLUMNS])", "heap-buffer-overflow"),
        ("address", "partial[32]", "partial[4]", "use-after-poison"),
        ("thread", "threadgroup_barrier(mem_flags::mem_threadgroup);", "", "data race"),
    ],
)
def test_the_sanitizers_find_what_is_wrong(
    sanitizer: emulation.Sanitizer, before: str, after: str, found: str
) -> None:
    if emulation.runtime(sanitizer) is None:
        pytest.skip(f"no library of the {sanitizer} sanitizer is here")
    code = WRONG.format(before=before, after=after, mode=sanitizer)
    env = emulation.environment(sanitizer)
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 66, done.stdout
    assert found in done.stderr
    assert "row_sums.metal:" in done.stderr


@needs_compiler
@pytest.mark.long
@pytest.mark.timeout(1800)
def test_every_kernel_in_the_emulator() -> None:
    failed = {}
    for case in all_cases():
        if not case.is_full and (trouble := emulation.emulate(case).trouble):
            failed[case.name] = trouble
    assert not failed


@needs_clang
def test_metals_address_spaces() -> None:
    ((_, right),) = traced(row_sum_cases()[0])
    assert address_spaces.check(right) == ""
    for before, after, said in (
        ("const device T* source = x", "const threadgroup T* source = x", "__local"),
        (
            "threadgroup float partial[32];",
            "threadgroup float partial[32]; threadgroup float bad = 1.0f;",
            "initializer",
        ),
        ("sums[row] = sum;", "x[row] = sum;", "read-only"),
    ):
        assert before in right
        assert said in address_spaces.check(right.replace(before, after)), after


@needs_clang
@pytest.mark.long
@pytest.mark.timeout(600)
def test_every_kernels_address_spaces(capsys: pytest.CaptureFixture[str]) -> None:
    assert ladder.main(["spaces"]) == 0, capsys.readouterr().out


@needs_cuda
@pytest.mark.long
@pytest.mark.timeout(1800)
def test_every_kernel_compiles_as_cuda(capsys: pytest.CaptureFixture[str]) -> None:
    assert ladder.main(["cuda"]) == 0, capsys.readouterr().out


@needs_cuda
@pytest.mark.long
def test_what_cuda_does_not_take_is_said() -> None:
    assert "missing" in cuda_compiler.compiled("__global__ void k() { missing(); }").error


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(address_spaces, "compiler", lambda: None)
    monkeypatch.setattr(build, "compiler", lambda: None)
    monkeypatch.setattr(cuda_compiler, "tool", lambda: None)
    monkeypatch.setattr(backend, "current", lambda: None)
    for rung, reason in (
        ("spaces", "no clang that knows C++ for OpenCL is here (Debian: apt install clang-16)"),
        ("emulate", "no C++ compiler (g++ or clang++) is here"),
        ("cuda", "neither NVRTC (mlx[cuda13]) nor nvcc with its headers is here"),
        ("gpu", "MLX has no GPU here"),
    ):
        assert ladder.main([rung]) == 0
        assert capsys.readouterr().out == f"skipped: {reason}\n"


@needs_compiler
def test_the_gpu_rung_with_the_emulator_in_a_gpus_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "NUM_RUNS", 1)
    with backend.forced("emulated"):
        result = gpu.on_gpu(next(case for case in row_sum_cases() if case.name.endswith("3x1000-bfloat16")))
    assert (result.trouble, result.error < 1e-5) == ("", True)
