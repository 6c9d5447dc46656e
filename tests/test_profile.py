"""`macrame profile`: it really measures here, in a second, and what it keeps changes plans."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from cluster import dry_run, profile_machine
from cluster.errors import EXIT_ERROR, EXIT_OK, EXIT_USAGE
from cluster.probe import seen_machine, this_machine
from cluster.profile_exl3 import Exl3Weights, make_exl3
from cluster.profile_machine import measure_machine
from cluster.profile_products import (
    MANY,
    ROWS,
    WIDTH,
    Product,
    Weights,
    make_pool,
    make_weights,
    sized_product,
)
from cluster.profile_store import machine_of, read_speeds, write_speeds
from cluster.profile_timing import Effort
from deploy import profile
from kernels import backend
from kernels.exl3 import Exl3Linear
from kernels.exl3_choice import Way
from planner.speeds import FormatRate, Speeds
from tests.fake_models import llama_config, llama_tensors, write_model
from tests.node_process import write_cluster
from tests.test_measured_speeds import FOUND

TINY = Effort(1, 1, 1, 1, 60.0, 1 << 20, 1 << 20, False)  # one round, so the time does not count


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(profile, "QUICK", TINY)
    monkeypatch.setattr(profile, "FULL", TINY)
    monkeypatch.setattr(profile_machine, "MAIN_FORMATS", ("float32", "bfloat16", "affine4/64"))
    this_machine.cache_clear()
    yield tmp_path / "cache"
    this_machine.cache_clear()


def run(*arguments: str) -> int:
    return profile.main(list(arguments))


def test_it_measures_keeps_and_shows(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--show") == EXIT_ERROR
    assert "no speeds were measured here with this MLX: run macrame profile" in capsys.readouterr().err
    assert run("--quick", "--json") == EXIT_OK
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert "round 1" in printed.err
    assert found["machine"]["chip"] == seen_machine().chip
    assert Path(found["file"]).is_file()
    speeds = found["speeds"]
    assert {rate["format"] for rate in speeds["formats"]} >= {"float32", "bfloat16", "affine4/64"}
    assert speeds["read_bytes_ms"] > 0 < speeds["flops_ms"]
    assert speeds["layer_ms"] >= 0 < speeds["stage_ms"]
    assert found["raw"]["copy_bytes_ms"] > 0
    node = this_machine()
    assert node.measured is not None
    assert node.speeds.read_bytes_ms == speeds["read_bytes_ms"]
    assert node.speeds.source == "measured"
    assert run("--show") == EXIT_OK
    table = capsys.readouterr().out
    assert f"measured on {speeds['measured_on']}" in table
    assert "affine4" not in table  # what was fitted, not each product
    assert run("--forget") == EXIT_OK
    assert run("--show", "--json") == EXIT_ERROR


def test_the_table_names_each_figure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(profile_machine, "MAIN_FORMATS", ("affine4/64",))
    assert run("--no-save") == EXIT_OK
    printed = capsys.readouterr().out
    for words in ("affine4/64", "GB/s", "512 rows", "copy:", "disk:", "a layer", "a stage", "1 rounds in"):
        assert words in printed
    assert "kept in" not in printed
    node = seen_machine()
    assert read_speeds(machine_of(node.chip, node.gpu_cores, node.memory_bytes)) is None


def test_a_format_that_mlx_lacks_here_is_left_out_with_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profile_machine, "MAIN_FORMATS", ("float32", "affine9/64", "hexfp7"))
    found = measure_machine(TINY, available_bytes=1 << 30, disk_folder=tmp_path / "d", say=lambda _: None)
    assert {product.format for product in found.products} == {"float32"}
    assert [line.partition(":")[0] for line in found.skipped] == ["affine9/64", "hexfp7"]
    assert all("MLX has no product of this format here" in line for line in found.skipped)
    monkeypatch.setattr(Weights, "times", _few_rows_only)
    monkeypatch.setattr(profile_machine, "MAIN_FORMATS", ("float32",))
    found = measure_machine(TINY, available_bytes=1 << 30, disk_folder=tmp_path / "d", say=lambda _: None)
    assert [product.rows for product in found.products] == [1, 8]
    assert found.skipped == ("float32: MLX has no product of 512 rows here (not implemented)",)
    assert found.speeds.of("float32") is not None
    monkeypatch.setattr(profile_machine, "MAIN_FORMATS", ("hexfp7",))
    with pytest.raises(ValueError, match="no product of weights could be timed"):
        _ = measure_machine(TINY, available_bytes=1, disk_folder=tmp_path / "d", say=lambda _: None).speeds


def test_formats_that_there_is_no_time_for_are_left_out_with_a_note(tmp_path: Path) -> None:
    """But for the first, so that there is something to plan with."""
    hurried = replace(TINY, budget_s=0.0)
    found = measure_machine(hurried, available_bytes=1 << 30, disk_folder=tmp_path / "d", say=lambda _: None)
    assert {product.format for product in found.products} == {"float32"}
    assert found.skipped == tuple(
        f"{name}: no time was left for it; a second profile may come further"
        for name in ("bfloat16", "affine4/64")
    )


def _few_rows_only(weights: Weights, x: mx.array) -> mx.array:
    if len(x) > 8:
        raise RuntimeError("not implemented\nat all")
    return x @ weights.arrays[0].T


def test_nothing_measured_is_an_error_with_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(profile_machine, "MAIN_FORMATS", ("hexfp7",))
    assert run("--quick") == EXIT_ERROR
    assert "macrame profile: this machine could not be measured: " in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_named(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(profile_machine, "MAIN_FORMATS", ("float32",))
    own_cache.write_text("a file")
    assert run("--quick") == EXIT_ERROR
    message = capsys.readouterr().err
    assert "the speeds cannot be kept in" in message
    assert "set XDG_CACHE_HOME to a folder that can be written" in message


def test_what_cannot_be_removed_is_named(own_cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    node = seen_machine()
    path = machine_of(node.chip, node.gpu_cores, node.memory_bytes).path
    path.mkdir(parents=True)
    assert run("--forget") == EXIT_ERROR
    assert f"the speeds in {path} cannot be removed: " in capsys.readouterr().err


def test_nothing_is_kept_where_the_folder_is_a_file(own_cache: Path) -> None:
    own_cache.write_text("a file")
    assert run("--forget") == EXIT_OK


def test_unknown_arguments_are_usage_errors() -> None:
    with pytest.raises(SystemExit) as error:
        run("--fast")
    assert error.value.code == EXIT_USAGE


@pytest.mark.parametrize("name", ["float32", "float16", "affine8/64", "mxfp4"])
def test_products_are_those_of_the_weights(name: str) -> None:
    weights = make_weights(name, 64)
    x = mx.random.normal((2, WIDTH)).astype(weights.dtype)
    twice = weights.repeated(2)
    assert twice.num_out == 2 * weights.num_out
    assert twice.nbytes == 2 * weights.nbytes
    y = weights.times(x)
    assert y.shape == (2, 64)
    assert mx.allclose(twice.times(x)[:, 64:], y, rtol=1e-2, atol=1e-1)
    assert mx.allclose(weights.first(8).times(x), y[:, :8], rtol=1e-2, atol=1e-1)


def test_calls_are_sized_to_the_time_and_the_memory() -> None:
    pool = make_pool("affine4/64", 2.0, 1 << 20)
    products = [sized_product(pool, rows, 2.0) for rows in ROWS]
    assert [product.rows for product in products] == list(ROWS)
    for product in products:
        assert sum(w.nbytes for w in product.pool) <= 1 << 20
        product.case()()
    one, _, many = products
    assert many.rows == MANY
    assert one.num_weights >= many.num_weights
    assert one.num_bytes == pytest.approx(one.num_weights * (4 + 32 / 64) / 8)


def test_exl3_is_timed_as_a_node_computes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU: by MLX's operations, and the planner's rates are those times."""
    monkeypatch.setattr(profile_machine, "MAIN_FORMATS", ("float32", "exl3/3", "exl3/9"))
    found = measure_machine(TINY, available_bytes=1 << 30, disk_folder=tmp_path / "d", say=lambda _: None)
    assert [p.rows for p in found.products if p.format == "exl3/3"] == list(ROWS)
    assert found.skipped == ("exl3/9: MLX has no product of this format here (EXL3 has 1 to 8 bits, not 9)",)
    rate = found.speeds.of("exl3/3")
    assert rate is not None
    one = next(p for p in found.products if (p.format, p.rows) == ("exl3/3", 1))
    assert rate.decoded_ms == pytest.approx(one.num_weights / one.ms)
    assert found.speeds.weight_bytes_ms("exl3/3") == pytest.approx(3 / 8 * one.num_weights / one.ms)


