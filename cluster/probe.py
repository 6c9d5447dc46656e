"""Measures this machine: chip, GPU cores, memory and what the device lets one process use of it.

Reads the system and evaluates nothing; any thread may call it. It imports MLX only where there may be a
GPU, whose limits only MLX knows.
"""

from __future__ import annotations

import platform
import re
import socket
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import psutil

from cluster import macos
from cluster.config_nodes import is_loopback
from cluster.container_memory import container_memory
from cluster.kernel_times import kept_times
from cluster.profile_store import machine_of, read_speeds
from planner.node_profile import NodeProfile, make_node


@cache
def this_machine(device: str | None = None) -> NodeProfile:
    """This machine as a node of rank 0, with the speeds that `macrame profile` measured earlier, if it did,
    and what self-tests of kernels timed; looked at once per process. device: "cpu" where the node is to do
    without the GPU.
    """
    node = seen_machine(device)
    node = replace(node, forms=kept_times(node, device))
    found = read_speeds(machine_of(node.chip, node.gpu_cores, node.memory_bytes))
    if found is None:
        return node
    return replace(node, measured=found.speeds, measured_on=found.measured_on)


@cache
def seen_machine(device: str | None = None) -> NodeProfile:
    """This machine as the chip table knows it."""
    gpu = {} if device == "cpu" else _gpu()
    memory_bytes = int(gpu["memory_bytes"]) if "memory_bytes" in gpu else _memory_bytes()
    ceiling = gpu.get("ceiling_bytes")
    return make_node(
        rank=0,
        name=socket.gethostname(),
        host="localhost",
        chip=gpu.get("chip") or _cpu_name(),
        gpu_cores=macos.gpu_cores() if sys.platform == "darwin" else None,
        memory_bytes=memory_bytes,
        ceiling_bytes=memory_bytes if ceiling is None and not gpu else ceiling,
        available_bytes=available_bytes(memory_bytes),
    )


@cache
def is_this_machine(host: str) -> bool:
    """True for loopback, this machine's name, and the addresses of its interfaces; asks no name server."""
    if is_loopback(host):
        return True
    names = {socket.gethostname().lower(), platform.node().lower()}
    short = {name.partition(".")[0] for name in names}
    if host.lower() in names | short | {f"{name}.local" for name in short}:
        return True
    return host.partition("%")[0] in _own_addresses()


@cache
def _own_addresses() -> frozenset[str]:
    """Of all interfaces; a plan of many nodes asks once."""
    found = psutil.net_if_addrs().values()
    return frozenset(a.address.partition("%")[0] for addresses in found for a in addresses)


def _memory_bytes() -> int:
    """Physical memory, or the container's limit where that is smaller."""
    total_bytes, container = int(psutil.virtual_memory().total), container_memory()
    return total_bytes if container is None else min(total_bytes, container.limit_bytes)


def available_bytes(limit_bytes: int) -> int:
    """What a program can have now, at most `limit_bytes`; the cache of files counts as free."""
    if sys.platform == "darwin" and (told_bytes := macos.available_bytes()) is not None:
        return min(told_bytes, limit_bytes)
    left = [int(psutil.virtual_memory().available), limit_bytes]
    container = container_memory()
    return min(left if container is None else [*left, container.left_bytes])


def _gpu() -> dict[str, Any]:
    """chip, memory_bytes and ceiling_bytes as MLX gives them.

    Empty where there is no GPU that MLX can use.
    """
    if sys.platform != "darwin" and not Path("/dev/nvidiactl").exists():
        return {}
    try:
        import mlx.core as mx
    except ImportError:
        return {}
    is_metal = mx.metal.is_available()
    if not is_metal and not mx.cuda.is_available():
        return {}
    try:
        info: dict[str, Any] = mx.device_info(mx.gpu)
    except (ValueError, RuntimeError):
        return {}
    if is_metal:
        return {
            "chip": macos.sysctl("machdep.cpu.brand_string") or info.get("device_name"),
            "memory_bytes": info["memory_size"],
            "ceiling_bytes": info["max_recommended_working_set_size"],
        }
    found = {"chip": f"NVIDIA {str(info.get('device_name', 'GPU')).removeprefix('NVIDIA ')}"}
    total = info.get("total_memory") or info.get("memory_size")
    return found | ({"memory_bytes": total, "ceiling_bytes": total} if total else {})


def _cpu_name() -> str:
    if sys.platform == "darwin":
        return macos.sysctl("machdep.cpu.brand_string") or platform.machine()
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match.group(1).strip() if match else platform.processor() or platform.machine()
