"""The HTTP process as a process: how it starts, whom it lets in, what it says of itself, how it stops."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from cluster.api_process import ApiProcess
from proto import head_pb2, head_pb2_grpc
from tests.api_server import (
    CHAT,
    ENDLESS,
    ApiServer,
    Served,
    Stream,
    serving,
    started,
    wait_healthy,
    write_config,
    write_model,
)
from tests.scripted_ring import ScriptedRing
from tests.waiting import is_in_time, wait_for


def run_api(*arguments: str, env: dict[str, str] | None = None) -> tuple[int, str]:
    """Exit code and stderr of a start that fails."""
    command = [sys.executable, "-m", "cluster.api", *arguments]
    run = subprocess.run(
        command, capture_output=True, text=True, timeout=30, env=os.environ | (env or {}), check=False
    )
    assert "Traceback" not in run.stderr
    assert "API_READY" not in run.stdout
    return run.returncode, run.stderr


# -- starting -----------------------------------------------------------------------------------------


def test_wrong_arguments_are_exit_3(tmp_path: Path) -> None:
    config = str(write_config(tmp_path, tmp_path))
    assert run_api()[0] == 3
    assert run_api("--config", config, "--head", "x:1", "--port", "70000") == (
        3,
        "cluster.api: --port 70000 is not a port (0 to 65535); see cluster.api --help\n",
    )
    assert run_api("--config", config, "--head", "x:1", "--rank", "9") == (
        3,
        f"cluster.api: --rank 9 is not in {config}, which has ranks 0 to 0\n",
    )
    code, message = run_api("--config", str(tmp_path / "none.json"), "--head", "x:1")
    assert code == 3
    assert "none.json does not exist" in message


def test_a_busy_port_is_exit_1(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        config = write_config(tmp_path, write_model(tmp_path / "tiny"), port=port)
        code, message = run_api("--config", str(config), "--head", "127.0.0.1:1")
    assert code == 1
    assert message == (
        f"cluster.api: cannot listen on 127.0.0.1:{port}: Address already in use; "
        "choose another api.port, or stop what uses it\n"
    )


def test_beyond_loopback_needs_keys(tmp_path: Path) -> None:
    config = write_config(tmp_path, write_model(tmp_path / "tiny"))
    code, message = run_api("--config", str(config), "--head", "127.0.0.1:1", "--host", "0.0.0.0")
    assert code == 3
    assert message == (
        "cluster.api: api.host = '0.0.0.0' is reachable from other machines, which needs API keys: "
        "set api.keys_file or MACRAME_API_KEYS\n"
    )


def test_a_model_without_tokenizer_is_exit_1(tmp_path: Path) -> None:
    model = tmp_path / "tiny"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "llama"}')
    command = [
        sys.executable,
        "-m",
        "cluster.api",
        "--config",
        str(write_config(tmp_path, model)),
        "--head",
        "127.0.0.1:1",
    ]
    run = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert run.returncode == 1
    assert re.fullmatch(rf"cluster.api: The tokenizer in {model} cannot be read: .*\n", run.stderr)


def test_its_parent_says_why_it_ended(tmp_path: Path) -> None:
    model = tmp_path / "tiny"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "llama"}')
    config = write_config(tmp_path, "elsewhere")  # the parent's model takes the place of the file's
    said: list[str] = []
    failed: list[str] = []
    process = ApiProcess(
        config,
        str(model),
        "127.0.0.1:1",
        on_ready=lambda host, port: None,
        on_failed=lambda reason, code: failed.append(reason),
        say=said.append,
    )
    process.start()
    wait_for(lambda: bool(said or failed), 30.0)
    process.close(5.0)
    sentence = rf"The tokenizer in {model} cannot be read: .*"
    assert re.fullmatch(sentence, failed[0])  # the first process never served: another would not either
    assert not said


# -- keys and tokens ----------------------------------------------------------------------------------


def test_a_parent_that_has_ended_is_told_nothing() -> None:
    code = "from cluster.api.__main__ import _tell_parent; _tell_parent('x')"
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, text=True, check=False
        )
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


def test_keys_guard_everything_but_health(tmp_path: Path) -> None:
    ring = ScriptedRing()
    arguments = ("--host", "0.0.0.0")
    with ExitStack() as stack:
        stack.callback(ring.close)
        api, http = stack.enter_context(
            started(tmp_path, f"127.0.0.1:{ring.port}", *arguments, MACRAME_API_KEYS="one-key,other-key")
        )
        wait_healthy(http)
        for path in ("/v1/models", "/v1/cluster", "/metrics", "/nothing", CHAT):
            for header in (
                {},
                {"authorization": "Bearer wrong"},
                {"authorization": "one-key"},
                {"authorization": "Bearer one-key2"},
                {"authorization": "Basic one-key"},
                {"authorization": b"Bearer \xff"},
                {"x-api-key": "wrong"},
            ):
                reply = http.request("POST" if path == CHAT else "GET", path, headers=header)
                assert reply.status_code == 401
                assert reply.headers["www-authenticate"] == "Bearer"
                error = reply.json()["error"]
                assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_api_key")
                assert "one-key" not in reply.text
        for key in ("one-key", "other-key"):
            assert http.get("/metrics", headers={"authorization": f"bearer {key}"}).status_code == 200
            both = {"authorization": "Bearer wrong", "x-api-key": key}
            assert http.get("/metrics", headers=both).status_code == 200
            assert http.get(
                "/v1/models", headers={"authorization": f"Bearer {key}", "host": "any.example"}
            ).is_success
            with openai.OpenAI(base_url=f"{api.url}/v1", api_key=key, max_retries=0) as client:
                assert client.completions.create(model="tiny", prompt="x").choices[0].text == "Hello, world."
        with (
            openai.OpenAI(base_url=f"{api.url}/v1", api_key="bad", max_retries=0) as client,
            pytest.raises(openai.AuthenticationError),
        ):
            client.models.list()


class _Guard(grpc.ServerInterceptor):
    """Refuses calls without the token."""

    def intercept_service(self, continuation: Any, details: Any) -> Any:
        if dict(details.invocation_metadata).get("authorization") == "Bearer secret-token":
            return continuation(details)

        def refuse(request: Any, context: grpc.ServicerContext) -> Any:
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "the token is wrong")

        return grpc.unary_stream_rpc_method_handler(refuse)


class _Alive(head_pb2_grpc.HeadServicer):
    """A head that says ok."""

    def WatchCluster(self, request: Any, context: Any) -> Iterator[head_pb2.ClusterStatus]:  # noqa: N802
        while context.is_active():
            yield head_pb2.ClusterStatus(status="ok", context=100, vocab_size=320)
            threading.Event().wait(0.1)


def test_the_cluster_token_goes_to_the_head(tmp_path: Path) -> None:
    server = grpc.server(ThreadPoolExecutor(4), interceptors=[_Guard()])
    head_pb2_grpc.add_HeadServicer_to_server(_Alive(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        (tmp_path / "a").mkdir()
        (tmp_path / "b").mkdir()
        with started(tmp_path / "a", f"127.0.0.1:{port}", MACRAME_TOKEN="secret-token") as (_, http):
            wait_healthy(http)
        with started(tmp_path / "b", f"127.0.0.1:{port}", MACRAME_TOKEN="other") as (_, http):
            words = "cannot be reached: the token is wrong."
            wait_for(lambda: words in http.get("/health").json().get("reason", ""))  # once it has asked
            assert http.get("/health").status_code == 503
    finally:
        server.stop(0).wait()


# -- what it says of itself ---------------------------------------------------------------------------


def test_health_follows_the_ring(tmp_path: Path) -> None:
    with serving(tmp_path) as served:
        assert served.http.get("/health").json() == {"status": "ok"}
        for state in ("starting", "loading", "degraded"):
            served.ring.set_state(state, f"n0 is {state}")
            wait_for(lambda state=state: served.http.get("/health").json()["status"] == state)
            reply = served.http.get("/health")
            assert reply.headers["retry-after"] == "1"
            assert reply.json() == {
                "status": state,
                "reason": f"n0 is {state}",
                "nodes": [{"rank": 0, "name": "n0", "state": "failed", "reason": f"n0 is {state}"}],
            }
        served.ring.head.ring_down("n0 has gone")
        error = served.error({"prompt": "x"}, status=503)
        assert error["message"] == "n0 has gone"
        assert error["type"] == "service_unavailable_error"


def test_cluster_and_metrics(tmp_path: Path) -> None:
    with serving(tmp_path) as served:
        served.complete()
        served.error({"prompt": ""})
        served.http.get("/nothing")
        wait_for(lambda: served.http.get("/v1/cluster").json()["num_completion_tokens"] == 14)
        cluster = served.http.get("/v1/cluster").json()
        assert (cluster["status"], cluster["model"], cluster["plan"]) == ("ok", "tiny", None)
        assert cluster["nodes"][0]["node"]["loaded_bytes"] == 123 << 33
        assert cluster["nodes"][0]["node"]["state"] == "READY"
        metrics = served.http.get("/metrics")
        assert metrics.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        lines = metrics.text.splitlines()
        for line in (
            'macrame_status{status="ok"} 1.0',
            'macrame_http_requests_total{path="/v1/completions",status="200"} 1.0',
            'macrame_http_requests_total{path="/v1/completions",status="400"} 1.0',
            'macrame_http_requests_total{path="other",status="404"} 1.0',
            "macrame_prompt_tokens_total 2.0",
            "macrame_completion_tokens_total 14.0",
            "macrame_time_to_first_token_seconds_count 1.0",
            "macrame_queue_wait_seconds_count 1.0",
            "macrame_inter_token_seconds_count 13.0",
            'macrame_request_seconds_bucket{le="+Inf"} 1.0',
            "macrame_sessions_max 4.0",
            "macrame_head_up 1.0",
            'macrame_request_errors_total{kind="invalid"} 0.0',
        ):
            assert line in lines, metrics.text
        loaded = 'macrame_node_loaded_bytes{node="n0",rank="0"} '
        assert [float(line.removeprefix(loaded)) for line in lines if line.startswith(loaded)] == [123 << 33]
        found = list(text_string_to_metric_families(metrics.text))
        conventional = re.compile(r"(macrame|process)_[a-z_]+")
        assert all(conventional.fullmatch(family.name) and family.documentation for family in found)


# -- stopping -----------------------------------------------------------------------------------------


@pytest.fixture
def busy(tmp_path: Path) -> Iterator[tuple[Served, Stream]]:
    """A server with a stream that would run for a long time."""
    ring = ScriptedRing()
    ring.delay_s = 0.02
    api = ApiServer(
        tmp_path / "api", write_model(tmp_path / "tiny"), f"127.0.0.1:{ring.port}", "--parent-pipe"
    )
    try:
        with httpx.Client(base_url=api.url) as http, openai.OpenAI(base_url=api.url, api_key="x") as client:
            wait_healthy(http)
            stream = Stream(api.url)
            assert stream.began.wait(5.0)
            yield Served(ring, api, http, client), stream
    finally:
        api.stop()
        ring.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_streams_with_a_sentence(busy: tuple[Served, Stream], number: signal.Signals) -> None:
    served, stream = busy
    began = time.monotonic()
    served.api.process.send_signal(number)
    assert stream.error()["message"] == "The server is stopping."
    assert served.api.process.wait(5.0) == 0
    assert is_in_time(time.monotonic() - began, 2.0)
    served.ring.wait_closed(1)
    assert served.api.log() == ""


def test_the_end_of_the_parent_ends_it(busy: tuple[Served, Stream]) -> None:
    served, stream = busy
    began = time.monotonic()
    assert served.api.process.stdin is not None
    served.api.process.stdin.close()
    assert stream.error()["message"] == "The server is stopping."
    assert served.api.process.wait(5.0) == 0
    assert is_in_time(time.monotonic() - began, 1.5)


def test_a_client_that_does_not_read_cannot_hold_the_stop(busy: tuple[Served, Stream]) -> None:
    served, _ = busy
    served.ring.delay_s = 0.0
    body = json.dumps(ENDLESS | {"stream": True, "logprobs": True, "n": 3}).encode()
    lines = [f"POST {CHAT} HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
    head = "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""])
    with socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect(("127.0.0.1", served.api.port))
        deaf.sendall(head.encode() + body)
        wait_for(lambda: len(served.ring.opened) > 1)
        began = time.monotonic()
        served.api.process.send_signal(signal.SIGTERM)
        assert served.api.process.wait(5.0) == 0
        assert is_in_time(time.monotonic() - began, 2.0)
