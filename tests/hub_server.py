"""A real HTTP server that speaks what a fetch needs of the Hugging Face hub, counts bytes, and misbehaves on
demand.

    GET  /api/models/ID[/revision/REV][?blobs=True], /api/models/ID/tree/REV
    HEAD and GET /ID/resolve/REV/FILE with Range; large files are redirected to /cdn/..., as the hub does
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from enum import Enum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

BLOCK_BYTES = 16 * 1024


class Fault(Enum):
    """What a request may meet."""

    CUT = "cut"  # the connection breaks after half of the body
    SHORT = "short"  # half of the range that was asked for, and says so
    LONG = "long"  # other bytes than the range that was asked for
    TOO_MANY = "429"  # with Retry-After
    BROKEN = "503"
    MISSING = "404"
    GATED = "gated"
    NO_RANGES = "no ranges"
    CHANGED = "changed"  # the file is another one now
    HOLD = "hold"  # the body stops after half until `release` is called


@dataclass(slots=True)
class Trouble:
    """`fault` for the next `times` requests (None: all) of paths that match, from a body offset on."""

    fault: Fault
    path: str  # a regular expression
    times: int | None = None
    min_start: int = 0
    client: str = ""


@dataclass(frozen=True, slots=True)
class Served:
    """One answer. sent: bytes of its body."""

    client: str
    method: str
    file: str
    start: int
    stop: int
    status: int
    sent: int


@dataclass(slots=True)
class Repo:
    """One model: its folder, and the commit that it pretends to be."""

    folder: Path
    sha: str
    etags: dict[str, str] = field(default_factory=dict)

    def files(self) -> list[Path]:
        """Those of the folder, and what embedding models keep in folders of their modules."""
        paths = [*self.folder.iterdir(), *self.folder.glob("*/config.json")]
        return sorted(path for path in paths if path.is_file())

    def name(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()

    def etag(self, path: Path) -> str:
        """sha256 of a weight file, git's blob id of any other."""
        name = self.name(path)
        if name not in self.etags:
            data = path.read_bytes()
            is_large = path.suffix == ".safetensors"
            digest = hashlib.sha256(data) if is_large else hashlib.sha1(f"blob {len(data)}\0".encode() + data)
            self.etags[name] = digest.hexdigest()
        return self.etags[name]


class HubServer:
    """Serves `repos` by id on loopback until closed."""

    def __init__(self, repos: Mapping[str, Path]) -> None:
        self.repos = {
            model: Repo(folder, hashlib.sha1(str(model).encode()).hexdigest())
            for model, folder in repos.items()
        }
        self.log: list[Served] = []
        self.troubles: list[Trouble] = []
        self.lock = threading.Lock()
        self.token = ""  # that clients must show; empty: none
        self.connections: set[socket.socket] = set()
        self.held = threading.Event()  # a body has stopped in the middle
        self._released = threading.Event()
        hub = self

        class Handler(_Handler):
            server_of = hub

        self._server = _Quiet(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), name="hub")
        self._thread.start()

    def __enter__(self) -> HubServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        with self.lock:
            for connection in self.connections:  # clients keep them open
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def release(self) -> None:
        """Held bodies go on, or end where their client is gone."""
        self._released.set()

    def wait_released(self) -> None:
        """For a held body."""
        self.held.set()
        assert self._released.wait(60.0)

    def trouble(
        self, fault: Fault, path: str, *, times: int | None = None, min_start: int = 0, client: str = ""
    ) -> None:
        """Let requests of matching files meet `fault`."""
        with self.lock:
            self.troubles.append(Trouble(fault, path, times, min_start, client))

    def met(self, file: str, start: int, client: str) -> Fault | None:
        """The fault that a request meets, which uses it up."""
        with self.lock:
            for trouble in self.troubles:
                is_due = trouble.times is None or trouble.times > 0
                is_it = re.search(trouble.path, file) and start >= trouble.min_start
                if is_due and is_it and trouble.client in client:
                    if trouble.times is not None:
                        trouble.times -= 1
                    return trouble.fault
        return None

    def bytes_of(self, client: str | None = None, where: Callable[[Served], bool] = lambda _: True) -> int:
        """Body bytes of files that a client, or all of them, got."""
        with self.lock:
            return sum(s.sent for s in self.log if client in (None, s.client) and where(s))

    def by_file(self) -> dict[tuple[str, str], int]:
        """Body bytes by client and file."""
        counts: Counter[tuple[str, str]] = Counter()
        with self.lock:
            for served in self.log:
                counts[served.client, served.file] += served.sent
        return dict(counts)

    def requests(self, file: str) -> list[Served]:
        """All answers for a file, or for the API where `file` is "api"."""
        with self.lock:
            return [served for served in self.log if served.file == file]