def test_exl3_weights_are_cut_and_repeated_in_whole_blocks() -> None:
    weights = make_weights("exl3/2")
    assert isinstance(weights, Exl3Weights)
    x = mx.random.normal((2, WIDTH)).astype(weights.dtype)
    both = weights.repeated(3)
    assert (weights.num_out, both.num_out, both.first(130).num_out, both.first(1).num_out) == (
        128,
        384,
        256,
        128,
    )
    assert both.nbytes == weights.nbytes + 2 * (weights.nbytes - WIDTH * 2)  # the inputs' scales are shared
    y = weights.times(x)
    assert mx.array_equal(both.times(x)[:, 128:256], y)
    assert mx.array_equal(both.first(130).times(x)[:, :128], y)


def test_a_kernel_that_is_wrong_is_not_what_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's backend is claimed; of its kernels only those for one row give the right numbers."""
    right = Exl3Linear.product

    def product(self: Exl3Linear, x: mx.array, way: Way) -> mx.array:
        y = right(self, x, "operations")
        return y if way == "operations" or len(x) == 1 else y * 2

    monkeypatch.setattr(Exl3Linear, "product", product)
    with backend.forced("metal"):
        made = make_exl3("exl3/3", 256, ROWS)
    assert made.ways == {1: "in place"}
    assert make_exl3("exl3/3", 256, ROWS).ways == {}


