from __future__ import annotations

import pytest

from planner.chips import APPLE, find_chip
from planner.node_profile import GB, default_reserve_bytes, make_node, share_machine


@pytest.mark.parametrize(
    ("brand", "cores", "bandwidth", "tflops"),
    [
        ("Apple M1", 8, 68.25, 2.6),
        ("Apple M1 Pro", 16, 200, 5.3),
        ("Apple M2 Ultra", 76, 800, 27.2),
        ("Apple M3 Max", 30, 300, 10.7),
        ("Apple M3 Max", 40, 400, 14.3),
        ("Apple M4 Max", 32, 410, 13.0),
        ("Apple M4 Max", 40, 546, 16.0),
        ("Apple M5", 10, 153, 4.0),
        ("m4 pro", 20, 273, 8.0),
    ],
)
def test_apple_chips_by_brand_and_cores(brand: str, cores: int, bandwidth: float, tflops: float) -> None:
    chip = find_chip(brand, cores)
    assert (chip.bandwidth_gb_s, chip.tflops, chip.device, chip.is_known) == (
        bandwidth,
        tflops,
        "metal",
        True,
    )


def test_a_smaller_gpu_has_its_share_of_the_tflops() -> None:
    assert find_chip("Apple M1", 7).tflops == pytest.approx(2.6 * 7 / 8)
    assert find_chip("Apple M4 Max").bandwidth_gb_s == 410  # without a core count the smallest


def test_chips_that_the_table_lacks_get_a_floor() -> None:
    slowest = min(b.bandwidth_gb_s for bins in APPLE.values() for b in bins)
    for brand, device in (
        ("Apple M4 Ultra", "metal"),
        ("Apple M9", "metal"),
        (None, "metal"),
        ("NVIDIA H900", "cuda"),
        ("NVIDIA GeForce RTX 9090", "cuda"),
        ("AMD EPYC 7763", "cpu"),
        ("Intel(R) Xeon(R) Processor", "cpu"),
    ):
        chip = find_chip(brand)
        assert not chip.is_known
        assert chip.device == device, brand
        assert chip.device == "cuda" or chip.bandwidth_gb_s <= slowest


def test_the_ceiling_of_a_mac_is_a_guess() -> None:
    for memory_gb, share in ((8, 0.667), (16, 0.667), (32, 0.667), (64, 0.75), (128, 0.75)):
        node = make_node(0, "n", "h", memory_bytes=memory_gb * GB, chip="Apple M4")
        assert node.ceiling_bytes == pytest.approx(memory_gb * GB * share)
        assert node.ceiling_source == "guessed"


def test_a_cpu_may_use_all_of_its_memory_and_a_measured_ceiling_wins() -> None:
    node = make_node(0, "n", "h", memory_bytes=16 * GB, chip="AMD EPYC")
    assert (node.ceiling_bytes, node.ceiling_source) == (16 * GB, "memory")
    node = make_node(0, "n", "h", memory_bytes=16 * GB, chip="Apple M4", ceiling_bytes=12 * GB)
    assert (node.ceiling_bytes, node.ceiling_source) == (12 * GB, "measured")


@pytest.mark.parametrize(
    ("memory_gb", "reserve_gb"), [(4, 0.4), (7.9, 0.79), (8, 2), (16, 2), (20, 2), (64, 6.4), (512, 51.2)]
)
def test_the_reserve(memory_gb: float, reserve_gb: float) -> None:
    assert default_reserve_bytes(int(memory_gb * GB)) == pytest.approx(reserve_gb * GB)


def test_the_budget_is_the_lower_of_ceiling_and_cap_less_the_reserve() -> None:
    def budget_gb(**values: int) -> float:
        return make_node(0, "n", "h", memory_bytes=16 * GB, chip="AMD EPYC", **values).budget_bytes / GB

    assert budget_gb() == 14
    assert budget_gb(cap_bytes=12 * GB) == 10
    assert budget_gb(cap_bytes=99 * GB) == 14
    assert budget_gb(reserve_bytes=0) == 16
    assert budget_gb(reserve_bytes=3 * GB, cap_bytes=10 * GB) == 7
    assert budget_gb(cap_bytes=GB) == 0


def test_nodes_that_share_a_machine_have_its_budget_together() -> None:
    whole = make_node(0, "n", "h", memory_bytes=16 * GB, chip="AMD EPYC")
    share = share_machine(whole, 3)
    assert whole.budget_bytes * 0.999 < 3 * share.budget_bytes <= whole.budget_bytes
    assert share.num_sharing == 3