class _Quiet(ThreadingHTTPServer):
    """Clients that go away, as killed ones do, are no news."""

    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_of: HubServer

    def setup(self) -> None:
        super().setup()
        with self.server_of.lock:
            self.server_of.connections.add(self.connection)

    def finish(self) -> None:
        super().finish()
        with self.server_of.lock:
            self.server_of.connections.discard(self.connection)

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass

    def _answer(self) -> None:

        path = unquote(urlsplit(self.path).path)
        origin = re.search(r"origin/([\w-]+)", self.headers.get("User-Agent", ""))
        self.client = origin[1] if origin else ""
        try:
            for pattern, answer in (
                (r"/api/models/(?P<model>.+?)/tree/(?P<revision>[^/]+)", self._tree),
                (r"/api/models/(?P<model>.+?)(/revision/(?P<revision>[^/]+))?", self._info),
                (r"/(?P<is_cdn>cdn/)?(?P<model>.+?)/resolve/(?P<revision>[^/]+)/(?P<file>.+)", self._file),
            ):
                match = re.fullmatch(pattern, path)
                if match is not None:
                    answer(**match.groupdict())
                    return
            self._fail(404, "EntryNotFound", "no such page")
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    # -- answers ------------------------------------------------------------------------------------------
    def _repo(self, model: str, revision: str | None) -> Repo | None:
        repo = self.server_of.repos.get(model)
        if repo is None:
            self._fail(401, "RepoNotFound", "Repository not found")
        elif revision not in (None, "main", repo.sha):
            self._fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        else:
            return repo
        return None

    def _info(self, model: str, revision: str | None) -> None:
        fault = self.server_of.met("api", 0, self.client)
        if self._refused(fault, "api"):
            return
        repo = self._repo(model, revision)
        if repo is not None:
            siblings = [self._sibling(repo, path) for path in repo.files()]
            self._json({"id": model, "modelId": model, "sha": repo.sha, "siblings": siblings}, "api")

    def _tree(self, model: str, revision: str) -> None:
        repo = self._repo(model, revision)
        if repo is not None:
            entries = [
                {"type": "file", "oid": repo.etag(p), "size": p.stat().st_size, "path": repo.name(p)}
                for p in repo.files()
            ]
            self._json(entries, "api")

    def _sibling(self, repo: Repo, path: Path) -> dict[str, object]:
        size, etag = path.stat().st_size, repo.etag(path)
        entry: dict[str, object] = {"rfilename": repo.name(path), "size": size, "blobId": etag[:40]}
        if path.suffix == ".safetensors":
            entry["lfs"] = {"sha256": etag, "size": size, "pointerSize": 134}
        return entry

    def _file(self, is_cdn: str | None, model: str, revision: str, file: str) -> None:
        repo = self._repo(model, revision)
        if repo is None:
            return
        path = repo.folder / file
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        start = int(wanted[1]) if wanted else 0
        is_large = path.suffix == ".safetensors"
        fault = None if is_large and not is_cdn else self.server_of.met(file, start, self.client)
        if self._refused(fault, file):
            return
        if not path.is_file():
            self._fail(404, "EntryNotFound", "Entry not found", file)
            return
        etag, size = repo.etag(path), path.stat().st_size
        if is_large and not is_cdn:
            if any(t.fault is Fault.CHANGED and re.search(t.path, file) for t in self.server_of.troubles):
                etag = "f" * 64
            self.send_response(302)
            self.send_header("Location", f"/cdn/{model}/resolve/{revision}/{file}")
            self.send_header("X-Linked-Etag", f'"{etag}"')
            self.send_header("X-Linked-Size", str(size))
            self.send_header("X-Repo-Commit", repo.sha)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        stop = min(int(wanted[2]) + 1, size) if wanted else size
        is_range = wanted is not None and fault is not Fault.NO_RANGES
        if not is_range:
            start, stop = 0, size
        if fault is Fault.LONG:
            start = max(0, start - 1)
        if fault is Fault.SHORT:
            stop = start + (stop - start) // 2
        self.send_response(206 if is_range else 200)
        if is_range:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
        self.send_header("Content-Length", str(stop - start))
        self.send_header("ETag", f'"{"e" * 40 if fault is Fault.CHANGED else etag}"')
        self.send_header("X-Repo-Commit", repo.sha)
        self.end_headers()
        if self.command == "GET":
            self._body(path, file, start, stop, fault)

    def _body(self, path: Path, file: str, start: int, stop: int, fault: Fault | None) -> None:
        half = start + (stop - start) // 2
        end = half if fault is Fault.CUT else stop
        at = start
        try:
            with path.open("rb") as opened:
                opened.seek(start)
                while at < end:
                    if fault is Fault.HOLD and at >= half:
                        self.wfile.flush()
                        self.server_of.wait_released()
                        fault = None
                    block = opened.read(min(BLOCK_BYTES, end - at))
                    self.wfile.write(block)
                    at += len(block)
                self.wfile.flush()
        finally:
            self._note(file, start, stop, 206, at - start)
        if end < stop:
            self.close_connection = True

    # -- refusals -----------------------------------------------------------------------------------------
    def _refused(self, fault: Fault | None, file: str) -> bool:
        token = self.server_of.token
        if token and self.headers.get("Authorization") != f"Bearer {token}":
            fault = Fault.GATED
        if fault is Fault.MISSING:
            self._fail(404, "EntryNotFound", "Entry not found", file)
        elif fault is Fault.GATED:
            self._fail(401, "GatedRepo", "Access to this model is restricted", file)
        elif fault is Fault.TOO_MANY:
            self._fail(429, "", "slow down", file, {"Retry-After": "1"})
        elif fault is Fault.BROKEN:
            self._fail(503, "", "down for a moment", file)
        else:
            return False
        return True

    def _fail(
        self, status: int, code: str, message: str, file: str = "", headers: Mapping[str, str] | None = None
    ) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", "0")
        self.end_headers()
        self._note(file, 0, 0, status, 0)

    def _json(self, value: object, file: str) -> None:
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)
        self._note(file, 0, 0, 200, len(data))

    def _note(self, file: str, start: int, stop: int, status: int, sent: int) -> None:
        with self.server_of.lock:
            self.server_of.log.append(Served(self.client, self.command, file, start, stop, status, sent))


@contextmanager
def hub(**repos: Path) -> Iterator[HubServer]:
    """A hub with the models tests/NAME."""
    with HubServer({f"tests/{name}": folder for name, folder in repos.items()}) as server:
        yield server
