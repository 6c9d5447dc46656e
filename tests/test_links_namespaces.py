"""Two nodes with two cables between them, one of which is slow: network namespaces, veth pairs and tbf.

Needs root and the tools of iproute2 and util-linux; skipped where the system does not permit it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.config import load_config
from tests.node_process import write_cluster
from tests.tiny_models import write_checkpoint

pytestmark = pytest.mark.long

SLOW, FAST = "10.77.1", "10.77.2"  # networks of the two cables; .1 is alpha, .2 is beta
PORT = 50051
TOKEN = {"MACRAME_TOKEN": "only-for-this-test"}

WAIT_OK = """
import sys, time, grpc
from google.protobuf.json_format import MessageToJson
from cluster.rpc import connect
from proto import head_pb2, head_pb2_grpc
with connect("alpha:50051", "only-for-this-test") as channel:
    call = head_pb2_grpc.HeadStub(channel).WatchCluster(
        head_pb2.ClusterRequest(), wait_for_ready=True, timeout=60)
    for status in call:
        if status.status == "ok" and status.epoch > int(sys.argv[1]):
            print(MessageToJson(status))
            break
    call.cancel()
"""


class Namespace:
    """A network of its own with a file of host names; ends with the process that holds it."""

    def __init__(self, hosts: Path) -> None:
        script = (
            'mount --bind "$0" /etc/hosts && mount -t sysfs none /sys && ip link set lo up && echo up && cat'
        )
        self.holder = subprocess.Popen(
            ["unshare", "-n", "-m", "sh", "-c", script, str(hosts)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.holder.stdout is not None
        if self.holder.stdout.readline() != "up\n":
            pytest.skip(f"no network namespaces here: {self.holder.communicate()[1].strip()}")

    def command(self, *arguments: object) -> list[str]:
        return [
            "nsenter",
            "-t",
            str(self.holder.pid),
            "-n",
            "-m",
            f"--wd={os.getcwd()}",
            *map(str, arguments),
        ]

    def run(self, *arguments: object) -> str:
        done = subprocess.run(self.command(*arguments), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def python(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(sys.executable, *arguments),
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
            env={**os.environ, **TOKEN},
        )


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[tuple[Namespace, Namespace]]:
    """alpha and beta, which know each other by names with two addresses."""
    missing = [tool for tool in ("unshare", "nsenter", "ip", "tc") if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"no network namespaces here: {', '.join(missing)} is missing")
    hosts = tmp_path / "hosts"
    lines = [f"{net}.{n} {name}" for n, name in ((1, "alpha"), (2, "beta")) for net in (SLOW, FAST)]
    hosts.write_text("127.0.0.1 localhost\n" + "\n".join(lines) + "\n")
    with contextlib.ExitStack() as stack:
        alpha, beta = (_held(stack, Namespace(hosts)) for _ in range(2))
        for name, net in (("slow", SLOW), ("fast", FAST)):
            alpha.run(
                "ip", "link", "add", name, "type", "veth", "peer", "name", name, "netns", beta.holder.pid
            )
            for place, number in ((alpha, 1), (beta, 2)):
                place.run("ip", "address", "add", f"{net}.{number}/24", "dev", name)
                place.run("ip", "link", "set", name, "up")
        for place in (alpha, beta):
            shape = ("rate", "20mbit", "burst", "16kb", "latency", "500ms")
            place.run("tc", "qdisc", "add", "dev", "slow", "root", "tbf", *shape)
        yield alpha, beta


def _held(stack: contextlib.ExitStack, namespace: Namespace) -> Namespace:
    stack.callback(namespace.holder.communicate)  # the end of its input ends it
    return namespace


@contextlib.contextmanager
def running(place: Namespace, rank: int, config: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A node there, until the end."""
    command = place.command(sys.executable, "-m", "cluster.run_node", "--rank", rank, "--config", config)
    with (config.parent / f"node{rank}.log").open("ab") as log:
        process = subprocess.Popen(
            [*command, "--no-api"], stdout=subprocess.DEVNULL, stderr=log, env={**os.environ, **TOKEN}
        )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(15)


def wait_ok(place: Namespace, after_epoch: int = 0) -> tuple[int, str]:
    """The epoch in which the ring serves, and where rank 0 sends to."""
    done = place.python("-c", WAIT_OK, after_epoch)
    assert done.returncode == 0, done.stderr
    status: dict[str, Any] = json.loads(done.stdout)
    return int(status["epoch"]), status["ranks"][0]["node"]["edges"][0]["address"]


def test_the_faster_of_two_cables_is_found_used_and_given_up_when_it_breaks(
    tmp_path: Path, machines: tuple[Namespace, Namespace]
) -> None:
    alpha, beta = machines
    model = write_checkpoint("llama", tmp_path / "tiny", num_layers=5)
    nodes = (
        {"host": "alpha", "memory_gb": 16, "layers": "0:3"},
        {"host": "beta", "memory_gb": 16, "layers": "3:5"},
    )
    config = write_cluster(tmp_path, model, *nodes)
    with running(alpha, 0, config):
        with running(beta, 1, config):
            epoch, _ = wait_ok(alpha)
            done = alpha.python("-m", "deploy.links", "--config", config, "--json")
            assert done.returncode == 0, done.stderr
            (pair,) = json.loads(done.stdout)["pairs"]
            for direction, number in zip(pair["directions"], (2, 1), strict=True):
                fast, slow = direction["paths"]
                assert (fast["ip"], slow["ip"]) == (f"{FAST}.{number}", f"{SLOW}.{number}")
                assert (fast["interface"], slow["interface"]) == ("fast", "slow")
                assert slow["bandwidth_gbit_s"] == pytest.approx(0.02, rel=0.25)
                assert fast["bandwidth_gbit_s"] > 0.2
            heard = json.loads(alpha.python("-m", "deploy.nodes", "--json").stdout)
            found = {one["name"]: (one["rank"], set(one["addresses"]), one["cluster"]) for one in heard}
            digest = load_config(config).digest
            assert found == {
                name: (rank, {f"{SLOW}.{rank + 1}", f"{FAST}.{rank + 1}"}, digest)
                for rank, name in enumerate(("alpha", "beta"))
            }
        with running(beta, 1, config):
            epoch, address = wait_ok(alpha, epoch)
            assert address == f"{FAST}.2:{PORT}"
            alpha.run("ip", "link", "set", "fast", "down")
            _, address = wait_ok(alpha, epoch)
            assert address in (f"{SLOW}.2:{PORT}", f"beta:{PORT}")
