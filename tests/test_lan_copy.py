"""Copies between nodes: a real gRPC server in front of a real store."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from huggingface_hub import constants

from cluster import lan_copy
from cluster.config import load_config
from cluster.control import ControlService
from cluster.lan_copy import CopyService, PeerSource
from cluster.node import Node
from cluster.probe import this_machine
from cluster.rpc import make_server
from proto import control_pb2, control_pb2_grpc
from shard_loader.fetch import fetch_tensors
from shard_loader.holdings import find_holdings
from shard_loader.hub import ModelPlace, find_model
from shard_loader.hub_source import HubSource
from shard_loader.sources import HubError
from shard_loader.store import FileEntry, Store
from shard_loader.survey import own_tensors
from shard_loader.weights import load_shard
from tests.hub_server import HubServer
from tests.node_process import node, write_cluster
from tests.tiny_models import write_checkpoint

MODEL = "tests/tiny"
FIRST = "model-00001-of-00003.safetensors"
NEVER = threading.Event()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "tiny"
    return write_checkpoint("llama", folder, num_layers=5, max_shard_bytes=400_000)


@pytest.fixture
def held(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> ModelPlace:
    """A store that has layers 0:2, in the folders that this process takes for Hugging Face's."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("MACRAME_CACHE", raising=False)
    with HubServer({MODEL: model}) as server:
        hub = HubSource(endpoint=server.url)
        place = find_model(MODEL, tmp_path, hub=hub)
        assert place.store is not None
        fetch_tensors(place.store, own_tensors(place.folder, 0, 2), [hub])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return place


class Serving:
    """A node's control service on a port of its own."""

    def __init__(self, directory: Path, token: str | None = None) -> None:
        config = load_config(write_cluster(directory, MODEL, node(name="n0")))
        self.node = Node(config, 0, credentials=token, import_base_rss_bytes=0)
        self.service = ControlService(self.node, this_machine())
        add: Callable[[grpc.Server], None] = lambda server: (  # noqa: E731
            control_pb2_grpc.add_ControlServicer_to_server(self.service, server)
        )
        self.server, port = make_server("127.0.0.1:0", [add], token, max_workers=8)
        self.server.start()
        self.address = f"127.0.0.1:{port}"

    def close(self) -> None:
        self.service.close()
        self.server.stop(1.0).wait()


@pytest.fixture
def serving(tmp_path: Path, held: ModelPlace) -> Iterator[Serving]:
    one = Serving(tmp_path)
    yield one
    one.close()


@pytest.fixture
def peer(serving: Serving) -> Iterator[PeerSource]:
    source = PeerSource("n0", serving.address, None)
    yield source
    source.close()


def read(peer: PeerSource, store: Store, file: str, start: int, stop: int) -> bytes:
    entry = store.manifest.files.get(file, FileEntry(file, stop))
    return b"".join(peer.read(store.manifest, entry, start, stop, NEVER))