def test_each_call_takes_other_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = tuple(make_weights("float32", number + 1) for number in range(5))
    taken: list[int] = []
    monkeypatch.setattr(Weights, "times", lambda self, x: taken.append(self.num_out) or x)
    run = Product(1, pool, 2).case()
    for _ in range(4):
        run()
    assert taken == [1, 2, 3, 4, 5, 1, 2, 3]


def local_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str], *nodes: dict[str, Any]) -> str:
    model = write_model(tmp_path / "llama", llama_config(5), llama_tensors(5))
    places = [{"port": 5000 + i, **node} for i, node in enumerate(nodes)]
    path = write_cluster(tmp_path, model, *places)
    assert dry_run.main(["--config", str(path)]) == EXIT_OK
    return capsys.readouterr().out


def keep(speeds: Speeds) -> None:
    node = seen_machine()
    machine = machine_of(node.chip, node.gpu_cores, node.memory_bytes)
    write_speeds(machine, type(FOUND)(speeds, "2026-11-21"), {})
    this_machine.cache_clear()


FAST = Speeds(1e12, 1e12, 1e-6, 1e-6, (FormatRate("float32", 1e12, 1e12),), "measured")
SLOW = Speeds(1.0, 1.0, 100.0, 100.0, (FormatRate("float32", 1.0, 1.0),), "measured")


def test_measured_speeds_change_a_dry_run_of_this_machine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here = {"host": "127.0.0.1", "name": "here"}
    other = {"host": "10.0.0.9", "name": "other", "memory_gb": 16, "chip": "Apple M4"}
    keep(FAST)
    fast = local_plan(tmp_path, capsys, here, other)
    assert "note: the speeds of here were measured on 2026-11-21" in fast
    assert "no speed is known" not in fast
    keep(SLOW)
    slow = local_plan(tmp_path, capsys, here, other)
    assert _owner(fast) == "here"
    assert _owner(slow) == "other"


def test_a_file_that_names_another_chip_keeps_its_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keep(SLOW)
    chip = seen_machine().chip
    same = {"host": "127.0.0.1", "name": "same", "memory_gb": 16, "chip": chip}
    assert "the speeds of same were measured" in local_plan(tmp_path, capsys, same)
    another = {"host": "127.0.0.1", "name": "another", "memory_gb": 16, "chip": "Apple M4"}
    assert "were measured" not in local_plan(tmp_path, capsys, another)


def _owner(table: str) -> str:
    """The node of the only stage that has all layers."""
    (line,) = [line for line in table.splitlines() if "0:5 (5)" in line]
    return next(name for name in ("here", "other") if f" {name} " in line)
