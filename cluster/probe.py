"""Measures this machine: chip, GPU cores, memory and what the device lets one process use of it.

Reads the system and evaluates nothing; any thread may call it. It imports MLX only where there may be a
GPU, whose limits only MLX knows.
"""

from __future__ import annotations

import json
import platform
import re
import socket
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import psutil

from cluster.config_nodes import is_loopback
from planner.node_profile import NodeProfile, make_node

COMMAND_TIMEOUT_S = 15.0
_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


@cache
def this_machine() -> NodeProfile:
    """This machine as a node of rank 0; measured once per process."""
    gpu = _gpu()
    memory_bytes = int(gpu["memory_bytes"]) if "memory_bytes" in gpu else _memory_bytes()
    ceiling = gpu.get("ceiling_bytes")
    return make_node(
        rank=0,
        name=socket.gethostname(),
        host="localhost",
        chip=gpu.get("chip") or _cpu_name(),
        gpu_cores=_apple_gpu_cores() if sys.platform == "darwin" else None,
        memory_bytes=memory_bytes,
        ceiling_bytes=memory_bytes if ceiling is None and not gpu else ceiling,
        available_bytes=min(psutil.virtual_memory().available, memory_bytes),
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
    addresses = {a.address.partition("%")[0] for found in psutil.net_if_addrs().values() for a in found}
    return host.partition("%")[0] in addresses


def _memory_bytes() -> int:
    """Physical memory, or the container's limit where that is smaller."""
    limits = [psutil.virtual_memory().total]
    for path in _CGROUP_LIMITS:
        try:
            text = Path(path).read_text().strip()
        except OSError:
            continue
        if text.isdecimal():  # "max": no limit
            limits.append(int(text))
    return min(limits)


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
            "chip": _sysctl("machdep.cpu.brand_string") or info.get("device_name"),
            "memory_bytes": info["memory_size"],
            "ceiling_bytes": info["max_recommended_working_set_size"],
        }
    found = {"chip": f"NVIDIA {str(info.get('device_name', 'GPU')).removeprefix('NVIDIA ')}"}
    total = info.get("total_memory") or info.get("memory_size")
    return found | ({"memory_bytes": total, "ceiling_bytes": total} if total else {})


def _cpu_name() -> str:
    if sys.platform == "darwin":
        return _sysctl("machdep.cpu.brand_string") or platform.machine()
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match.group(1).strip() if match else platform.processor() or platform.machine()


def _sysctl(key: str) -> str | None:
    return _output(["sysctl", "-n", key])


def _apple_gpu_cores() -> int | None:
    text = _output(["system_profiler", "SPDisplaysDataType", "-json"])
    try:
        displays = json.loads(text or "{}").get("SPDisplaysDataType", [])
        return next((int(d["sppci_cores"]) for d in displays if "sppci_cores" in d), None)
    except (ValueError, TypeError, AttributeError):
        return None


def _output(command: list[str]) -> str | None:
    """What a command printed, or None where it is missing, fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
