"""The older distributed_config.json and the hostfile of mlx.launch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster.config import ConfigError, load_config
from tests.test_config import write


@pytest.mark.parametrize("key", ["devices", "device_list"])
def test_the_older_form(tmp_path: Path, key: str) -> None:
    devices = [
        {
            "device_id": "mini1",
            "hostname": "mini1.local",
            "capabilities": {
                "memory_gb": 16,
                "gpu_cores": 10,
                "device_type": "Mac mini",
                "model": "Mac mini M4",
                "max_recommended_model_size_gb": 10,
            },
        },
        {"device_id": 1, "hostname": "mini2.local", "capabilities": {"memory_gb": 64, "model": "M4 Pro"}},
        {"device_id": 2, "hostname": "box.local"},
    ]
    config = load_config(write(tmp_path, {"model_name": "org/m", "model_parallel_size": 3, key: devices}))
    assert config.model == "org/m"
    assert [(n.name, n.host, n.chip) for n in config.nodes] == [
        ("mini1", "mini1.local", "Apple M4"),
        ("node1", "mini2.local", "Apple M4 Pro"),
        ("node2", "box.local", None),
    ]
    assert (config.nodes[0].memory_gb, config.nodes[0].gpu_cores, config.nodes[0].max_memory_gb) == (
        16,
        10,
        10,
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"model_parallel_size": 2}, "model_parallel_size = 2 must be the number of devices, which is 1"),
        (
            {"modelname": "x"},
            'unknown key "modelname" with the value "x", the nearest known key is "model_name"',
        ),
        ({"device_list": []}, r"device_list = \[\] stands beside devices: keep one of the two"),
        (
            {"devices": [{"host_name": "a"}]},
            r'devices\[0\]: unknown key "host_name" .* known key is "hostname"',
        ),
        ({"devices": [{"device_id": 1}]}, r"devices\[0\]\.hostname is missing: it must name the host"),
        ({"devices": [{"hostname": "a", "device_id": 1.5}]}, "device_id = 1.5 must be a name or a number"),
        (
            {"devices": [{"hostname": "a", "capabilities": {"memory_gb": "16"}}]},
            'memory_gb = "16" must be a number',
        ),
        (
            {"devices": [{"hostname": "a", "capabilities": {"memory": 16}}]},
            r'devices\[0\]\.capabilities: unknown key "memory" .* nearest known key is "memory_gb"',
        ),
    ],
)
def test_mistakes_in_the_older_form(tmp_path: Path, overrides: dict[str, Any], message: str) -> None:
    document = {"model_name": "m", "devices": [{"hostname": "a"}]} | overrides
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path, document))


HOSTS = [
    {"ssh": "mini1.local", "ips": ["10.0.0.1"]},
    {"ssh": "mini2.local", "ips": [], "rdma": [None, "en2"]},
]


@pytest.mark.parametrize(
    "document", [HOSTS, {"hosts": HOSTS}, {"backend": "ring", "envs": [], "hosts": HOSTS}]
)
def test_a_hostfile_of_mlx_launch(tmp_path: Path, document: Any) -> None:
    path = write(tmp_path, document)
    assert [(n.rank, n.host) for n in load_config(path, model="m").nodes] == [
        (0, "10.0.0.1"),
        (1, "mini2.local"),
    ]
    with pytest.raises(
        ConfigError, match="model is missing: name a folder or a hub id there, or give --model"
    ):
        load_config(path)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([{"ips": []}], r"hosts\[0\]\.ssh is missing"),
        ([{"ssh": "a", "ips": [1]}], r"hosts\[0\]\.ips = \[1\] must be a list of addresses"),
        ([{"ssh": "a", "ip": "b"}], 'unknown key "ip" .* nearest known key is "ips"'),
        ([], "nodes = .* must list at least one node"),
        ([3], r"hosts\[0\] = 3 must be a mapping"),
    ],
)
def test_mistakes_in_a_hostfile(tmp_path: Path, document: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path, document), model="m")
