"""`macrame up --ssh` from a wheel and a cluster file to an answered chat, on machines of their own.

Each machine is a network namespace with its own sshd, HOME, host name and processes, no route to an index,
and nothing of this checkout. `-s` prints how long each step took.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import EXIT_ERROR, EXIT_UNREACHABLE
from tests.ssh_host import make_key
from tests.ssh_machines import ROOT, Carried, SshMachines, carried, interrupt, ssh_machines
from tests.waiting import wait_for

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]
LAYERS = {"alpha": "0:3", "beta": "3:8", "gamma": "8:9"}

# How strangers knock at a node: in the open, without a certificate, with one of another CA for the very name.
# Last comes a node of the cluster, which shows that it is the certificate that opens.
KNOCK = """
import sys, grpc
from pathlib import Path
from proto import control_pb2, control_pb2_grpc

address, strange, own = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
name = [("grpc.ssl_target_name_override", "beta.macrame.internal")]
trust = (own / "ca.pem").read_bytes()
pairs = [(f / f"{n}.key", f / f"{n}.pem") for f, n in ((strange, "beta"), (own, "gamma"))]
strangers, ours = [[path.read_bytes() for path in pair] for pair in pairs]
ways = {
    "in the open": grpc.insecure_channel(address),
    "without a certificate": grpc.secure_channel(address, grpc.ssl_channel_credentials(trust), name),
    "of another CA": grpc.secure_channel(address, grpc.ssl_channel_credentials(trust, *strangers), name),
    "of this cluster": grpc.secure_channel(address, grpc.ssl_channel_credentials(trust, *ours), name),
}
for way, channel in ways.items():
    try:
        control_pb2_grpc.ControlStub(channel).Status(control_pb2.StatusRequest(), timeout=10)
        print(way, "IN")
    except grpc.RpcError as error:
        print(way, error.code().name)
"""


@pytest.fixture(scope="module")
def what(tmp_path_factory: pytest.TempPathFactory) -> Carried:
    return carried(tmp_path_factory.mktemp("carried"))


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory, what: Carried) -> Iterator[SshMachines]:
    """Three of them; what is installed there by one test the next finds."""
    with with_model(tmp_path_factory.mktemp("machines"), tuple(LAYERS), what) as running:
        yield running


@contextlib.contextmanager
def with_model(folder: Path, names: Sequence[str], what: Carried) -> Iterator[SshMachines]:
    """New machines, on which the demo's model is in the same folder."""
    with ssh_machines(folder, names, what) as running:
        shutil.copytree(ROOT / "deploy" / "demo" / "model", running.folder / "demo-model")
        yield running


def cluster(machines: SshMachines, *names: str, file: str = "cluster.json", **values: Any) -> Path:
    """A cluster file of the user's on these machines, in this order."""
    path = machines.home("alpha") / file
    nodes = [{"host": name, "memory_gb": 8, "layers": LAYERS[name]} for name in names]
    model = str(machines.folder / "demo-model")
    path.write_text(json.dumps({"model": model, "context": 256, "nodes": nodes, **values}))
    return path


def wait_event(up: subprocess.Popen[str], kind: str, machines: SshMachines) -> dict[str, Any]:
    """The next event of that kind; fails with what `up` said where it ends before."""
    assert up.stdout is not None
    for line in up.stdout:
        event: dict[str, Any] = json.loads(line)
        if event["event"] == kind:
            return event
    raise AssertionError(f"up ended with {up.wait()}: {machines.errors()[-4000:]}")


def answer(machines: SshMachines, url: str = "http://127.0.0.1:8080") -> str:
    """Of a greedy chat, through the OpenAI API on the user's machine."""
    body = json.dumps(
        {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 16, "temperature": 0}
    )
    code = f"""
import json, urllib.request
request = urllib.request.Request({url + "/v1/chat/completions"!r}, {body.encode()!r},
                                 {{"Content-Type": "application/json"}})
with urllib.request.urlopen(request, timeout=60) as reply:
    print(json.load(reply)["choices"][0]["message"]["content"])
"""
    return machines.alpha.run(machines.what.python, "-c", code, env={"HOME": str(machines.home("alpha"))})


