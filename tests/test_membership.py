"""Who may be a member of a ring, and what the head says of those who may not. Real processes."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import grpc
import pytest

from cluster.config import load_config
from cluster.config_nodes import NodeConfig
from cluster.membership import Member, Reach, Watcher, short_of_memory
from proto import control_pb2, control_pb2_grpc, head_pb2, head_pb2_grpc
from tests.node_process import node, write_cluster
from tests.ring_processes import RingProcesses
from tests.tiny_models import write_checkpoint

TOKEN = "a-token-of-this-test"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint("llama", tmp_path_factory.mktemp("model") / "tiny", num_layers=5)


def write_token(directory: Path, name: str, token: str) -> str:
    path = directory / name
    path.write_text(token + "\n")
    path.chmod(0o600)
    return str(path)


@contextmanager
def started(ring: RingProcesses, edits: list[dict[str, object]]) -> Iterator[RingProcesses]:
    """The ring, in which each rank reads a file of its own: the ring's with the edits of that rank."""
    try:
        for rank, edit in enumerate(edits):
            ring.config_path.write_text(json.dumps({**ring.config, **edit}))
            ring.start(rank)
            ring.wait_listening(rank)
        yield ring
        assert set(ring.stop().values()) == {0}
    finally:
        ring.stop()


def test_a_wrong_token_and_none_are_refused(tmp_path: Path, model: Path) -> None:
    right = write_token(tmp_path, "right", TOKEN)
    wrong = write_token(tmp_path, "wrong", "another-token")
    ring = RingProcesses(tmp_path, model, [(0, 2), (2, 4), (4, 5)])
    files = [{"security": {"token_file": name}} for name in (right, wrong, None)]
    with started(ring, files), ring.channel(0) as channel:
        head = head_pb2_grpc.HeadStub(channel)
        for metadata in (None, [("authorization", "Bearer another-token")]):
            with pytest.raises(grpc.RpcError) as failure:
                head.GetCluster(head_pb2.ClusterRequest(), metadata=metadata, timeout=20.0)
            assert failure.value.code() is grpc.StatusCode.UNAUTHENTICATED
            assert failure.value.details() == (
                "the cluster token is missing or wrong; give every node and client the same token file"
            )
        with pytest.raises(grpc.RpcError) as failure:
            ring.node_status(1)
        assert failure.value.code() is grpc.StatusCode.UNAUTHENTICATED
        assert ring.node_status(2).rank == 2  # has no token and asks for none: loopback only

        call = head.WatchCluster(
            head_pb2.ClusterRequest(), metadata=[("authorization", f"Bearer {TOKEN}")], timeout=20.0
        )
        status = next(s for s in call if s.ranks[1].reason in s.reason and s.ranks[1].state == "failed")
        call.cancel()
        assert status.status == "starting"
        refused = status.ranks[1]
        assert refused.state == "failed"
        assert refused.reason == (
            f"rank 1 (n1, 127.0.0.1:{ring.ports[1]}) has another token; give every node the same one"
        )


def test_other_model_files_are_refused(tmp_path: Path, model: Path) -> None:
    (tmp_path / "other").mkdir()
    other = Path(shutil.copytree(model, tmp_path / "other" / model.name))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rope_theta": 20000.0}))
    ring = RingProcesses(tmp_path, model, [(0, 2), (2, 5)])
    with started(ring, [{}, {"model": str(other)}]):
        status = ring.wait_status(lambda s: s.ranks[1].state == "failed")
        assert f"n1 has other files for {other} (digest " in status.ranks[1].reason
        assert status.ranks[1].reason.endswith("give every node the same revision")


class Impostor(control_pb2_grpc.ControlServicer):
    """Answers at a node's place as another rank."""

    def __init__(self, config_digest: str) -> None:
        self.config_digest = config_digest

    def Profile(  # noqa: N802
        self, request: control_pb2.ProfileRequest, context: grpc.ServicerContext
    ) -> control_pb2.NodeProfile:
        return control_pb2.NodeProfile(config_digest=self.config_digest)

    def Watch(  # noqa: N802
        self, request: control_pb2.WatchRequest, context: grpc.ServicerContext
    ) -> Iterator[control_pb2.NodeStatus]:
        yield control_pb2.NodeStatus(rank=2)


@pytest.mark.parametrize(
    ("digest", "reason"),
    [
        (
            "mine",
            "{address} answers as rank 2, not as rank 0; start it with the --rank of its place",
        ),
        (
            "other",
            "{label} runs with another config (digest other, here mine); copy the head's config there",
        ),
        (None, "{address} is not a macrame node; is another server on this port?"),
    ],
)
def test_a_server_that_does_not_belong_there(digest: str | None, reason: str, tmp_path: Path) -> None:
    with futures.ThreadPoolExecutor(4) as workers:
        server = grpc.server(workers)
        if digest is not None:
            control_pb2_grpc.add_ControlServicer_to_server(Impostor(digest), server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        config = load_config(write_cluster(tmp_path, "m", node(name="n0")))
        changed = threading.Event()
        watcher = Watcher(replace(config.nodes[0], port=port), "mine", 1, None, changed.set)
        watcher.start()
        try:
            assert changed.wait(5.0)
            member = watcher.member
            assert member.reach is Reach.REFUSED
            assert member.reason.startswith(reason.format(address=member.address, label=member.label))
        finally:
            watcher.leave()
            watcher.join()
            server.stop(None).wait()


def short_member(rank: int, *, is_admitting: bool) -> Member:
    status = control_pb2.NodeStatus(rank=rank, reason="memory: 0.5 GB of 16.0 GB are available")
    status.memory.is_admitting = is_admitting
    return Member(rank, NodeConfig(rank, f"n{rank}", "127.0.0.1", 5000 + rank), status=status)


def test_who_is_short_of_memory_is_named_with_numbers() -> None:
    silent = Member(2, NodeConfig(2, "n2", "127.0.0.1"))
    older = Member(3, NodeConfig(3, "n3", "127.0.0.1"), status=control_pb2.NodeStatus(rank=3))
    fine = short_member(0, is_admitting=True)
    assert short_of_memory([fine, silent, older]) == ""
    assert short_of_memory([fine, short_member(1, is_admitting=False)]) == (
        "rank 1 (n1, 127.0.0.1:5001) is short of memory (0.5 GB of 16.0 GB are available); "
        "no new request starts there, try again later"
    )
