"""What the HTTP process's clients see when the head is missing, dies, or freezes."""

from __future__ import annotations

import signal
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.api_server import CHAT, ENDLESS, Stream, head_process, started, wait_healthy
from tests.ring_processes import free_ports
from tests.waiting import is_in_time, wait_for


def test_the_head_may_come_later(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    with started(tmp_path, f"127.0.0.1:{port}") as (_, http):
        reply = http.get("/health")
        assert reply.status_code == 503
        assert reply.json()["status"] == "starting"
        wait_for(lambda: "tokenizer" not in http.post(CHAT, json=ENDLESS).text, 30.0)
        reply = http.post(CHAT, json=ENDLESS)
        assert reply.status_code == 503
        assert reply.headers["retry-after"] == "1"
        assert f"The head at 127.0.0.1:{port} cannot be reached" in reply.json()["error"]["message"]
        with head_process(port):
            wait_healthy(http, 5.0)
            assert (
                http.post(CHAT, json=ENDLESS | {"max_tokens": 3}).json()["choices"][0]["message"]["content"]
                == "Hel"
            )


def test_a_killed_head_ends_streams_and_may_return(tmp_path: Path) -> None:
    with ExitStack() as stack:
        process, port = stack.enter_context(head_process())
        api, http = stack.enter_context(started(tmp_path, f"127.0.0.1:{port}"))
        wait_healthy(http)
        stream = Stream(api.url)
        assert stream.began.wait(5.0)
        process.kill()
        killed_at = time.monotonic()
        error = stream.error()
        assert is_in_time(stream.ended_at - killed_at, 2.0)
        assert error["code"] == "unavailable"
        assert wait_for(lambda: http.get("/health").json()["status"] == "degraded") < 2.0
        assert http.get("/health").json()["nodes"][0]["state"] == "unreachable"
        assert http.post(CHAT, json=ENDLESS).status_code == 503
        with head_process(port):
            wait_healthy(http, 5.0)
            assert http.post(CHAT, json=ENDLESS | {"max_tokens": 2}).is_success


@pytest.mark.long
def test_a_frozen_head_ends_what_runs_within_two_seconds(tmp_path: Path) -> None:
    with ExitStack() as stack:
        process, port = stack.enter_context(head_process(delay_s=0.02))
        api, http = stack.enter_context(started(tmp_path, f"127.0.0.1:{port}", silence_s=1))
        wait_healthy(http)
        streams = [Stream(api.url), Stream(api.url, n=2)]
        assert all(stream.began.wait(5.0) for stream in streams)
        process.send_signal(signal.SIGSTOP)
        frozen_at = time.monotonic()
        reply = http.post(CHAT, json=ENDLESS)  # sent to the head before its silence is noticed
        assert is_in_time(time.monotonic() - frozen_at, 2.0)
        assert reply.status_code == 503
        for stream in streams:
            assert "has been silent for 1." in stream.error()["message"]
            assert is_in_time(stream.ended_at - frozen_at, 2.0)
        health = http.get("/health").json()
        assert health["status"] == "degraded"
        assert health["nodes"][0]["state"] == "frozen"
        began = time.monotonic()
        assert http.post(CHAT, json=ENDLESS).status_code == 503
        assert is_in_time(time.monotonic() - began, 0.5)
        process.send_signal(signal.SIGCONT)
        wait_healthy(http, 5.0)
        assert http.post(CHAT, json=ENDLESS | {"max_tokens": 2}).is_success
