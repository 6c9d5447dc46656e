"""The chip table: every figure is plausible beside its neighbours, and every brand string finds its own."""

from __future__ import annotations

import re
import tomllib
from itertools import pairwise
from pathlib import Path

import pytest

from planner.chips import APPLE, FLOORS, NVIDIA, TABLE, Entry, find_chip

BINS = [b for bins in APPLE.values() for b in bins]


def test_every_line_says_where_it_is_from() -> None:
    for entry in (*BINS, *NVIDIA):
        assert entry.source.startswith(("Apple, technical specifications of ", "NVIDIA, ")), entry.name
        assert len(entry.source) > 20, entry.name
    assert all(len(floor.source) > 20 for floor in FLOORS.values())


def test_a_larger_bin_of_a_chip_is_never_slower() -> None:
    for bins in APPLE.values():
        for small, large in pairwise(bins):
            assert small.max_cores < large.min_cores
            assert small.bandwidth_gb_s <= large.bandwidth_gb_s
            assert small.tflops < large.tflops


def test_a_larger_chip_of_a_family_is_faster() -> None:
    for family in range(1, 6):
        sizes = [f"M{family}{suffix}" for suffix in ("", " Pro", " Max", " Ultra")]
        present = [APPLE[name] for name in sizes if name in APPLE]
        assert len(present) >= 3
        for small, large in pairwise(present):
            assert small[-1].bandwidth_gb_s < large[0].bandwidth_gb_s
            assert small[-1].tflops < large[0].tflops
            assert small[-1].max_cores <= large[0].min_cores
            assert small[-1].max_memory_gb < large[-1].max_memory_gb


def test_a_core_of_every_family_does_about_as_much() -> None:
    """0.33 to 0.43 TFLOPS a core: a digit too many in one line stands out."""
    assert all(0.3 < b.tflops / b.max_cores < 0.45 for b in BINS)
    assert all(3 < b.bandwidth_gb_s / b.max_cores < 18 for b in BINS)


def test_nvidia_figures_are_in_the_range_of_their_kind() -> None:
    for entry in NVIDIA:
        assert 200 < entry.bandwidth_gb_s < 10_000, entry.name
        assert 0.05 < entry.tflops / entry.bandwidth_gb_s < 0.5, entry.name
    by_name = {entry.name: entry for entry in NVIDIA}
    for slower, faster in (
        ("H100 PCIe", "H100 SXM"),
        ("H100 SXM", "H200"),
        ("A100 40GB", "A100 80GB PCIe"),
        ("A100 80GB PCIe", "A100 80GB SXM"),
        ("L4", "L40S"),
        ("RTX 3090", "RTX 4090"),
        ("RTX 4090", "RTX 5090"),
    ):
        assert by_name[slower].bandwidth_gb_s < by_name[faster].bandwidth_gb_s
        assert by_name[slower].max_memory_gb <= by_name[faster].max_memory_gb


def test_floors_are_below_all() -> None:
    smallest = min(find_chip(f"Apple {b.name}", b.min_cores).tflops for b in BINS)
    assert FLOORS["metal"].bandwidth_gb_s < min(b.bandwidth_gb_s for b in BINS)
    assert FLOORS["metal"].tflops < smallest
    assert FLOORS["cuda"].bandwidth_gb_s < min(e.bandwidth_gb_s for e in NVIDIA)
    assert FLOORS["cuda"].tflops < min(e.tflops for e in NVIDIA)
    assert FLOORS["cpu"].bandwidth_gb_s < FLOORS["metal"].bandwidth_gb_s
    assert FLOORS["cpu"].tflops < FLOORS["metal"].tflops


def test_no_brand_means_two_chips() -> None:
    brands = [brand for entry in NVIDIA for brand in entry.brands]
    assert len(set(brands)) == len(brands)


@pytest.mark.parametrize(
    ("brand", "name"),
    [
        ("NVIDIA H200", "NVIDIA H200"),
        ("NVIDIA H100 80GB HBM3", "NVIDIA H100 SXM"),
        ("NVIDIA H100 PCIe", "NVIDIA H100 PCIe"),
        ("H100", "NVIDIA H100 PCIe"),  # of two, the slower
        ("NVIDIA A100-SXM4-40GB", "NVIDIA A100 40GB"),
        ("NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB SXM"),
        ("NVIDIA A100 80GB PCIe", "NVIDIA A100 80GB PCIe"),
        ("NVIDIA L40S", "NVIDIA L40S"),
        ("NVIDIA GeForce RTX 4090", "NVIDIA RTX 4090"),
        ("rtx 3090", "NVIDIA RTX 3090"),
        ("NVIDIA RTX A6000", "NVIDIA RTX A6000"),
        ("NVIDIA RTX 6000 Ada Generation", "NVIDIA RTX 6000 Ada"),
        ("NVIDIA GB10", "NVIDIA GB10"),
        ("DGX Spark", "NVIDIA GB10"),
    ],
)
def test_nvidia_chips_by_the_names_that_cuda_gives_them(brand: str, name: str) -> None:
    chip = find_chip(brand)
    assert (chip.name, chip.device, chip.is_known) == (name, "cuda", True)


@pytest.mark.parametrize(
    ("brand", "device"),
    [
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "cuda"),
        ("NVIDIA H200 MIG 1g.18gb", "cuda"),
        ("Quadro M4000", "cuda"),
        ("Tesla M40", "cuda"),
        ("Apple M4 Ultra", "metal"),
        ("Apple M1 (Virtual)", "metal"),
        ("Apple processor", "metal"),
        ("VirtualApple @ 2.50GHz", "cpu"),
        ("Intel(R) Core(TM) i9-9880H CPU @ 2.30GHz", "cpu"),
        ("Intel(R) Core(TM) M5-6Y54 CPU", "cpu"),
        ("AMD EPYC 7763 64-Core Processor", "cpu"),
        ("Neoverse-N1", "cpu"),
    ],
)
def test_what_only_looks_like_a_chip_of_the_table_gets_the_floor(brand: str, device: str) -> None:
    chip = find_chip(brand)
    assert (chip.device, chip.is_known) == (device, False)
    assert (chip.bandwidth_gb_s, chip.tflops) == (
        FLOORS[chip.device].bandwidth_gb_s,
        FLOORS[chip.device].tflops,
    )


def test_wrong_figures_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=re.escape("X: tflops = 0 must be above 0")):
        Entry("X", 1, 0, 1, "s")
    with pytest.raises(ValueError, match=re.escape("X: min_cores = 9 must be at most 8")):
        Entry("X", 1, 1, 1, "s", 9, 8)


def test_the_table_is_in_the_package() -> None:
    root = Path(__file__).resolve().parent.parent
    data = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert TABLE.match(data["planner"][0])
