"""Limits of control groups, version 1 and 2, nested; folders stand in for /sys/fs/cgroup."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from cluster.container_memory import ContainerMemory, container_memory

GB = 10**9
NAMES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file", "total_active_file"),
    2: ("memory.max", "memory.current", "inactive_file", "active_file"),
}


def group(
    folder: Path, version: int, limit: int | str, used: int = 0, files: tuple[int, int] = (0, 0)
) -> None:
    limit_name, used_name, inactive, active = NAMES[version]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / limit_name).write_text(f"{limit}\n")
    (folder / used_name).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 7\n{inactive} {files[0]}\n{active} {files[1]}\nodd\n")


def own(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "own_groups"
    path.write_text(text)
    return path


@pytest.mark.parametrize("version", [1, 2])
def test_the_file_cache_of_a_group_counts_as_left(version: int, tmp_path: Path) -> None:
    group(tmp_path / ("memory" if version == 1 else ""), version, 4 * GB, 3 * GB, (GB // 2, GB))
    found = container_memory(tmp_path, tmp_path / "none")
    assert found == ContainerMemory(4 * GB, 5 * GB // 2)


@pytest.mark.parametrize(("version", "line"), [(1, "4:cpu,memory:/a/b"), (2, "0::/a/b")])
def test_every_group_above_limits_too(version: int, line: str, tmp_path: Path) -> None:
    base = tmp_path / ("memory" if version == 1 else "")
    group(base, version, "max" if version == 2 else 2**63 - 4096)
    group(base / "a", version, 4 * GB, 3 * GB)
    group(base / "a" / "b", version, 8 * GB, GB)
    found = container_memory(tmp_path, own(tmp_path, f"9:name=systemd:/\n{line}\n"))
    assert found == ContainerMemory(4 * GB, GB)
    group(base / "a" / "b", version, 2 * GB, 2 * GB)
    assert container_memory(tmp_path, own(tmp_path, line)) == ContainerMemory(2 * GB, 0)


def test_version_2_beside_version_1_is_under_unified(tmp_path: Path) -> None:
    group(tmp_path / "unified" / "x", 2, 5 * GB)
    assert container_memory(tmp_path, own(tmp_path, "0::/x")) == ContainerMemory(5 * GB, 5 * GB)


def test_a_group_that_is_not_mounted_here_is_left_out(tmp_path: Path) -> None:
    group(tmp_path, 2, 6 * GB, GB)
    for line in ("0::/docker/1f/gone", "0::/../other", "", "nonsense"):
        assert container_memory(tmp_path, own(tmp_path, line)) == ContainerMemory(6 * GB, 5 * GB)


def test_a_limit_alone_is_a_limit(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("1000\n")
    assert container_memory(tmp_path, tmp_path / "none") == ContainerMemory(1000, 1000)


@pytest.mark.parametrize("text", ["max\n", "", "many\n", "-5\n"])
def test_no_limit_is_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text(text)
    assert container_memory(tmp_path, tmp_path / "none") is None
    assert container_memory(tmp_path / "none", tmp_path / "none") is None


def test_this_system_can_be_read() -> None:
    found = container_memory()
    assert found is None or 0 <= found.left_bytes <= found.limit_bytes
    assert psutil.virtual_memory().total > 0
