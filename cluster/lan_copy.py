"""Nodes copy a model's bytes from each other over the control service, so that the internet is used once.

`CopyService` answers (gRPC handler threads); `PeerSource` asks (the threads of a fetch). Touches no MLX.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
import time
from collections.abc import Iterator

import grpc

from cluster.config import ClusterConfig
from cluster.rpc import connect
from cluster.tls import Credentials
from proto import control_pb2, control_pb2_grpc
from shard_loader.holdings import Holdings, find_holdings
from shard_loader.hub import ModelPlace, find_folder, find_model
from shard_loader.sources import FetchStoppedError, HubError, PeerError
from shard_loader.spans import Span
from shard_loader.store import FileEntry, Manifest

CHUNK_BYTES = 1 << 20
NUM_COPIES = 4  # at once, that one node gives
QUEUE_S = 2.0  # that another one waits for its turn
ASK_TIMEOUT_S = 2.0
CHUNK_TIMEOUT_S = 30.0
SLOWEST_BYTES_S = 500_000  # a node that gives less is asked no longer
MAX_TRIES = 6  # of a busy node
REMEMBER_S = 1.0
_LIMIT_FILES, _LIMIT_SPANS = 10_000, 1_000_000


class CopyService:
    """What this node gives of the one model that its config names."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._turns = threading.BoundedSemaphore(NUM_COPIES)
        self._lock = threading.Lock()
        self._known: tuple[float, str, Holdings | None] | None = None

    def holdings(self, request: control_pb2.HoldingsRequest) -> control_pb2.HoldingsReply:
        """What of the asked revision is on this machine's disk."""
        held = self._find(request.model, request.revision)
        if held is None:
            return control_pb2.HoldingsReply()
        reply = control_pb2.HoldingsReply(revision=held.manifest.revision)
        for name, entry in held.manifest.files.items():
            spans = [control_pb2.HeldSpan(start=a, stop=b) for a, b in held.spans[name]]
            reply.files.add(name=name, size=entry.size, etag=entry.etag, spans=spans)
        return reply

    def copy(
        self, request: control_pb2.CopyRequest, context: grpc.ServicerContext
    ) -> Iterator[control_pb2.CopyChunk]:
        """The asked bytes in chunks; the call ends with NOT_FOUND where they are not here."""
        held = self._find(request.model, request.revision) if request.revision else None
        if held is None:
            context.abort(
                grpc.StatusCode.NOT_FOUND, f"nothing of {request.model} at {request.revision} is here"
            )
        assert held is not None
        if not self._turns.acquire(timeout=QUEUE_S):
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{NUM_COPIES} copies at once are enough")
        start = request.start
        try:
            for block in held.read(request.file, request.start, request.stop, CHUNK_BYTES):
                if not context.is_active():
                    return
                yield control_pb2.CopyChunk(start=start, data=block, sha256=hashlib.sha256(block).digest())
                start += len(block)
        except (HubError, OSError) as error:
            context.abort(grpc.StatusCode.NOT_FOUND, str(error))
        finally:
            self._turns.release()

    def _find(self, model: str, revision: str) -> Holdings | None:
        if model != self._model:
            return None
        with self._lock:
            now = time.monotonic()
            if self._known is None or self._known[1] != revision or now - self._known[0] > REMEMBER_S:
                self._known = (now, revision, _holdings(model, revision))
            return self._known[2]


def _holdings(model: str, revision: str) -> Holdings | None:
    try:
        return find_holdings(model, revision)
    except HubError:  # the config names a folder: nobody asks for that
        return None


