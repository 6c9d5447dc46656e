"""`macrame doctor` as a user runs it, in processes of its own, against faults that are really there.

Each test prints what was found: `make test-long ARGS="-k planted -rP"` shows it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.certificates import DAY, NOW, Cluster
from tests.node_process import node, write_cluster
from tests.ring_processes import RingProcesses, free_ports
from tests.tiny_models import write_checkpoint

pytestmark = [pytest.mark.long, pytest.mark.timeout(300)]  # each starts several processes

ROOT = Path(__file__).resolve().parent.parent
LAYERS = [(0, 2), (2, 4), (4, 5)]
QUIET = {"MLX_DISABLE_COMPILE": None}  # the nodes of these tests run as a user's
CLOCK_SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>
static long skew(void) { const char *s = getenv("CLOCK_SKEW_S"); return s ? atol(s) : 0; }
int clock_gettime(clockid_t id, struct timespec *at) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int code = real(id, at);
    if (code == 0 && id == CLOCK_REALTIME) at->tv_sec += skew();
    return code;
}
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint("llama", tmp_path_factory.mktemp("model") / "tiny", num_layers=5)


def doctor(
    *arguments: object,
    code: int = 1,
    env: Mapping[str, str | None] | None = None,
    before: Sequence[str] = (),
    cwd: Path = ROOT,
) -> list[dict[str, Any]]:
    """The findings of one `macrame doctor`; its text is printed."""
    wanted = {**os.environ, **QUIET, "PYTHONPATH": str(ROOT), **(env or {})}
    environment = {key: value for key, value in wanted.items() if value is not None}
    command = [*before, sys.executable, "-m", "deploy.cli", "doctor", *map(str, arguments)]
    for form in ([], ["--json"]):
        done = subprocess.run(
            [*command, *form],
            capture_output=True,
            text=True,
            check=False,
            cwd=cwd,
            env=environment,
            timeout=100,
        )
        assert done.returncode == code, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        if not form:
            print("$ macrame doctor", *arguments)
            print(done.stdout.partition("\nfine:")[0])
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["ok"] == (not found["findings"])
    assert all(one["what"] and one["why"] and one["mend"] for one in found["findings"])
    return list(found["findings"])


def of(check: str, findings: list[dict[str, Any]]) -> dict[str, Any]:
    """The one finding of a check."""
    (found,) = [one for one in findings if one["check"] == check]
    return found


# -- one machine ------------------------------------------------------------------------------------------
def test_nothing_planted_nothing_found(tmp_path: Path, model: Path) -> None:
    assert doctor("--config", write_cluster(tmp_path, model, node(name="n0")), code=0) == []


def test_planted_a_port_that_is_taken(tmp_path: Path, model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taker:
        path = write_cluster(tmp_path, model, node(name="n0", port=taker.getsockname()[1]))
        found = of("ports", doctor("--config", path))
    assert f"(process {os.getpid()})" in found["what"]
    assert found["mend"].startswith(f"kill {os.getpid()} ")


def test_planted_another_proto(tmp_path: Path) -> None:
    (tmp_path / "proto").mkdir()
    (tmp_path / "proto" / "__init__.py").write_text("")
    env = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    found = of("packages", doctor(env=env, cwd=tmp_path))
    assert found["what"] == f"another package named 'proto' in {tmp_path / 'proto'} hides macrame's"


def test_planted_an_older_mlx_lm(tmp_path: Path) -> None:
    env = {"PYTHONPATH": f"{_metadata(tmp_path, 'mlx_lm', '0.29.1')}{os.pathsep}{ROOT}"}
    found = of("packages", doctor(env=env))
    assert found["what"].startswith("a package is too old: mlx-lm 0.29.1 (needs ")


def test_planted_a_full_disk(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    fill = 'mount -t tmpfs -o size=3m none "$0" && head -c 4M /dev/zero > "$0/fill" 2>/dev/null; exec "$@"'
    before = ["unshare", "-m", "sh", "-c", fill, str(small)]
    if subprocess.run([*before, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this system lets no test mount a tmpfs in a namespace of its own")
    found = of("disk", doctor(env={"XDG_CACHE_HOME": str(small)}, before=before))
    assert found["severity"] == "error"
    assert " is full: 0.0 MB of 3.1 MB are free" in found["what"]


def test_planted_a_model_file_cut_short_and_one_missing(tmp_path: Path, model: Path) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    weights = sorted(copy.glob("*.safetensors"))[-1]
    path = write_cluster(tmp_path, copy, node(name="n0"))
    os.truncate(weights, weights.stat().st_size // 2)
    assert f"{weights} is truncated" in of("model", doctor("--config", path))["what"]
    weights.unlink()
    assert ".safetensors" in of("model", doctor("--config", path))["what"]


def test_planted_a_token_that_others_can_read(tmp_path: Path, model: Path) -> None:
    token = tmp_path / "token"
    token.write_text("0123456789abcdef")
    token.chmod(0o644)
    path = write_cluster(tmp_path, model, node(name="n0"), security={"token_file": "token"})
    found = of("security", doctor("--config", path))
    assert found["mend"] == f"chmod 600 {token}"
    subprocess.run(["sh", "-c", found["mend"]], check=True)  # the command that mends it mends it
    assert doctor("--config", path, code=0) == []


PATHS = {"tls": {"ca": "certs/ca.pem", "cert": "certs/{name}.pem", "key": "certs/{name}.key"}}


def test_planted_an_expired_certificate(tmp_path: Path, model: Path) -> None:
    certs = Cluster(tmp_path / "certs")
    certs.expired("n0")
    found = of(
        "certificates", doctor("--config", write_cluster(tmp_path, model, node(name="n0"), security=PATHS))
    )
    assert found["what"] == f"{certs.files('n0').cert} expired on {NOW - 10 * DAY:%Y-%m-%d}"


def test_planted_memory_that_is_not_there(tmp_path: Path, model: Path) -> None:
    found = doctor("--config", write_cluster(tmp_path, model, node(name="n0", memory_gb=4096)))
    assert of("memory", found)["what"].startswith("nodes[0].memory_gb = 4096, but this machine has ")
    found = doctor("--config", write_cluster(tmp_path, model, node(name="n0", memory_gb=0.001)))
    assert "needs" in of("plan", found)["what"]


def test_planted_variables_and_a_config_with_a_mistake(tmp_path: Path) -> None:
    path = tmp_path / "cluster.json"
    path.write_text('{"model": "x/y", "nodes": [{"host": "127.0.0.1", "memroy_gb": 16}]}')
    env = {"MACRAME_FAULT": "step_delay_ms=50"}
    found = doctor("--config", path, code=3, env=env)
    assert "memroy_gb" in of("config", found)["what"]
    assert of("environment", found)["mend"] == "unset MACRAME_FAULT"


WIFI = """
set -e
mount -t tmpfs none /sys
mkdir -p /sys/class/net/wlan0/wireless /sys/class/net/eth5/device/of /sys/class/net/lo
echo 1 > /sys/class/net/wlan0/type; echo 1 > /sys/class/net/eth5/type; echo 772 > /sys/class/net/lo/type
ip link set lo up
ip link add wlan0 type veth peer name air0
ip link add eth5 type veth peer name cable0
for name in wlan0 air0 eth5 cable0; do ip link set $name up; done
ip address add 10.66.1.1/24 dev wlan0
ip address add 10.66.2.1/24 dev eth5
ip route add unreachable 10.66.3.0/24
exec "$@"
"""


def test_planted_wifi_beside_a_cable_a_silent_machine_and_no_route(tmp_path: Path, model: Path) -> None:
    """A network namespace whose sysfs says that one interface is Wi-Fi and the other has a card."""
    before = ["unshare", "-n", "-m", "sh", "-c", WIFI, "sh"]
    if (
        shutil.which("ip") is None
        or subprocess.run([*before, "true"], capture_output=True, check=False).returncode
    ):
        pytest.skip("this system has no network namespaces for tests")
    nodes = [node(name="me", host="10.66.1.1"), node(name="air", host="10.66.1.2")]
    nodes.append(node(name="lost", host="10.66.3.2"))
    path = write_cluster(tmp_path, model, *nodes)
    found = doctor("--config", path, before=before, env={"MACRAME_TOKEN": "0123456789"})
    assert (
        of("links", found)["what"] == "air is reached by Wi-Fi (wlan0), though Ethernet (eth5) is connected"
    )
    reach = [one["what"] for one in found if one["check"] == "reach"]
    assert len(reach) == 2
    assert "No route to host" in "".join(reach)
    assert of("security", found)["severity"] == "warning"  # a token, and no encryption


# -- a ring -----------------------------------------------------------------------------------------------
def _metadata(folder: Path, name: str, version: str) -> Path:
    """A folder that makes Python believe in another version of a distribution."""
    place = folder / f"{name}-{version}.dist-info"
    place.mkdir()
    (place / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n"
    )
    return folder


def _clock_shim(folder: Path) -> Path:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler here for a clock that goes wrong")
    (folder / "skew.c").write_text(CLOCK_SHIM)
    library = folder / "skew.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, folder / "skew.c", "-ldl"], check=True)
    return library


def test_planted_in_a_ring_clock_version_and_config(tmp_path: Path, model: Path) -> None:
    """Node 1 has a clock 90 s ahead, node 2 other metadata of mlx-lm; then the file is edited."""
    skewed = {"LD_PRELOAD": str(_clock_shim(tmp_path)), "CLOCK_SKEW_S": "90"}
    other = {"PYTHONPATH": f"{_metadata(tmp_path, 'mlx_lm', '0.99.0')}{os.pathsep}{ROOT}"}
    ring = RingProcesses(tmp_path, model, LAYERS, env=QUIET, env_of={1: skewed, 2: other})
    with ring:
        ring.wait_ok()
        found = doctor("--all", "--config", ring.config_path)
        assert len(found) == 2
        assert of("versions", found)[
            "what"
        ] == "mlx-lm differs: 0.32.2 on n0, 0.32.2 on n1, 0.99.0 on n2".replace("0.32.2", _own_version())
        clock = of("clock", found)
        assert clock["severity"] == "warning"
        assert clock["what"].startswith("the clock of n1 is 90.0 s ahead of the others' (+-0.0")
        ring.config_path.write_text(json.dumps({**ring.config, "context": 256}))
        found = doctor("--all", "--config", ring.config_path)
        assert "run with another config than" in of("config", found)["what"]
        assert "ports" not in [one["check"] for one in found]
        (first, *others) = [one for one in doctor("--config", ring.config_path) if one["check"] == "config"]
        assert first["what"].startswith(f"127.0.0.1:{ring.ports[0]} has node 'n0' of another config ")
        assert len(others) == 2
        ring.config_path.write_text(json.dumps(ring.config))


def _own_version() -> str:
    from importlib.metadata import version

    return version("mlx-lm")


def test_planted_in_a_ring_dead_and_frozen_nodes(tmp_path: Path, model: Path) -> None:
    with RingProcesses(tmp_path, model, LAYERS, env=QUIET) as ring:
        ring.wait_ok()
        assert doctor("--all", "--config", ring.config_path, code=0) == []
        ring.kill(1)
        ring.processes[2].send_signal(signal.SIGSTOP)
        found = doctor("--all", "--config", ring.config_path)
        dead, frozen = [one for one in found if one["check"] == "nodes"]
        assert dead["what"] == f"n1 does not answer: nobody listens at 127.0.0.1:{ring.ports[1]}"
        assert dead["mend"] == f"run_node --rank 1 --config {ring.config_path}    # on 127.0.0.1"
        assert (
            frozen["what"]
            == f"n2 does not answer: 127.0.0.1:{ring.ports[2]} takes connections and does not answer in time"
        )
        assert frozen["mend"].startswith("ps -eo pid,stat,args | grep run_node ")
        assert of("ring", found)["what"].startswith("the ring does not serve (degraded): ")
        left = f"has a run_node that does not take our calls (process {ring.processes[2].pid})"
        assert of("ports", found)["what"] == f"127.0.0.1:{ring.ports[2]} {left}"
        ring.resume(2)


def test_planted_in_a_ring_a_node_of_another_cluster(tmp_path: Path, model: Path) -> None:
    """Over mutual TLS: the doctor shows a node's certificate; node 1 has one of another CA."""
    ours, theirs = Cluster(tmp_path / "certs"), Cluster(tmp_path / "other")
    for name in ("n0", "n1"):
        ours.node(name)
        theirs.node(name)
    ports = free_ports(2)
    nodes = [node(name=f"n{rank}", port=port) for rank, port in enumerate(ports)]
    path = write_cluster(tmp_path, model, *nodes, security=PATHS)
    (tmp_path / "stranger").mkdir()
    strange = {"tls": {key: value.replace("certs/", "../other/") for key, value in PATHS["tls"].items()}}
    stranger = write_cluster(tmp_path / "stranger", model, *nodes, security=strange)
    running = []
    try:
        for rank, config in ((0, path), (1, stranger)):
            command = [sys.executable, "-m", "cluster.run_node", "--rank", str(rank), "--config", str(config)]
            process = subprocess.Popen([*command, "--no-api"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            running.append(process)
            assert process.stdout is not None
            assert process.stdout.readline().startswith(b"NODE_READY")
        found = of("nodes", doctor("--all", "--config", path))
        assert found["what"].startswith(
            f"n1 does not answer: 127.0.0.1:{ports[1]} shows a certificate that is not of this cluster's CA"
        )
        told = doctor("--all", "--config", path)
        assert not {"ports", "config"} & {one["check"] for one in told}, told  # it is said once
        alone = of("config", doctor("--config", path))
        assert alone["what"] == f"127.0.0.1:{ports[1]} shows a certificate that is not of this cluster's CA"
    finally:
        for process in running:
            process.terminate()
            process.communicate(timeout=10)
