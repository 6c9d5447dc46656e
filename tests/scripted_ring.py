"""The real head service and scheduler over a ring of one thread that answers from a script, and the HTTP process.

What whole-ring tests cannot arrange: answers with chosen bytes, chosen log-probabilities, chosen failures.
`python -m tests.scripted_ring PORT TEXT DELAY_S` runs the head alone, for tests that stop its process.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import openai

from cluster.head import Head
from cluster.scheduler import Limits
from proto import control_pb2, head_pb2, head_pb2_grpc, ring_pb2
from tests.tiny_models import EOS_ID, VOCAB_SIZE, write_tokenizer

CONTEXT = 600


class ScriptedRing:
    """Every session answers with the bytes of `text` (token id = byte), then with end-of-text, over and over."""

    def __init__(self, text: bytes = b"Hello, world.", *, port: int = 0, max_active: int = 4) -> None:
        self.text = text
        self.delay_s = 0.0
        self.error = ""  # a stage's failure, at the token of index `error_at`
        self.error_at = 0
        self.logprobs: dict[int, float] = {}
        self.opened: list[ring_pb2.SessionSpec] = []
        self.prompts: dict[int, list[int]] = {}
        self.closed: set[int] = set()
        self.state, self.reason = "ok", ""
        self._limits = Limits(
            context=CONTEXT, max_active=max_active, max_queued=0, max_in_flight=4, vocab_size=VOCAB_SIZE
        )
        self._changed = threading.Condition()
        self._frames: queue.SimpleQueue[ring_pb2.Frame | None] = queue.SimpleQueue()
        self._drawn: dict[int, int] = {}
        self.head = Head(
            max_queued=2, feed=self._frames.put, cluster_status=self._status, changed=self._changed
        )
        self.head.ring_up(1, self._limits)
        self._thread = threading.Thread(target=self._compute, name="scripted-ring")
        self._thread.start()
        self._server = grpc.server(ThreadPoolExecutor(max_workers=32))
        head_pb2_grpc.add_HeadServicer_to_server(self.head, self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{port}")
        self._server.start()

    def reset(self) -> None:
        """As it was made, for the next test."""
        self.text, self.delay_s, self.error, self.logprobs = b"Hello, world.", 0.0, "", {}
        self.opened.clear()
        self.closed.clear()

    def set_state(self, state: str, reason: str) -> None:
        """What the cluster says of itself."""
        with self._changed:
            self.state, self.reason = state, reason
            self._changed.notify_all()

    def close(self) -> None:
        self.head.close()
        self._server.stop(0.5).wait()
        self._frames.put(None)
        self._thread.join()

    @property
    def last(self) -> ring_pb2.SessionSpec:
        """What the newest session was opened with."""
        return self.opened[-1]

    def wait_closed(self, count: int, timeout_s: float = 2.0) -> None:
        """Until so many sessions were freed."""
        deadline = time.monotonic() + timeout_s
        while len(self.closed) < count:
            assert time.monotonic() < deadline, f"{len(self.closed)} of {count} sessions were freed"
            threading.Event().wait(0.01)

    def _status(self) -> head_pb2.ClusterStatus:
        status = head_pb2.ClusterStatus(status=self.state, epoch=1, reason=self.reason)
        node = control_pb2.NodeStatus(rank=0, name="n0", state=control_pb2.READY, loaded_bytes=123 << 33)
        state = "ready" if self.state == "ok" else "failed"
        status.ranks.add(rank=0, name="n0", state=state, reason=self.reason, node=node)
        self.head.fill(status)
        return status

    def _compute(self) -> None:
        while (frame := self._frames.get()) is not None:
            for spec in frame.opens:
                self.opened.append(spec)
                self._drawn[spec.session] = 0
                self.prompts[spec.session] = []
            for slot in frame.slots:
                done = self._drawn[slot.session]
                if not done:
                    self.prompts[slot.session] += slot.tokens
                if not slot.is_sampled:
                    continue
                if self.delay_s:
                    time.sleep(self.delay_s)
                if self.error and done == self.error_at:
                    slot.error = self.error
                slot.result.CopyFrom(self._token(done))
                self._drawn[slot.session] += 1
            self.closed.update(frame.closes)
            if frame.slots:
                self.head.on_result(frame)

    def _token(self, index: int) -> ring_pb2.SampledToken:
        place = index % (len(self.text) + 1)
        token = self.text[place] if place < len(self.text) else EOS_ID
        result = ring_pb2.SampledToken(id=token, logprob=self.logprobs.get(token, -0.5))
        result.top.add(id=token, logprob=result.logprob)
        result.top.add(id=0x7A, logprob=-2.0)
        return result


class ApiServer:
    """A real `python -m cluster.api` process."""

    def __init__(
        self, directory: Path, model: Path, head: str, *arguments: str, env: Mapping[str, str] | None = None
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        config = {"model": str(model), "nodes": [{"host": "127.0.0.1", "memory_gb": 16}], "api": {"port": 0}}
        self.config_path = directory / "cluster.json"
        self.config_path.write_text(json.dumps(config))
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


@dataclass(frozen=True, slots=True)
class Served:
    """A scripted ring, the HTTP process in front of it, and clients of it."""

    ring: ScriptedRing
    api: ApiServer
    http: httpx.Client
    openai: openai.OpenAI

    def complete(self, prompt: Any = "hi", **fields: Any) -> dict[str, Any]:
        """POST /v1/completions that succeeds."""
        return self.post("/v1/completions", {"prompt": prompt, **fields})

    def chat(self, content: Any = "hi", **fields: Any) -> dict[str, Any]:
        """POST /v1/chat/completions that succeeds."""
        return self.post("/v1/chat/completions", {"messages": [{"role": "user", "content": content}], **fields})

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


@contextmanager
def serving(directory: Path, *, max_active: int = 4) -> Iterator[Served]:
    """A healthy server with the byte tokenizer of the tiny models; its id is `tiny`."""
    model = directory / "tiny"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": EOS_ID}))
    write_tokenizer(model)
    ring = ScriptedRing(max_active=max_active)
    try:
        api = ApiServer(directory / "api", model, f"127.0.0.1:{ring.port}")
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
    deadline = time.monotonic() + timeout_s
    while (reply := client.get("/health")).status_code != 200:
        assert time.monotonic() < deadline, reply.text
        threading.Event().wait(0.02)


def main(port: str, text: str, delay_s: str) -> None:
    """Runs until it is killed, or its standard input ends."""
    ring = ScriptedRing(text.encode(), port=int(port))
    ring.delay_s = float(delay_s)
    print(ring.port, flush=True)
    sys.stdin.read()
    ring.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
