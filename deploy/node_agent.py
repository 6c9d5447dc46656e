"""What runs on another machine for `macrame up`, an order a process: it does what a LocalNode does here.

An order comes as JSON on standard input, its answer goes as JSON to standard output. A started node gets a
small process above it, the keeper, which outlives the ssh connection and writes down with which exit code it
ended. One thread.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NoReturn

from cluster.errors import EXIT_ERROR, EXIT_OK, UserError
from deploy.local_node import LocalNode
from deploy.node_handle import NodeProcess
from shard_loader.whole_file import write_whole

ENDED_NAME = "ended.json"  # beside the node's record: pid and exit code of the last one that ended


class AgentNode(LocalNode):
    """The node of an order. Version and digest are the sender's, so that both sides compare the same."""

    def __init__(self, order: Mapping[str, Any]) -> None:
        super().__init__(Path(order["folder"]), int(order["rank"]))
        self.version, self._digest = str(order["version"]), str(order["digest"])

    def keep(self, order: Mapping[str, Any]) -> NoReturn:
        """Starts the node, answers, and stays until it ends."""
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        self.start(order["arguments"], order["environment"])
        child = self._child
        assert child is not None
        _answer({"pid": child.pid})
        with open(os.devnull, "r+b") as nothing:
            for descriptor in range(3):
                os.dup2(nothing.fileno(), descriptor)
        code = child.wait()
        with contextlib.suppress(OSError):  # the folder may be gone, the disk full
            ended = json.dumps({"pid": child.pid, "exit_code": code}).encode()
            write_whole(self.folder / ENDED_NAME, ended, 0o600)
        sys.exit(EXIT_OK)

    def state(self) -> NodeProcess:
        """As LocalNode's, with the exit code that the keeper wrote down."""
        state = super().state()
        if state.pid is not None:
            return state
        try:
            ended = json.loads((self.folder / ENDED_NAME).read_bytes())
        except (OSError, ValueError):
            return state
        is_last = ended["pid"] == self._record().get("pid")
        return replace(state, exit_code=ended["exit_code"]) if is_last else state


def main() -> int:
    """Carries out one order; exit code 0 with an answer, which is {"error", "exit_code"} for a UserError."""
    order = json.load(sys.stdin)
    try:
        _answer(_done(order))
    except UserError as error:
        _answer({"error": str(error), "exit_code": error.exit_code})
    return EXIT_OK


def _done(order: Mapping[str, Any]) -> Mapping[str, Any]:
    node = AgentNode(order)
    match order["order"]:
        case "put_files":
            files = {name: (base64.b64decode(text), mode) for name, (text, mode) in order["files"].items()}
            return {"changed": node.put_files(files)}
        case "start":
            return _start(order)
        case "keep":
            node.keep(order)
        case "state":
            return asdict(node.state())
        case "listeners":
            return {"who": node.listeners([(host, port) for host, port in order["places"]])}
        case "tail":
            return {"text": node.tail(order["lines"])}
        case "stop":
            return {"left": node.stop(order["timeout_s"])}
    raise UserError(f"the order {order['order']!r} is of another version of macrame", EXIT_ERROR)


def _start(order: Mapping[str, Any]) -> Mapping[str, Any]:
    """Starts the keeper in a session of its own, and passes its answer on."""
    keeper = subprocess.Popen(
        [sys.executable, "-m", "deploy.node_agent"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert keeper.stdin is not None
    assert keeper.stdout is not None
    with keeper.stdin:
        keeper.stdin.write(json.dumps({**order, "order": "keep"}).encode())
    line = keeper.stdout.readline()
    if not line:
        raise UserError(f"the node could not be started: its keeper ended with {keeper.wait()}", EXIT_ERROR)
    answer: dict[str, Any] = json.loads(line)
    return answer


def _answer(content: Mapping[str, Any]) -> None:
    print(json.dumps(content), flush=True)


if __name__ == "__main__":
    sys.exit(main())
