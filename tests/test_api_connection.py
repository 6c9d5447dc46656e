"""Heads without end and bodies beyond the limit, written to a real socket by clients that read last."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
import uvicorn
from uvicorn.server import ServerState

from cluster.api import connection as connection_module
from cluster.api.connection import MAX_DRAIN_BYTES, MAX_HEAD_BYTES, Connection
from tests.api_server import CHAT, COMPLETIONS, Served, chat_body
from tests.waiting import wait_for

MIB = 1 << 20


@contextlib.contextmanager
def connected(served: Served) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", served.api.port), timeout=20) as connection:
        yield connection


def head(path: str, *, method: str = "GET", size: int = 0, **headers: object) -> bytes:
    """A request's head of exactly `size` bytes, or of what it needs."""
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    short = "\r\n".join([*lines, "\r\n"]).encode()
    if not size:
        return short
    return short[:-2] + b"X-Fill: " + b"x" * (size - len(short) - 10) + b"\r\n\r\n"


def read_reply(connection: socket.socket) -> tuple[int, dict[str, str], Any]:
    """Status, headers and JSON of one reply."""
    got = b""
    while b"\r\n\r\n" not in got:
        got += (part := connection.recv(4096))
        assert part, got
    lines, _, body = got.partition(b"\r\n\r\n")
    status, *rest = lines.decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in rest)
    while len(body) < int(headers["content-length"]):
        body += (part := connection.recv(4096))
        assert part, body
    return int(status.split()[1]), headers, json.loads(body)


def check_refusal(connection: socket.socket, status: int, code: str, message: str) -> None:
    got, headers, content = read_reply(connection)
    assert (got, headers["connection"], headers["content-type"]) == (status, "close", "application/json")
    error = content["error"]
    assert (error["code"], error["message"]) == (code, message)
    assert error.keys() == {"message", "type", "param", "code"}
    assert connection.recv(10) == b""  # its side is closed, and not reset


def check_head_refusal(connection: socket.socket) -> None:
    message = "The request's headers are larger than 65536 bytes."
    check_refusal(connection, 431, "headers_too_large", message)


def write_endlessly(served: Served, start: bytes) -> None:
    """The server takes some of it and cuts the connection, and never holds much of it."""
    process = psutil.Process(served.api.process.pid)
    before_bytes = most_bytes = process.memory_info().rss
    num_written_bytes = 0
    with connected(served) as connection, contextlib.suppress(OSError):
        connection.sendall(start)
        while num_written_bytes < 10 * MAX_DRAIN_BYTES:
            connection.sendall(b"x" * MIB)
            num_written_bytes += MIB
            most_bytes = max(most_bytes, process.memory_info().rss)
    assert MAX_DRAIN_BYTES <= num_written_bytes < 2 * MAX_DRAIN_BYTES
    assert most_bytes - before_bytes < 8 * MIB


# -- heads --------------------------------------------------------------------------------------------


def test_the_largest_head_is_served(served: Served) -> None:
    with connected(served) as connection:
        for _ in range(3):  # each is counted from its own first byte
            connection.sendall(head("/health", size=MAX_HEAD_BYTES))
            status, headers, content = read_reply(connection)
            assert (status, content["status"]) == (200, "ok")
            assert "connection" not in headers


@pytest.mark.parametrize("size", [MAX_HEAD_BYTES + 1, 3 * MIB, 20 * MIB])
def test_a_larger_head_is_refused(served: Served, size: int) -> None:
    with connected(served) as connection:
        connection.sendall(head("/health", size=size))
        check_head_refusal(connection)
    with connected(served) as connection:  # after one that was served
        connection.sendall(head("/health"))
        assert read_reply(connection)[0] == 200
        connection.sendall(head("/health", size=size))
        check_head_refusal(connection)


