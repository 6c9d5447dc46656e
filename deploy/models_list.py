"""What `macrame models list` tells: asked of this machine, or of every node of a cluster file. One thread."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from cluster.config import ConfigError, NodeConfig, load_config
from cluster.kept_models import kept_models
from cluster.rpc import connect
from cluster.tls import Credentials, own_credentials
from deploy.narrow import fitted
from planner.sizes import size
from proto import control_pb2, control_pb2_grpc

ANSWER_S = 10.0  # scanning a large cache on a slow disk takes seconds
MAX_ASKED = 16  # nodes at once


@dataclass(frozen=True, slots=True)
class NodeModels:
    """What one node has. rank None: this machine, asked without a ring."""

    name: str
    rank: int | None = None
    models: Sequence[control_pb2.KeptModel] = ()
    free_bytes: int = 0
    running: str = ""  # the model that the ring runs
    layers: tuple[int, int] | None = None  # of that, half-open
    trouble: str = ""  # why it could not be asked


def here() -> NodeModels:
    """This machine."""
    told = kept_models()
    return NodeModels(socket.gethostname().partition(".")[0], None, list(told.models), told.free_bytes)


def of_ring(path: Path) -> list[NodeModels]:
    """Every node of the cluster file, in the order of ranks."""
    try:
        config = load_config(path)
        named = config.model
    except ConfigError:  # a hostfile names no model, and this needs none
        config, named = load_config(path, model="any"), ""
    credentials = own_credentials(config)
    nodes = [node for node in config.nodes if node.use]
    with ThreadPoolExecutor(MAX_ASKED, thread_name_prefix="ask-nodes") as pool:
        return list(pool.map(lambda node: _asked(node, credentials, named), nodes))


def _asked(node: NodeConfig, credentials: Credentials, named: str) -> NodeModels:
    with connect(node.address, credentials, node.name) as channel:
        control = control_pb2_grpc.ControlStub(channel)
        try:
            told = control.ListModels(control_pb2.ListModelsRequest(), timeout=ANSWER_S, wait_for_ready=False)
            status = control.Status(control_pb2.StatusRequest(), timeout=ANSWER_S)
        except grpc.RpcError as error:
            return NodeModels(node.name, node.rank, trouble=_reason(error, node))
    layers = (status.start, status.stop) if status.stop > status.start else None
    return NodeModels(node.name, node.rank, list(told.models), told.free_bytes, named, layers)


def _reason(error: grpc.RpcError, node: NodeConfig) -> str:
    assert isinstance(error, grpc.Call)
    if error.code() is grpc.StatusCode.UNIMPLEMENTED:
        return "runs an older macrame, which does not tell: update it there"
    if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
        return f"does not answer at {node.address}: is run_node running there?"
    return f"refuses: {error.details()}"


def as_json(nodes: list[NodeModels]) -> dict[str, Any]:
    """For --json; sizes in bytes."""
    return {
        "nodes": [
            {
                "rank": node.rank,
                "name": node.name,
                "reachable": not node.trouble,
                "reason": node.trouble,
                "free_bytes": node.free_bytes,
                "running": {"model": node.running, "start": node.layers[0], "stop": node.layers[1]}
                if node.layers
                else None,
                "models": [
                    {
                        "model": kept.model,
                        "revision": kept.revision,
                        "place": kept.place,
                        "here_bytes": kept.here_bytes,
                        "total_bytes": kept.total_bytes or None,
                    }
                    for kept in node.models
                ],
            }
            for node in nodes
        ]
    }


def render(nodes: list[NodeModels], width: int | None) -> str:
    """A table of the models, and a line for each node that runs layers or has none on disk."""
    rows = [_row(node, kept) for node in nodes for kept in node.models]
    lines = fitted(rows, width)
    told = [line for node in nodes for line in _about(node)]
    return "\n".join([*lines, *([""] if lines and told else []), *told])


def _row(node: NodeModels, kept: control_pb2.KeptModel) -> dict[str, str]:
    if not kept.total_bytes:
        share = "in part"
    elif kept.here_bytes >= kept.total_bytes:
        share = "all of it"
    else:
        share = f"{kept.here_bytes / kept.total_bytes:.0%} of {size(kept.total_bytes)}"
    first = {} if node.rank is None else {"rank": str(node.rank), "node": node.name}
    return first | {
        "model": kept.model,
        "revision": kept.revision[:12],
        "here": size(kept.here_bytes),
        "": share,
        "in": kept.place,
    }


def _about(node: NodeModels) -> list[str]:
    who = node.name if node.rank is None else f"rank {node.rank} ({node.name})"
    if node.trouble:
        return [f"{who}: {node.trouble}"]
    parts = []
    if node.layers:
        parts.append(f"runs layers {node.layers[0]}:{node.layers[1]} of {node.running or 'its model'}")
    if not node.models:
        parts.append("has no model of the hub on disk")
    return [f"{who}: {', '.join([*parts, f'{size(node.free_bytes)} free'])}"]