def counts(machines: SshMachines) -> dict[str, int]:
    return {name: machines.nodes(name) for name in machines.machines}


def test_from_a_wheel_to_an_answered_chat_and_again_after_a_kill(machines: SshMachines) -> None:
    config = cluster(machines, *LAYERS)
    times: dict[str, float] = {}
    began = time.monotonic()
    with machines.up(config) as up:
        wait_event(up, "started", machines)
        times["first up: installed on beta and gamma"] = time.monotonic() - began
        wait_event(up, "ready", machines)
        first = answer(machines)
        times["first up: answered"] = time.monotonic() - began
        assert first.strip()
        assert counts(machines) == {"alpha": 1, "beta": 1, "gamma": 1}
        assert json.loads(config.read_text())["security"]["tls"]["ca"] == "certs/ca.pem"
        for name in ("beta", "gamma"):
            (process,) = machines.machines[name].processes("cluster.run_node")
            home = machines.home(name)
            assert process.cmdline()[0].startswith(f"{home}/.macrame/env/")
            keys = list((home / ".macrame" / "rings").rglob("*.key"))
            assert [key.name for key in keys] == [f"{name}.key"]  # nobody has another's
            assert keys[0].stat().st_mode & 0o777 == 0o600
        pids = {n: m.processes("cluster.run_node")[0].pid for n, m in machines.machines.items()}
        machines.kill_up(up)
    assert counts(machines) == {"alpha": 1, "beta": 1, "gamma": 1}

    began = time.monotonic()
    with machines.up(config) as up:
        wait_event(up, "ready", machines)
        assert answer(machines) == first
        times["up again after its kill: answered, every node kept"] = time.monotonic() - began
        again = {n: m.processes("cluster.run_node")[0].pid for n, m in machines.machines.items()}
        assert again == pids

        began = time.monotonic()
        machines.machines["beta"].processes("cluster.run_node")[0].kill()
        wait_event(up, "died", machines)
        wait_for(lambda: is_ok(machines), 120.0, "the ring to serve again")
        assert answer(machines) == first
        times["a node killed: answered again"] = time.monotonic() - began

        began = time.monotonic()
        interrupt(machines.alpha, "up")
        wait_event(up, "stopped", machines)
        assert up.wait(30.0) == 0
        times["Ctrl-C: all stopped"] = time.monotonic() - began
    assert counts(machines) == {"alpha": 0, "beta": 0, "gamma": 0}

    began = time.monotonic()
    with machines.up(config) as up:
        wait_event(up, "ready", machines)
        assert answer(machines) == first
        times["up again after Ctrl-C: answered"] = time.monotonic() - began
    print("", *(f"{seconds:7.1f} s  {step}" for step, seconds in times.items()), sep="\n")


def is_ok(machines: SshMachines) -> bool:
    done = machines.macrame("status", "--json")
    return done.returncode == 0 and json.loads(done.stdout).get("status") == "ok"


def test_a_stranger_is_refused_by_mutual_tls(machines: SshMachines) -> None:
    config = cluster(machines, *LAYERS)
    gamma = machines.machines["gamma"]
    strange = machines.home("gamma") / "strange"
    strange.mkdir()
    with machines.up(config) as up:
        wait_event(up, "ready", machines)
        (strange / "cluster.json").write_text(config.read_text())
        user = {"HOME": str(strange)}  # another user, who makes a CA of their own for the same names
        certs = ("certs", "make", "--config", strange / "cluster.json")
        gamma.run(machines.what.macrame, *certs, env=user)
        (own,) = (machines.home("gamma") / ".macrame" / "rings").glob("cluster-*/rank-2/certs")
        arguments = ("beta:50051", strange / "certs", own)
        out = gamma.run(machines.what.python, "-c", KNOCK, *arguments, env=user)
        assert out.splitlines() == [
            "in the open UNAVAILABLE",
            "without a certificate UNAVAILABLE",
            "of another CA UNAVAILABLE",
            "of this cluster IN",
        ]
        assert answer(machines).strip()


