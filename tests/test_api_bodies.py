"""Bodies, content types, methods, paths, hosts and names that are refused, and those that are served."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator

import httpx
import openai
import pytest

from tests.api_server import CHAT, COMPLETIONS, Served, chat_body
from tests.scripted_ring import CONTEXT


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b'"x"', b"5", b"\xff\xfe", b'{"a":1}}', b"[" * 100_000, b"1" * 5000]
)
def test_what_is_no_json_object(refusing: Served, body: bytes) -> None:
    error = refusing.error(body, path=CHAT)
    assert error["code"] == "invalid_json"
    assert error["message"].startswith(("The body is not valid JSON: ", "The body must be a JSON object."))


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "", "json"])
def test_other_content_types(refusing: Served, kind: str) -> None:
    reply = refusing.http.post(COMPLETIONS, content=b'{"prompt": "x"}', headers={"content-type": kind})
    assert reply.status_code == 415
    assert reply.json()["error"]["message"] == "The content type must be application/json."


def test_a_body_that_is_too_large(refusing: Served) -> None:
    def parts() -> Iterator[bytes]:
        for _ in range(20):
            yield b" " * (1 << 20)

    for content in (b" " * ((16 << 20) + 1), parts()):
        with httpx.Client(base_url=refusing.api.url) as client:
            reply = client.post(COMPLETIONS, content=content, headers={"content-type": "application/json"})
        assert reply.status_code == 413
        assert reply.json()["error"]["code"] == "body_too_large"


def test_unknown_models(refusing: Served) -> None:
    for path, body in ((CHAT, chat_body(model="gpt-4")), (COMPLETIONS, {"prompt": "x", "model": "gpt-4"})):
        error = refusing.error(body, status=404, path=path)
        assert error["message"] == "The model 'gpt-4' does not exist here; the served model is 'tiny'."
        assert (error["param"], error["code"]) == ("model", "model_not_found")
    with pytest.raises(openai.NotFoundError):
        refusing.openai.models.retrieve("gpt-4")
    assert refusing.error({"prompt": "x", "model": ""}, status=404)["code"] == "model_not_found"


def test_names_of_the_served_model(served: Served) -> None:
    assert [model.id for model in served.openai.models.list()] == ["tiny"]
    assert served.openai.models.retrieve("tiny").owned_by == "macrame"
    configured = json.loads(served.api.config_path.read_text())["model"]
    assert configured.startswith("/")
    for name in ("tiny", configured):
        assert served.complete(model=name)["model"] == "tiny"
    assert served.http.get("/v1/models").json()["data"][0]["max_model_len"] == CONTEXT


def test_paths_and_methods(refusing: Served) -> None:
    for method, path, status, code in (
        ("GET", "/v1", 404, "not_found"),
        ("POST", "/", 405, "method_not_allowed"),
        ("POST", "/v1/audio/speech", 404, "not_found"),
        ("GET", CHAT, 405, "method_not_allowed"),
        ("DELETE", "/v1/models/tiny", 405, "method_not_allowed"),
        ("PUT", COMPLETIONS, 405, "method_not_allowed"),
    ):
        reply = refusing.http.request(method, path)
        assert reply.status_code == status, path
        assert reply.json()["error"]["code"] == code
    assert refusing.http.get(CHAT).headers["allow"] == "POST"
    options = refusing.http.options(CHAT)
    assert (options.status_code, options.headers["allow"], options.content) == (204, "POST", b"")
    head = refusing.http.head("/health")
    assert (head.status_code, head.content) == (200, b"")
    assert not any(name.startswith("access-control") for name in refusing.http.get("/health").headers)


def test_foreign_host_names_are_refused_without_keys(refusing: Served) -> None:
    for host in ("evil.example", "localhost.evil.example", "127.0.0.1.evil.example:80"):
        reply = refusing.http.get("/v1/models", headers={"host": host})
        assert reply.status_code == 403
        assert reply.json()["error"]["code"] == "host_not_allowed"
    for host in ("localhost:1", "LOCALHOST", "127.0.0.1:5", "[::1]:80", "mini.local", "192.168.1.5:8080"):
        assert refusing.http.get("/v1/models", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "junk", [b"\x00\xff\x16\x03\x01" * 50, b"GET\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"]
)
def test_junk_on_the_port_harms_nobody(refusing: Served, junk: bytes) -> None:
    with socket.create_connection(("127.0.0.1", refusing.api.port), timeout=20) as connection:
        connection.sendall(junk)
        assert b"200" not in connection.recv(1000)[:20]
    assert refusing.http.get("/health").status_code == 200
