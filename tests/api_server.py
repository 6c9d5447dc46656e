"""The HTTP process in front of a scripted ring, and clients of it, for the test_api files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai

from tests.scripted_ring import MAX_QUEUED, ScriptedRing
from tests.tiny_models import EOS_ID, write_tokenizer
from tests.waiting import PATIENT_S, wait_for

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"


class ApiServer:
    """A real `python -m cluster.api` process."""

    def __init__(
        self,
        directory: Path,
        model: Path,
        head: str,
        *arguments: str,
        env: Mapping[str, str] | None = None,
        silence_s: float = PATIENT_S,
    ) -> None:
        self.config_path = write_config(directory, model, silence_s=silence_s)
        command = [sys.executable, "-m", "cluster.api", "--config", str(self.config_path), "--head", head]
        self._log = directory / "api.log"
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [*command, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=os.environ | (env or {}),
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline().split()
        assert line[:1] == ["API_READY"], f"{line}; log: {self.log()}"
        self.port = int(line[2])
        self.url = f"http://127.0.0.1:{self.port}"

    def log(self) -> str:
        """What it wrote to stderr."""
        return self._log.read_text()

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(5.0)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise
        finally:
            self.process.stdin.close()
            self.process.stdout.close()


def write_config(directory: Path, model: Path | str, *, silence_s: float = PATIENT_S, **api: Any) -> Path:
    """A cluster file with any free HTTP port."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "cluster.json"
    nodes = [{"host": "127.0.0.1", "memory_gb": 16}]
    api = {"port": 0, "queue": MAX_QUEUED, **api}
    document = {"model": str(model), "nodes": nodes, "api": api, "silence_timeout_s": silence_s}
    path.write_text(json.dumps(document))
    return path


def write_model(directory: Path) -> Path:
    """What the HTTP process needs of a model: its tokenizer."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": EOS_ID}))
    write_tokenizer(directory)
    return directory


@dataclass(frozen=True, slots=True)
class Served:
    """A scripted ring, the HTTP process in front of it, and clients of it."""

    ring: ScriptedRing
    api: ApiServer
    http: httpx.Client
    openai: openai.OpenAI

    def complete(self, prompt: Any = "hi", **fields: Any) -> dict[str, Any]:
        """POST /v1/completions that succeeds."""
        return self.post(COMPLETIONS, {"prompt": prompt, **fields})

    def chat(self, content: Any = "hi", **fields: Any) -> dict[str, Any]:
        """POST /v1/chat/completions that succeeds."""
        return self.post(
            "/v1/chat/completions", {"messages": [{"role": "user", "content": content}], **fields}
        )

    def post(self, path: str, body: Any) -> dict[str, Any]:
        reply = self.http.post(path, json=body)
        assert reply.status_code == 200, reply.text
        return reply.json()  # type: ignore[no-any-return]

    def error(self, body: Any, *, status: int = 400, path: str = "/v1/completions") -> dict[str, Any]:
        """The error object of a request that is refused with `status`."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        reply = self.http.post(path, content=content, headers={"content-type": "application/json"})
        assert reply.status_code == status, reply.text
        error = reply.json()["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        return error  # type: ignore[no-any-return]

    def events(self, path: str, body: dict[str, Any]) -> list[Any]:
        """The data of each event of a stream; [DONE] as it is."""
        with self.http.stream("POST", path, json=body | {"stream": True}) as reply:
            text = reply.read().decode()
            assert reply.status_code == 200, text
            assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert text.endswith("\n\n")
        datas = [event.removeprefix("data: ") for event in text.split("\n\n")[:-1]]
        return [data if data == "[DONE]" else json.loads(data) for data in datas]


def chat_body(**fields: Any) -> dict[str, Any]:
    """A chat of one message."""
    return {"messages": [{"role": "user", "content": "hi"}], **fields}


@contextmanager
def serving(
    directory: Path,
    *arguments: str,
    max_active: int = 4,
    change: Callable[[Path], object] | None = None,
) -> Iterator[Served]:
    """A healthy server with the byte tokenizer of the tiny models; its id is `tiny`.

    `change` may write into the model's folder before it is read.
    """
    model = write_model(directory / "tiny")
    if change is not None:
        change(model)
    ring = ScriptedRing(max_active=max_active)
    try:
        api = ApiServer(directory / "api", model, f"127.0.0.1:{ring.port}", *arguments)
        try:
            with httpx.Client(base_url=api.url, timeout=30.0) as http:
                wait_healthy(http)
                with openai.OpenAI(base_url=f"{api.url}/v1", api_key="none", max_retries=0) as client:
                    yield Served(ring, api, http, client)
        finally:
            assert api.stop() == 0, api.log()
    finally:
        ring.close()


def wait_healthy(client: Any, timeout_s: float = 30.0) -> None:
    """Until /health is 200; `client` is an httpx.Client of the server."""
    wait_for(lambda: client.get("/health").status_code == 200, timeout_s, "the server is healthy")


@contextmanager
def started(
    directory: Path, head: str, *arguments: str, silence_s: float = PATIENT_S, **env: str
) -> Iterator[tuple[ApiServer, httpx.Client]]:
    """A server and a client of it; it must stop cleanly."""
    model = write_model(directory / "tiny")
    api = ApiServer(directory / "api", model, head, *arguments, env=env, silence_s=silence_s)
    try:
        with httpx.Client(base_url=api.url, timeout=30.0) as http:
            yield api, http
    finally:
        assert api.stop() == 0, api.log()


@contextmanager
def head_process(port: int = 0, delay_s: float = 0.01) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A scripted head in a process of its own, and its port."""
    command = [sys.executable, "-m", "tests.scripted_ring", str(port), "Hello", str(delay_s)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process, int(process.stdout.readline())
        finally:
            process.send_signal(signal.SIGCONT)
            process.kill()


ENDLESS = chat_body(ignore_eos=True)


class Stream:
    """A streamed chat that a thread reads to its end."""

    def __init__(self, url: str, **fields: Any) -> None:
        self.text = ""
        self.ended_at = 0.0
        self.began = threading.Event()
        self._thread = threading.Thread(target=self._read, args=(url, ENDLESS | {"stream": True} | fields))
        self._thread.start()

    def _read(self, url: str, body: dict[str, Any]) -> None:
        with httpx.Client(base_url=url, timeout=30.0) as http, http.stream("POST", CHAT, json=body) as reply:
            for text in reply.iter_text():
                self.text += text
                self.began.set()
        self.ended_at = time.monotonic()

    def error(self) -> dict[str, Any]:
        """The event that ended it, which must be an error."""
        self._thread.join(10.0)
        assert not self._thread.is_alive()
        assert "[DONE]" not in self.text
        last = self.text.rstrip("\n").rpartition("\n\n")[2]
        return json.loads(last.removeprefix("data: "))["error"]  # type: ignore[no-any-return]