class PeerSource:
    """Another node as a source: asked once for what it has."""

    is_patient = False

    def __init__(
        self, name: str, address: str, credentials: Credentials | str | None, *, peer: str | None = None
    ) -> None:
        self.label = f"node {name}"
        self._address, self._credentials, self._name = address, credentials, peer
        self._lock = threading.Lock()
        self._channel: grpc.Channel | None = None
        self._held: dict[tuple[str, str], tuple[Manifest, dict[str, list[Span]]] | None] = {}

    def close(self) -> None:
        """Let go of the connection."""
        with self._lock:
            if self._channel is not None:
                self._channel.close()
                self._channel = None

    def manifest(self, model: str, revision: str) -> Manifest:
        """The files of the revision that the node has something of; raises HubError where it has none."""
        held = self.ask(model, revision)
        if held is None:
            raise PeerError(f"{self.label} has nothing of {model}{revision and ' at '}{revision[:12]}")
        return held[0]

    def spans(self, manifest: Manifest, entry: FileEntry) -> list[Span]:
        """What of the file the node had when it was asked; nothing where its file is another one."""
        held = self.ask(manifest.model, manifest.revision)
        if held is None:
            return []
        theirs = held[0].files.get(entry.name)
        is_same = theirs is not None and theirs.size == entry.size
        if not is_same or (theirs is not None and theirs.etag and entry.etag and theirs.etag != entry.etag):
            return []
        return held[1][entry.name]

    def read(
        self, manifest: Manifest, entry: FileEntry, start: int, stop: int, stopping: threading.Event
    ) -> Iterator[bytes]:
        """A range, chunk by chunk, each checked; goes on where the node was too busy. Raises HubError."""
        wait_s = 0.25
        for _ in range(MAX_TRIES):
            request = control_pb2.CopyRequest(
                model=manifest.model, revision=manifest.revision, file=entry.name, start=start, stop=stop
            )
            try:
                for data in self._chunks(request, stopping):
                    start += len(data)
                    yield data
                return
            except grpc.RpcError as error:
                self._refuse(error, entry.name)
            if stopping.wait(wait_s):
                raise FetchStoppedError("the fetch was stopped")
            wait_s *= 2
        raise PeerError(f"{self.label} was too busy to give {entry.name}")

    def _refuse(self, error: grpc.RpcError, file: str) -> None:
        """Raises HubError, but for a node that is only busy."""
        assert isinstance(error, grpc.Call)
        if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
            raise PeerError(f"{self.label} cannot give {file}: {error.details()}") from error

    def _chunks(self, request: control_pb2.CopyRequest, stopping: threading.Event) -> Iterator[bytes]:
        timeout_s = CHUNK_TIMEOUT_S + (request.stop - request.start) / SLOWEST_BYTES_S
        call = control_pb2_grpc.ControlStub(self._connect()).Copy(request, timeout=timeout_s)
        at = request.start
        try:
            for chunk in call:
                if chunk.start != at or at + len(chunk.data) > request.stop or not chunk.data:
                    raise PeerError(f"{self.label} sent other bytes of {request.file} than were asked for")
                if hashlib.sha256(chunk.data).digest() != chunk.sha256:
                    raise PeerError(f"{self.label} sent damaged bytes of {request.file}: a checksum differs")
                at += len(chunk.data)
                yield chunk.data
                if stopping.is_set():
                    raise FetchStoppedError("the fetch was stopped")
        finally:
            call.cancel()
        if at != request.stop:
            raise PeerError(f"{self.label} sent {at - request.start} bytes of {request.stop - request.start}")

    def ask(self, model: str, revision: str) -> tuple[Manifest, dict[str, list[Span]]] | None:
        """What the node has, asked for the first time only; None: nothing, or it did not answer."""
        with self._lock:
            if (model, revision) in self._held:
                return self._held[model, revision]
        held = self._asked(model, revision)
        with self._lock:
            self._held[model, revision] = held
        return held

    def _asked(self, model: str, revision: str) -> tuple[Manifest, dict[str, list[Span]]] | None:
        request = control_pb2.HoldingsRequest(model=model, revision=revision)
        try:
            reply = control_pb2_grpc.ControlStub(self._connect()).Holdings(request, timeout=ASK_TIMEOUT_S)
        except grpc.RpcError:
            return None
        if not reply.revision or (revision and reply.revision != revision) or len(reply.files) > _LIMIT_FILES:
            return None
        try:
            files = {file.name: FileEntry(file.name, file.size, file.etag) for file in reply.files}
            return Manifest(model, reply.revision, files), {file.name: _spans(file) for file in reply.files}
        except ValueError:
            return None

    def _connect(self) -> grpc.Channel:
        with self._lock:
            if self._channel is None:
                self._channel = connect(self._address, self._credentials, self._name)
            return self._channel


def _spans(file: control_pb2.HeldFile) -> list[Span]:
    """The spans of a file, sorted and disjoint. Raises ValueError."""
    spans = [(span.start, span.stop) for span in file.spans]
    bounds = [bound for span in spans for bound in span]
    if len(spans) > _LIMIT_SPANS or bounds != sorted(bounds) or any(a >= b for a, b in spans):
        raise ValueError("spans must be sorted and disjoint")
    if bounds and bounds[-1] > file.size:
        raise ValueError("a span ends beyond the file")
    return spans


def find_as_the_head(
    config: ClusterConfig, head_address: str, credentials: Credentials | str | None
) -> ModelPlace:
    """The model for a process that needs no weights, at the head's revision if it has one yet."""
    head = PeerSource("the head", head_address, credentials, peer=config.nodes[0].name)
    try:
        revision = ""
        if find_folder(config.model, config.model_dir_base) is None:
            with contextlib.suppress(HubError):
                revision = head.manifest(config.model, "").revision
        return find_model(config.model, config.model_dir_base, revision=revision, peers=[head])
    finally:
        head.close()