def test_a_head_on_another_machine_answers_through_ssh(machines: SshMachines) -> None:
    """Two machines; the API stays on loopback there, and `up` says where it is here."""
    config = cluster(machines, "beta", "gamma", file="two.json")
    document = json.loads(config.read_text())
    for node, layers in zip(document["nodes"], ("0:4", "4:9"), strict=True):
        node["layers"] = layers
    config.write_text(json.dumps(document))
    with machines.up(config) as up:
        ready = wait_event(up, "ready", machines)
        assert (ready["on"], ready["url"]) == ("beta", "http://127.0.0.1:8080/v1")  # it is free on alpha
        assert ready["text"].endswith(" (through ssh)")
        assert answer(machines, ready["url"].removesuffix("/v1")).strip()
        assert counts(machines) == {"alpha": 0, "beta": 1, "gamma": 1}

        document["context"] = 128  # edited between starts: the nodes are started anew
        config.write_text(json.dumps(document))
        pids = machines.machines["beta"].processes("cluster.run_node")[0].pid
        machines.kill_up(up)
    with machines.up(config) as up:
        ready = wait_event(up, "ready", machines)
        assert machines.machines["beta"].processes("cluster.run_node")[0].pid != pids
        assert answer(machines, ready["url"].removesuffix("/v1")).strip()
    assert counts(machines) == {"alpha": 0, "beta": 0, "gamma": 0}


def test_detached_nodes_go_on_until_down(machines: SshMachines) -> None:
    config = cluster(machines, *LAYERS)
    with machines.up(config, "--detach") as up:
        wait_event(up, "ready", machines)
        assert up.wait(30.0) == 0
    assert counts(machines) == {"alpha": 1, "beta": 1, "gamma": 1}
    assert answer(machines).strip()
    done = machines.macrame("down", "--config", config)
    assert done.returncode == 0, done.stderr
    assert counts(machines) == {"alpha": 0, "beta": 0, "gamma": 0}


def test_a_changed_host_key_and_a_host_that_is_away_stop_up_before_it_starts_anything(
    machines: SshMachines,
) -> None:
    config = cluster(machines, *LAYERS)
    known = machines.folder / "known_hosts"
    right = known.read_text()
    kind, key, *_ = make_key(machines.folder / "other_key").with_suffix(".pub").read_text().split()
    try:
        lines = [line for line in right.splitlines() if not line.startswith("gamma ")]
        known.write_text("\n".join([*lines, f"gamma {kind} {key}"]) + "\n")
        with machines.up(config) as up:
            assert up.wait(60.0) == EXIT_UNREACHABLE
        assert "the host key of gamma is not the one that is known here" in machines.errors()
    finally:
        known.write_text(right)
    machines.machines["gamma"].run("ip", "link", "set", "cable", "down")
    try:
        with machines.up(config) as up:
            assert up.wait(60.0) == EXIT_UNREACHABLE
        assert "gamma does not answer (" in machines.errors()
    finally:
        machines.machines["gamma"].run("ip", "link", "set", "cable", "up")
    assert counts(machines) == {"alpha": 0, "beta": 0, "gamma": 0}


def test_two_machines_of_which_one_has_no_network_but_this(tmp_path: Path, what: Carried) -> None:
    """First it is said that the wheels must be carried along, then they are."""
    with with_model(tmp_path, ("alpha", "beta"), what) as machines:
        config = cluster(machines, "alpha", "beta")
        document = json.loads(config.read_text())
        document["nodes"][1]["layers"] = "3:9"
        config.write_text(json.dumps(document))
        with machines.up(config, with_wheels=False) as up:
            assert up.wait(300.0) == EXIT_ERROR
        assert "beta cannot reach the package index (" in machines.errors()
        assert "carry the wheels along with --find-links FOLDER" in machines.errors()
        assert list((machines.home("beta") / ".macrame" / "env").iterdir()) == []
        with machines.up(config) as up:
            wait_event(up, "ready", machines)
            assert answer(machines).strip()
        assert counts(machines) == {"alpha": 0, "beta": 0}
