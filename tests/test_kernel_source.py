"""A kernel's launch: what it accepts, what runs it, and that it is counted."""

from __future__ import annotations

import mlx.core as mx
import pytest

from kernels import backend, row_sums, source
from kernels.emulator import launch
from kernels.source import Kernel, recorded
from tests.emulated import needs_compiler


def test_the_environment_picks_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MACRAME_KERNELS", "off")
    assert backend.current() is None
    monkeypatch.setenv("MACRAME_KERNELS", "emulate")
    assert backend.current() == "emulated"
    monkeypatch.delenv("MACRAME_KERNELS")
    assert backend.current() == (
        "metal" if mx.metal.is_available() else "cuda" if mx.cuda.is_available() else None
    )
    monkeypatch.setenv("MACRAME_KERNELS", "fast")
    with pytest.raises(ValueError, match="MACRAME_KERNELS is 'fast': say on, off or emulate"):
        backend.current()


def test_no_backend_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MACRAME_KERNELS", "off")
    with pytest.raises(RuntimeError, match="The kernel row_sums has no GPU to run on"):
        row_sums.row_sums(mx.zeros((2, 3)))


@needs_compiler
@pytest.mark.usefixtures("emulated")
def test_the_sums_are_right_in_every_order_of_threads_and_bit_for_bit_the_same() -> None:
    x = mx.random.normal((3, 1000), key=mx.random.key(0)).astype(mx.bfloat16)
    found = []
    for order in launch.ORDERS:
        with launch.options(order=order) as log:
            found.append(row_sums.row_sums(x).tolist())
        assert [entry.kernel for entry in log.launches] == ["row_sums"]
    assert found[0] == found[1] == found[2]
    assert mx.allclose(mx.array(found[0]), x.astype(mx.float32).sum(axis=1), rtol=1e-5, atol=1e-4)


@needs_compiler
@pytest.mark.usefixtures("emulated")
def test_launches_are_recorded() -> None:
    with recorded() as calls:
        row_sums.row_sums(mx.zeros((2, 1000), mx.bfloat16))
    assert [(call.kernel.name, call.grid, call.shapes) for call in calls] == [
        ("row_sums", (512, 1, 1), ((2,),))
    ]


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"arrays": [mx.array(1.0)]}, r"row_sums: x has no dimension: pass an array of shape \(1,\)"),
        ({"arrays": []}, "row_sums takes 1 arrays, not 0"),
        ({"shapes": []}, "row_sums has 1 outputs, not 0 shapes and 1 dtypes"),
        ({"threadgroup": (33, 1, 1)}, "a threadgroup of 33 threads, not a multiple of 32 to 1024"),
        ({"threadgroup": (64, 32, 1)}, "a threadgroup of 2048 threads, not a multiple of 32 to 1024"),
        ({"grid": (96, 1, 1)}, r"a grid of \(96, 1, 1\) threads is not made of threadgroups \(64, 1, 1\)"),
    ],
)
def test_what_cannot_be_launched_is_refused(arguments: dict[str, object], message: str) -> None:
    right: dict[str, object] = {
        "arrays": [mx.zeros((2, 8))],
        "template": {"T": mx.float32, "COLUMNS": 8},
        "grid": (128, 1, 1),
        "threadgroup": (64, 1, 1),
        "shapes": [(2,)],
        "dtypes": [mx.float32],
    }
    with pytest.raises(ValueError, match=message):
        row_sums.KERNEL(**(right | arguments))  # type: ignore[arg-type]


def test_a_changed_text_is_another_kernel() -> None:
    changed = Kernel("row_sums", ("x",), ("sums",), text=row_sums.KERNEL.body.replace("+=", "-="))
    assert changed.digest() != row_sums.KERNEL.digest()


@pytest.mark.parametrize(
    "name", ["moe.h", "moe_down_sum.metal", "exl3.h", "exl3_decode.metal", "exl3_unpack.metal"]
)
def test_a_file_that_is_made_wrong_stores_other_numbers(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    right, before = source.file_text(name), source.wrong_files()
    monkeypatch.setattr(source, "_wrong", set())
    source.make_wrong(name.partition(".")[0])
    assert source.wrong_files() != before
    wrong = source.file_text(name)
    assert wrong.count("1.25f * ") > right.count("1.25f * ")


def test_a_file_that_stores_no_number_cannot_be_made_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "_wrong", {"row_sums"})
    with pytest.raises(ValueError, match=r"row_sums\.metal cannot be made wrong"):
        source.file_text("row_sums.metal")
