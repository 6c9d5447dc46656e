"""Configuration forms of other tools, turned into macrame's own keys. Pure.

Two are read: the older `distributed_config.json` (`devices` or `device_list`) and the `mlx.launch`
hostfile, where the list order is the rank (https://ml-
explore.github.io/mlx/build/html/usage/launching_distributed.html).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from cluster.config_read import ConfigError, Table

OLDER_KEYS = ("model_name", "model_parallel_size", "devices", "device_list")
DEVICE_KEYS = ("device_id", "hostname", "capabilities")
CAPABILITY_KEYS = ("memory_gb", "gpu_cores", "device_type", "model", "max_recommended_model_size_gb")
HOSTFILE_KEYS = ("backend", "envs", "hosts")
HOST_KEYS = ("ssh", "ips", "rdma")


def own_form(file: Path, document: Any) -> Any:
    """`document` with macrame's own keys, whichever form it has. Raises ConfigError."""
    if isinstance(document, list):
        return _from_hostfile(file, document)
    if not isinstance(document, dict):
        return document
    if "hosts" in document and all(key in HOSTFILE_KEYS for key in document):
        return _from_hostfile(file, Table(file, "", document, HOSTFILE_KEYS).take_list("hosts"))
    if "nodes" not in document and any(key in document for key in OLDER_KEYS):
        return _from_older(Table(file, "", document, OLDER_KEYS))
    return document


def _from_hostfile(file: Path, hosts: list[Any]) -> dict[str, Any]:
    nodes = []
    for i, host in enumerate(hosts):
        table = Table(file, f"hosts[{i}]", host, HOST_KEYS)
        ips = table.take_list("ips")
        if not all(isinstance(ip, str) for ip in ips):
            raise table.error("ips", "must be a list of addresses")
        ssh = table.take_str("ssh")
        address = ips[0] if ips else ssh
        if address is None:
            raise table.error("ssh", "must name the host")
        nodes.append({"host": address})
    return {"nodes": nodes}


def _from_older(table: Table) -> dict[str, Any]:
    if "devices" in table and "device_list" in table:
        raise table.error("device_list", "stands beside devices: keep one of the two")
    key = "device_list" if "device_list" in table else "devices"
    devices = table.take_tables(key, DEVICE_KEYS)
    size = table.take_int("model_parallel_size", 1, 4096)
    if size is not None and size != len(devices):
        raise table.error("model_parallel_size", f"must be the number of {key}, which is {len(devices)}")
    document: dict[str, Any] = {"nodes": [_older_node(device) for device in devices]}
    if "model_name" in table:
        document["model"] = table.take_str("model_name")
    return document


def _older_node(device: Table) -> dict[str, Any]:
    able = device.take_table("capabilities", CAPABILITY_KEYS)
    node: dict[str, Any] = {"host": device.take_str("hostname")}
    if node["host"] is None:
        raise device.error("hostname", "must name the host")
    device_id = device.values.get("device_id")
    if isinstance(device_id, bool) or not isinstance(device_id, str | int | None):
        raise device.error("device_id", "must be a name or a number")
    if device_id is not None:
        node["name"] = device_id if isinstance(device_id, str) else f"node{device_id}"
    chip = chip_in(able.take_str("model") or "") or chip_in(able.take_str("device_type") or "")
    if chip is not None:
        node["chip"] = chip
    for theirs, ours in (
        ("memory_gb", "memory_gb"),
        ("gpu_cores", "gpu_cores"),
        ("max_recommended_model_size_gb", "max_memory_gb"),
    ):
        if theirs in able:
            value = able.values[theirs]
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise able.error(theirs, "must be a number")
            node[ours] = value
    return node


def chip_in(text: str) -> str | None:
    """The Apple chip named in free text such as "Mac mini (M4 Pro)", or None."""
    match = re.search(r"\bM(\d+)(?:\s+(Pro|Max|Ultra))?\b", text, re.IGNORECASE)
    if match is None:
        return None
    suffix = f" {match.group(2).capitalize()}" if match.group(2) else ""
    return f"Apple M{match.group(1)}{suffix}"


def refuse_missing_model(file: Path) -> ConfigError:
    """The error for a file that names no model, as a hostfile does."""
    return ConfigError(
        f"{file}: model is missing: name a folder or a hub id there, or give --model to "
        "run_node and plan-dry-run"
    )
