"""What is read from macOS's commands, from samples of their output (tests/macos_samples.py)."""

from __future__ import annotations

import sys
from collections import namedtuple
from typing import Any

import pytest

from cluster import macos, probe
from planner.node_profile import GB
from tests.macos_samples import (
    DISPLAYS,
    SYSCTL,
    VM_STAT_INTEL,
    VM_STAT_SEQUOIA,
    VM_STAT_SNOW_LEOPARD,
    VM_STAT_TAHOE,
)


@pytest.mark.parametrize(
    ("text", "pages", "page_bytes"),
    [
        (VM_STAT_TAHOE, 300_000 + 1_100_000 + 20_000, 16384),
        (VM_STAT_SEQUOIA, 18_660 + 150_566 + 10_000, 16384),
        (VM_STAT_INTEL, 18_660 + 150_566 + 10_000, 4096),
        (VM_STAT_SNOW_LEOPARD, 90_000 + 32_000 + 134_000, 4096),
    ],
    ids=["tahoe", "sequoia", "intel", "snow leopard"],
)
def test_the_file_cache_and_purgeable_memory_are_free(text: str, pages: int, page_bytes: int) -> None:
    assert macos.parse_vm_stat(text) == pages * page_bytes


def test_the_samples_lines_add_up_as_the_kernels_do() -> None:
    """Active, inactive and speculative pages are the file-backed and anonymous ones, seen otherwise."""
    for text in (VM_STAT_TAHOE, VM_STAT_SEQUOIA):
        pages = {line.split(":")[0]: line.split(":")[1] for line in text.splitlines()[1:]}

        def total(*names: str, pages: dict[str, str] = pages) -> int:
            return sum(int(pages[name].strip(" .")) for name in names)

        assert total("Pages active", "Pages inactive", "Pages speculative") == total(
            "File-backed pages", "Anonymous pages"
        )


@pytest.mark.parametrize("text", ["", "nonsense", "(page size of 16384 bytes)", "Pages free: 5."])
def test_no_output_of_vm_stat_is_no_number(text: str) -> None:
    assert macos.parse_vm_stat(text) is None


@pytest.mark.parametrize(("name", "cores"), [("mini", 10), ("max", 40), ("intel", None), ("virtual", None)])
def test_gpu_cores_are_those_of_apples_own_gpu(name: str, cores: int | None) -> None:
    assert macos.parse_gpu_cores(DISPLAYS[name]) == cores


@pytest.mark.parametrize(
    "text",
    [
        *("", "not json", "[]", '{"SPDisplaysDataType": []}', '{"SPDisplaysDataType": [7, null]}'),
        *('{"SPDisplaysDataType": 7}', '{"SPDisplaysDataType": [{"sppci_cores": "many"}]}'),
        '{"SPDisplaysDataType": [{"sppci_cores": "99999999"}]}',
    ],
)
def test_a_display_list_without_cores_gives_none(text: str) -> None:
    assert macos.parse_gpu_cores(text) is None


def test_commands_that_fail_give_nothing() -> None:
    assert macos.output(["/nonexistent/command"]) is None
    assert macos.output([sys.executable, "-c", "raise SystemExit(1)"]) is None
    assert macos.output([sys.executable, "-c", "print(' x ')"]) == "x"


def _on_a_mac(monkeypatch: pytest.MonkeyPatch, name: str, vm_stat: str, gpu: dict[str, Any]) -> None:
    brand, memsize = SYSCTL[name]
    answers = {
        "vm_stat": vm_stat,
        "system_profiler SPDisplaysDataType -json": DISPLAYS[name],
        "sysctl -n machdep.cpu.brand_string": brand,
    }
    memory = namedtuple("memory", "total available")(int(memsize), int(memsize) // 3)
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(probe.psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(probe, "container_memory", lambda: None)
    monkeypatch.setattr(macos, "output", lambda command: answers[" ".join(command)].strip())
    monkeypatch.setattr(probe, "_gpu", lambda: gpu)


def test_a_mac_is_known_by_brand_cores_and_its_gpus_own_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    metal = {"chip": "Apple M3 Max", "memory_bytes": 137438953472, "ceiling_bytes": 103079215104}
    _on_a_mac(monkeypatch, "max", VM_STAT_TAHOE, metal)
    node = probe.seen_machine.__wrapped__()
    assert (node.chip, node.gpu_cores, node.ceiling_source) == ("Apple M3 Max", 40, "measured")
    assert (node.memory_bytes, node.ceiling_bytes) == (137438953472, 103079215104)
    assert node.available_bytes == 1_420_000 * 16384
    assert node.figures.bandwidth_gb_s == 400
    assert node.figures.is_known


def test_an_intel_mac_is_a_cpu_with_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    _on_a_mac(monkeypatch, "intel", VM_STAT_INTEL, {})
    node = probe.seen_machine.__wrapped__()
    assert (node.device, node.gpu_cores, node.memory_bytes) == ("cpu", None, 34359738368)
    assert node.ceiling_bytes == node.memory_bytes
    assert not node.figures.is_known


def test_a_virtual_mac_gets_the_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = {"chip": "Apple M1 (Virtual)", "memory_bytes": 8 * GB, "ceiling_bytes": 5 * GB}
    _on_a_mac(monkeypatch, "virtual", VM_STAT_SEQUOIA, gpu)
    node = probe.seen_machine.__wrapped__()
    assert (node.device, node.gpu_cores, node.ceiling_bytes) == ("metal", None, 5 * GB)
    assert not node.figures.is_known
    assert node.figures.bandwidth_gb_s < 68.25


def test_without_vm_stat_psutil_speaks(monkeypatch: pytest.MonkeyPatch) -> None:
    _on_a_mac(monkeypatch, "mini", "", {})
    assert probe.available_bytes(100 * GB) == 17179869184 // 3
    assert probe.available_bytes(GB) == GB
