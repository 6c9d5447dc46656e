"""The HTTP process's connection to the head over TLS: why it fails, and a certificate renewed in between."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from cluster import tls as tls_module
from cluster.api.head_client import HeadClient
from cluster.rpc import make_server
from cluster.tls import Credentials, Tls
from proto import head_pb2, head_pb2_grpc
from tests.certificates import Cluster
from tests.ring_processes import free_ports


class OneStatus(head_pb2_grpc.HeadServicer):
    """Tells every watcher once that all is well, and stays."""

    def __init__(self) -> None:
        self.stopping = threading.Event()

    def WatchCluster(  # noqa: N802
        self, request: head_pb2.ClusterRequest, context: grpc.ServicerContext
    ) -> Iterator[head_pb2.ClusterStatus]:
        yield head_pb2.ClusterStatus(status="ok")
        self.stopping.wait(30)


@contextmanager
def head(credentials: Credentials, port: int) -> Iterator[None]:
    service = OneStatus()
    add = lambda server: head_pb2_grpc.add_HeadServicer_to_server(service, server)  # noqa: E731
    server, _ = make_server(f"127.0.0.1:{port}", [add], credentials, max_workers=4)
    server.start()
    try:
        yield
    finally:
        service.stopping.set()
        assert server.stop(0).wait(10.0)


async def until(test: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not test():
            await asyncio.sleep(0.02)


def test_why_the_head_cannot_be_reached_and_that_it_can_with_renewed_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tls_module, "LOOK_EVERY_S", 0.0)
    certs, other = Cluster(tmp_path / "certs"), Cluster(tmp_path / "other")
    tls, (port,) = Tls(other.node("n0")), free_ports(1)

    async def follow() -> None:
        client = HeadClient(f"127.0.0.1:{port}", Credentials(None, tls), peer="n0")
        await client.start()
        try:
            shown = "it shows a certificate that is not of this cluster's CA: copy there what"
            await until(lambda: f"The head at 127.0.0.1:{port} cannot be reached: {shown}" in client.trouble)
            other.ca_file.write_bytes(certs.ca_file.read_bytes())  # now what this side shows fits the head
            other.node("n0", signer=certs.authority)
            await until(lambda: client.trouble == "")
            assert client.status is not None
            assert client.status.status == "ok"
        finally:
            await client.close()

    with head(Credentials(None, certs.tls("n0")), port):
        asyncio.run(follow())
    gc.collect()  # gRPC's polling thread ends with the last channel
