"""The memory that a container (a Linux control group) allows this process, and what is left of it.

Versions 1 and 2 (docs.kernel.org, admin-guide/cgroup-v2 and cgroup-v1/memory). A process sits somewhere in a
tree of groups, each of which may set a limit: all of them hold, so each is looked at. Reads files alone; any
thread may call it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

ROOT = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")


@dataclass(frozen=True, slots=True)
class ContainerMemory:
    """The tightest limit of all groups, and the least that one of them still gives."""

    limit_bytes: int
    left_bytes: int  # file cache counts as free: the kernel drops it before it refuses memory


@dataclass(frozen=True, slots=True)
class _Files:
    """What the two versions call the same things."""

    limit: str
    used: str
    cache_keys: tuple[str, ...]  # in memory.stat: pages of files, which can be dropped


_V2 = _Files("memory.max", "memory.current", ("inactive_file", "active_file"))
_V1 = _Files("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))


def container_memory(root: Path = ROOT, own_groups: Path = OWN_GROUPS) -> ContainerMemory | None:
    """None where no group of this process has a limit, or the system has no control groups."""
    found = [memory for folder, files in _groups(root, own_groups) if (memory := _read(folder, files))]
    if not found:
        return None
    return ContainerMemory(min(m.limit_bytes for m in found), min(m.left_bytes for m in found))


def _groups(root: Path, own_groups: Path) -> Iterator[tuple[Path, _Files]]:
    """This process's group and those above it. Inside a container its own group is mostly the root."""
    try:
        lines = own_groups.read_text().splitlines()
    except OSError:
        lines = []
    v2, v1 = ["/"], ["/"]
    for line in lines:  # "0::/user.slice" of version 2, "4:memory:/docker/1f" of version 1
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if not controllers:
            v2.append(path)
        elif "memory" in controllers.split(","):
            v1.append(path)
    for base, paths, files in ((root, v2, _V2), (root / "unified", v2, _V2), (root / "memory", v1, _V1)):
        for folder in dict.fromkeys(folder for path in paths for folder in _upwards(base, path)):
            yield folder, files


def _upwards(base: Path, path: str) -> Iterator[Path]:
    parts = PurePosixPath(path).parts[1:]
    if ".." in parts:  # a group outside this process's namespace
        return
    for end in range(len(parts), -1, -1):
        yield base.joinpath(*parts[:end])


def _read(folder: Path, files: _Files) -> ContainerMemory | None:
    try:
        limit = (folder / files.limit).read_text().strip()
        if not limit.isdecimal():  # "max": no limit
            return None
        limit_bytes = int(limit)
    except (OSError, ValueError):
        return None
    try:
        used_bytes = int((folder / files.used).read_text())
        stat = (folder / "memory.stat").read_text()
    except (OSError, ValueError):  # a limit is a limit, even if what is used is not told
        return ContainerMemory(limit_bytes, limit_bytes)
    lines = (line.split() for line in stat.splitlines())
    values = {line[0]: int(line[1]) for line in lines if len(line) == 2 and line[1].isdecimal()}
    cache_bytes = sum(values.get(key, 0) for key in files.cache_keys)
    return ContainerMemory(limit_bytes, max(0, limit_bytes - max(0, used_bytes - cache_bytes)))
