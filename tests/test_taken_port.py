"""Who listens on a port, asked of the system."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from cluster.config import load_config
from deploy.taken_port import UNKNOWN, listener, of_service, port_taken
from tests.up_process import write_config


def test_a_free_port_has_no_listener_and_a_taken_one_has_its_process() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        told = listener("127.0.0.1", port)
    assert told is not None
    assert told.startswith(f"process {os.getpid()} (python")
    assert listener("127.0.0.1", port) is None


def test_a_unit_of_ours_is_known_by_its_control_group() -> None:
    assert of_service("0::/system.slice/macrame-node1.service\n") == " of the service macrame-node1.service"
    assert of_service("0::/system.slice/ssh.service\n") == ""
    assert of_service("0::/user.slice/user-1000.slice/session-2.scope\n") == ""


def test_a_port_that_something_else_has_is_told_with_and_without_its_process(tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path))
    node = config.nodes[1]
    ends = ": stop what listens there, or write another port into the cluster file"
    told = str(port_taken(config, node, "b on box", node.port, "process 7 (nginx)"))
    assert told == f"port {node.port} of b on box is taken by process 7 (nginx){ends}"
    told = str(port_taken(config, node, "the API", config.api.port, UNKNOWN))
    assert told == f"port {config.api.port} of the API is taken{ends}"