@pytest.mark.parametrize("part", [b"X: y\r\n", b"x" * 97])
def test_many_lines_or_one_long_name_are_refused(served: Served, part: bytes) -> None:
    with connected(served) as connection:
        connection.sendall(head("/health")[:-2] + part * (MIB // len(part)))
        check_head_refusal(connection)


def test_a_long_path_is_refused(served: Served) -> None:
    with connected(served) as connection:
        connection.sendall(head("/" + "x" * MIB))
        check_head_refusal(connection)


def test_endless_heads_take_no_memory(served: Served) -> None:
    for _ in range(2):
        write_endlessly(served, head("/health")[:-2] + b"X-Fill: ")
    assert served.complete(max_tokens=1)


def test_endless_trailers_are_refused(served: Served) -> None:
    chunks = b"5\r\nhello\r\n" + b"1\r\nx\r\n" * 30_000 + b"0\r\n"  # framing of a body is no head
    start = head(COMPLETIONS, method="POST", content_type="application/json", transfer_encoding="chunked")
    with connected(served) as connection:
        connection.sendall(start + chunks + b"\r\n")
        status, _, content = read_reply(connection)
        assert (status, content["error"]["code"]) == (400, "invalid_json")
    with connected(served) as connection:
        connection.sendall(start + chunks + b"X: y\r\n" * MIB)
        check_head_refusal(connection)
    assert not served.ring.opened


def test_a_long_head_behind_a_running_request_cuts_the_connection(served: Served) -> None:
    served.ring.delay_s = 0.01
    body = json.dumps(chat_body(ignore_eos=True, stream=True)).encode()
    start = head(CHAT, method="POST", content_type="application/json", content_length=len(body))
    with connected(served) as connection:
        connection.sendall(start + body)
        got = connection.recv(4096)
        assert got.startswith(b"HTTP/1.1 200")
        with contextlib.suppress(OSError):
            connection.sendall(head("/health", size=MIB))
            while part := connection.recv(4096):
                got += part
        assert b"431" not in got  # it would be read as a part of the stream
    served.ring.wait_closed(1)


# -- bodies -------------------------------------------------------------------------------------------

TOO_LARGE = (413, "body_too_large", "The body is larger than 16777216 bytes.")


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_a_client_that_writes_all_of_a_large_body_reads_the_refusal(served: Served, path: str) -> None:
    start = head(path, method="POST", content_type="application/json", content_length=17 * MIB)
    with connected(served) as connection:
        connection.sendall(start)
        connection.sendall(b" " * (17 * MIB))
        check_refusal(connection, *TOO_LARGE)
    chunked = head(path, method="POST", content_type="application/json", transfer_encoding="chunked")
    with connected(served) as connection:
        connection.sendall(chunked + (b"100000\r\n" + b" " * MIB + b"\r\n") * 40 + b"0\r\n\r\n")
        check_refusal(connection, *TOO_LARGE)


def test_a_client_that_waits_for_a_go_ahead_need_not_write_a_large_body(served: Served) -> None:
    with connected(served) as connection:
        connection.sendall(
            head(
                CHAT,
                method="POST",
                content_type="application/json",
                content_length=17 * MIB,
                expect="100-continue",
            )
        )
        check_refusal(connection, *TOO_LARGE)


def test_an_endless_body_is_cut(served: Served) -> None:
    start = head(CHAT, method="POST", content_type="application/json", content_length=10**12)
    write_endlessly(served, start)


def test_a_client_that_leaves_in_the_middle_of_a_refused_body_is_let_go(served: Served) -> None:
    process = psutil.Process(served.api.process.pid)
    before = process.num_fds()
    start = head(CHAT, method="POST", content_type="application/json", content_length=17 * MIB)
    with connected(served) as connection:
        connection.sendall(start + b" " * MIB)
        assert read_reply(connection)[0] == 413
        assert process.num_fds() > before
    wait_for(lambda: process.num_fds() <= before)


@pytest.mark.parametrize("size", [0, MIB])
def test_a_client_that_never_closes_is_left_in_the_end(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_module, "LINGER_S", 0.3)

    async def refuse(scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"content-length", b"0"), (b"connection", b"close")]
        await send({"type": "http.response.start", "status": 413, "headers": headers})
        await send({"type": "http.response.body", "body": b""})

    async def serve() -> bytes:
        config, state = uvicorn.Config(refuse, log_config=None), ServerState()
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: Connection(config, state, {}), "127.0.0.1", 0)
        async with server:
            reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
            writer.write(head("/", size=size, content_length=5))
            got = await reader.read()
            assert len(state.connections) == 1  # it only has said all that it says
            while state.connections:
                await asyncio.sleep(0.005)
            writer.close()
        return got

    status = b"HTTP/1.1 431" if size else b"HTTP/1.1 413"
    assert asyncio.run(asyncio.wait_for(serve(), 10)).startswith(status)