def test_a_machine_without_internet_gets_it_from_another(
    tmp_path: Path, held: ModelPlace, peer: PeerSource, model: Path
) -> None:
    far = tmp_path / "far"
    place = find_model(MODEL, far, revision=held.revision, peers=[peer], cache_dir=far, root=far)
    assert place.folder != held.folder
    assert place.store is not None
    result = fetch_tensors(place.store, own_tensors(place.folder, 0, 2), [peer])
    assert (result.from_hub, result.from_peers) == (0, result.wanted_bytes)
    load_shard(place.folder, 0, 2)
    assert (place.folder / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
    with pytest.raises(HubError, match=r"no node has bytes \d+ to \d+ of model-0000"):
        fetch_tensors(place.store, own_tensors(place.folder, 2, 5), [peer])
    without = find_model(MODEL, far / "x", peers=[peer], cache_dir=far / "x", root=far / "x")
    assert without.revision == held.revision, (
        "a head without internet takes the revision that the others have"
    )


def test_what_a_node_holds_is_told_by_span(held: ModelPlace, peer: PeerSource) -> None:
    store = Store.open(held.folder)
    assert store is not None
    assert peer.manifest(MODEL, held.revision) == store.manifest
    for name, entry in store.manifest.files.items():
        assert peer.spans(store.manifest, entry) == store.covered(name)
    changed = FileEntry(FIRST, store.manifest.files[FIRST].size, "0" * 64)
    assert peer.spans(store.manifest, changed) == []
    with pytest.raises(HubError, match="node n0 has nothing of tests/other"):
        peer.manifest("tests/other", "")
    with pytest.raises(HubError, match="node n0 has nothing of tests/tiny at 111111111111"):
        peer.manifest(MODEL, "1" * 40)


@pytest.mark.parametrize(
    "file",
    ["../../../../etc/passwd", "/etc/passwd", ".macrame/journal", "", "nothing.json", "a/../config.json"],
)
def test_only_files_of_the_model_are_given(file: str, held: ModelPlace, peer: PeerSource) -> None:
    store = Store.open(held.folder)
    assert store is not None
    with pytest.raises(HubError, match=r"node n0 cannot give .*: '.*' is no file of tests/tiny at"):
        read(peer, store, file, 0, 10)


def test_only_bytes_that_are_here_are_given(held: ModelPlace, peer: PeerSource) -> None:
    store = Store.open(held.folder)
    assert store is not None
    last = "model-00003-of-00003.safetensors"
    size = store.manifest.files[last].size
    for start, stop in ((size - 100, size), (size, size + 1), (10, 5), (0, size)):
        with pytest.raises(HubError, match=rf"bytes {start} to {stop} of {last} are not here"):
            read(peer, store, last, start, stop)
    assert read(peer, store, FIRST, 0, 8) == (held.folder / FIRST).read_bytes()[:8]


@pytest.mark.parametrize("revision", ["", "main", "../..", "1" * 40])
def test_only_the_revision_is_given(revision: str, serving: Serving) -> None:
    request = control_pb2.CopyRequest(model=MODEL, revision=revision, file=FIRST, start=0, stop=8)
    with grpc.insecure_channel(serving.address) as channel, pytest.raises(grpc.RpcError) as caught:
        list(control_pb2_grpc.ControlStub(channel).Copy(request, timeout=20.0))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_a_copy_needs_the_token(tmp_path: Path, held: ModelPlace) -> None:
    serving = Serving(tmp_path, token="secret")
    store = Store.open(held.folder)
    assert store is not None
    right, wrong = PeerSource("n0", serving.address, "secret"), PeerSource("n0", serving.address, "guess")
    assert read(right, store, FIRST, 0, 8)
    with pytest.raises(HubError, match=r"node n0 cannot give .* the cluster token is missing or wrong"):
        read(wrong, store, FIRST, 0, 8)
    with pytest.raises(HubError, match="node n0 has nothing"):
        wrong.manifest(MODEL, held.revision)
    right.close()
    wrong.close()
    serving.close()


def test_damage_on_the_way_is_seen(
    held: ModelPlace, peer: PeerSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store.open(held.folder)
    assert store is not None
    good = CopyService.copy

    def damaged(*args: object) -> Iterator[control_pb2.CopyChunk]:
        for chunk in good(*args):  # type: ignore[arg-type]
            yield control_pb2.CopyChunk(start=chunk.start, data=chunk.data[::-1], sha256=chunk.sha256)

    monkeypatch.setattr(CopyService, "copy", damaged)
    with pytest.raises(HubError, match=r"node n0 sent damaged bytes of .*: a checksum differs"):
        read(peer, store, FIRST, 0, 8)
    monkeypatch.setattr(CopyService, "copy", lambda *args: iter(list(good(*args))[:0]))
    with pytest.raises(HubError, match="node n0 sent 0 bytes of 8"):
        read(peer, store, FIRST, 0, 8)


def test_where_a_node_fails_the_hub_goes_on(
    tmp_path: Path, model: Path, held: ModelPlace, peer: PeerSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = CopyService.copy

    def dying(
        self: CopyService, request: control_pb2.CopyRequest, context: grpc.ServicerContext
    ) -> Iterator[object]:
        for number, chunk in enumerate(good(self, request, context)):
            if number == 3:
                context.abort(grpc.StatusCode.UNAVAILABLE, "the node goes away")
            yield chunk

    monkeypatch.setattr(CopyService, "copy", dying)
    monkeypatch.setattr(lan_copy, "CHUNK_BYTES", 10_000)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    far = tmp_path / "far"
    with HubServer({MODEL: model}) as server:
        hub = HubSource(endpoint=server.url)
        place = find_model(MODEL, far, revision=held.revision, cache_dir=far, root=far, hub=hub)
        assert place.store is not None
        result = fetch_tensors(place.store, own_tensors(place.folder, 0, 2), [peer, hub])
    assert result.from_hub > 0
    assert result.from_peers > 0
    assert result.from_hub + result.from_peers == result.wanted_bytes
    load_shard(place.folder, 0, 2)


def test_chunks_are_small_and_few_copies_run_at_once(
    held: ModelPlace, serving: Serving, peer: PeerSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store.open(held.folder)
    assert store is not None
    monkeypatch.setattr(lan_copy, "CHUNK_BYTES", 10_000)
    monkeypatch.setattr(lan_copy, "QUEUE_S", 0.01)
    (start, stop), *_ = (span for span in store.covered(FIRST) if span[1] - span[0] > 100_000)
    request = control_pb2.CopyRequest(model=MODEL, revision=held.revision, file=FIRST, start=start, stop=stop)
    with grpc.insecure_channel(serving.address) as channel:
        chunks = list(control_pb2_grpc.ControlStub(channel).Copy(request, timeout=20.0))
    assert max(len(chunk.data) for chunk in chunks) == 10_000
    turns = serving.service._copies._turns
    for _ in range(lan_copy.NUM_COPIES):
        assert turns.acquire(timeout=20.0)
    monkeypatch.setattr(lan_copy, "MAX_TRIES", 2)
    with pytest.raises(HubError, match="node n0 was too busy to give"):
        read(peer, store, FIRST, start, stop)
    for _ in range(lan_copy.NUM_COPIES):
        turns.release()
    assert read(peer, store, FIRST, start, stop) == b"".join(chunk.data for chunk in chunks)


def test_a_node_that_is_not_there_has_nothing(held: ModelPlace) -> None:
    store = Store.open(held.folder)
    assert store is not None
    gone = PeerSource("n9", "127.0.0.1:1", None)
    assert gone.spans(store.manifest, store.manifest.files[FIRST]) == []
    gone.close()


def test_a_complete_snapshot_is_held_whole(tmp_path: Path, model: Path) -> None:
    revision = "a" * 40
    repo = tmp_path / "models--tests--tiny"
    (repo / "snapshots").mkdir(parents=True)
    (repo / "snapshots" / revision).symlink_to(model)
    found = find_holdings(MODEL, revision, cache_dir=tmp_path, root=tmp_path)
    assert found is not None
    assert found.manifest.files.keys() == {path.name for path in model.iterdir()}
    assert b"".join(found.read(FIRST, 0, 100, 30)) == (model / FIRST).read_bytes()[:100]
