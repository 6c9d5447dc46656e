"""SIGTERM and SIGINT at each time of a node's life: exit code 0, in time, and no process is left."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

import grpc
import psutil
import pytest

from proto import control_pb2, control_pb2_grpc, head_pb2, head_pb2_grpc, ring_pb2
from tests.disks import small_disk
from tests.node_process import finish, node, start_node, wait_line, write_cluster
from tests.ring_processes import free_ports
from tests.tiny_models import write_checkpoint
from tests.waiting import is_in_time, wait_for

STOP_S = 3.0  # 2 s are promised; this machine is busy
SIGNALS = pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint("llama", tmp_path_factory.mktemp("model") / "tiny", num_layers=5)


def children(process: subprocess.Popen[str]) -> list[str]:
    """The modules that its child processes run."""
    found = []
    for child in psutil.Process(process.pid).children():
        try:
            command = child.cmdline()
        except psutil.NoSuchProcess:
            continue
        found += command[2:3]
    return found


def stop(process: subprocess.Popen[str], signum: signal.Signals, *, is_group: bool = False) -> None:
    """Sends the signal, to the node or as a terminal does to its group, and checks the end."""
    family = psutil.Process(process.pid).children(recursive=True)
    sent_at = time.monotonic()
    (os.killpg if is_group else os.kill)(process.pid, signum)
    ended = finish(process)
    took_s = time.monotonic() - sent_at
    assert ended.code == 0, ended.text
    assert is_in_time(took_s, STOP_S)
    assert [child for child in family if child.is_running()] == []


@SIGNALS
def test_while_it_imports(signum: signal.Signals, tmp_path: Path, model: Path) -> None:
    process = start_node("--rank", 0, "--config", write_cluster(tmp_path, model, node()))
    # a library of MLX in its memory: Python's own start is over, and that of the node is not
    wait_for(lambda: any("mlx" in m.path for m in psutil.Process(process.pid).memory_maps()), 20.0)
    stop(process, signum)


@SIGNALS
def test_while_it_proves_its_cuts(signum: signal.Signals, tmp_path: Path, model: Path) -> None:
    config = write_cluster(tmp_path, model, node(layers="0:2"), node(layers="2:5"), api={"port": 0})
    empty = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "HOME": str(tmp_path)}  # no proof of an earlier start
    process = start_node("--rank", 0, "--config", config, env=empty)
    wait_for(lambda: set(children(process)) == {"cluster.api", "shard_loader.cuts"}, 20.0)
    stop(process, signum, is_group=signum is signal.SIGINT)


@SIGNALS
def test_while_it_loads(signum: signal.Signals, tmp_path: Path, model: Path) -> None:
    config = write_cluster(tmp_path, model, node(), api={"port": 0})
    process = start_node("--rank", 0, "--config", config, env={"MACRAME_FAULT": "load_delay_s=30"})
    wait_line(process, "is loading")
    stop(process, signum, is_group=signum is signal.SIGINT)


@SIGNALS
def test_while_a_request_runs(signum: signal.Signals, tmp_path: Path, model: Path) -> None:
    (port,) = free_ports(1)
    config = write_cluster(tmp_path, model, node(port=port), api={"port": 0})
    process = start_node("--rank", 0, "--config", config, env={"MACRAME_FAULT": "step_delay_ms=50"})
    wait_line(process, "] ok")
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        request = head_pb2.GenerateRequest(prompt=[1, 2], max_tokens=60, sampling=ring_pb2.Sampling())
        answer = head_pb2_grpc.HeadStub(channel).Generate(request, timeout=20.0)
        next(answer)
        status = control_pb2_grpc.ControlStub(channel).Status(control_pb2.StatusRequest(), timeout=20.0)
        assert status.num_sessions == 1
        stop(process, signum, is_group=signum is signal.SIGINT)
        with pytest.raises(grpc.RpcError) as failure:
            list(answer)
    assert failure.value.code() is grpc.StatusCode.UNAVAILABLE
    assert failure.value.details() == "the head is stopping; send the request again when it is back"


def test_a_worker_while_it_waits_for_its_head(tmp_path: Path, model: Path) -> None:
    config = write_cluster(tmp_path, model, node(), node())
    process = start_node("--rank", 1, "--config", config)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("NODE_READY 1 127.0.0.1 ")
    stop(process, signal.SIGTERM)


def fill(path: Path) -> None:
    """Until there is no space left on its disk."""
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


@pytest.mark.long
def test_a_full_disk_of_the_log_stops_neither_answers_nor_the_end(tmp_path: Path, model: Path) -> None:
    (port,) = free_ports(1)
    config = write_cluster(tmp_path, model, node(port=port), api={"port": 0})
    small = tmp_path / "small"
    with small_disk(small):
        log, filler = small / "node.log", small / "filler"
        process = start_node("--rank", 0, "--config", config, "--log-file", log, "--no-api")
        wait_line(process, "] ok")
        fill(filler)
        size = log.stat().st_size
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            head = head_pb2_grpc.HeadStub(channel)
            for number in range(60):  # a line each, more than what is left of the last page
                request = head_pb2.GenerateRequest(
                    request_id=f"full-{number}", prompt=[1, 2], max_tokens=3, sampling=ring_pb2.Sampling()
                )
                assert len(list(head.Generate(request, timeout=20.0))) >= 1
            assert log.stat().st_size - size < 4096
            filler.unlink()
            request.request_id = "after"
            assert len(list(head.Generate(request, timeout=20.0))) >= 1
            wait_for(lambda: "lines before this one were lost" in log.read_text(errors="replace"))
            wait_for(lambda: "after" in log.read_text(errors="replace").splitlines()[-1])
            fill(filler)
            for number in range(60):
                request.request_id = f"again-{number}"
                assert len(list(head.Generate(request, timeout=20.0))) >= 1
        stop(process, signal.SIGTERM)
