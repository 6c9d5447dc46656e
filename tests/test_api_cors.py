"""Browsers: which pages may ask with keys and without, what a preflight needs, and what stays closed."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from tests.api_server import CHAT, Served, chat_body, started

FOREIGN = "https://chat.example"
ASKS = {
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,x-stainless-os",
}


def preflight(http: httpx.Client, origin: str, path: str = CHAT) -> httpx.Response:
    return http.options(path, headers={"origin": origin, **ASKS})


@pytest.mark.parametrize("origin", ["http://localhost:3000", "http://127.0.0.1:8000", "https://[::1]"])
def test_pages_of_this_machine_may_ask_without_keys(served: Served, origin: str) -> None:
    allowed = preflight(served.http, origin)
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == origin
    assert "x-stainless-os" in allowed.headers["access-control-allow-headers"]
    answer = served.http.post(CHAT, json=chat_body(), headers={"origin": origin})
    assert answer.headers["access-control-allow-origin"] == origin
    assert "Origin" in answer.headers["vary"]


@pytest.mark.parametrize(
    "origin",
    [
        FOREIGN,
        "http://localhost.chat.example",
        "http://127.0.0.1.example",
        "null",
        "http://localhost:3000.example",
    ],
)
def test_other_pages_may_not_ask_without_keys(refusing: Served, origin: str) -> None:
    refused = preflight(refusing.http, origin)
    assert refused.status_code == 400
    assert "access-control-allow-origin" not in refused.headers
    models = refusing.http.get("/v1/models", headers={"origin": origin})
    assert "access-control-allow-origin" not in models.headers


def test_with_keys_every_page_may_ask_and_needs_the_key(tmp_path: Path) -> None:
    with started(tmp_path, "127.0.0.1:1", MACRAME_API_KEYS="sk-one") as (_, http):
        allowed = preflight(http, FOREIGN)
        assert (allowed.status_code, allowed.headers["access-control-allow-origin"]) == (200, "*")
        assert "access-control-allow-credentials" not in allowed.headers
        without = http.get("/v1/models", headers={"origin": FOREIGN})
        assert (without.status_code, without.headers["access-control-allow-origin"]) == (401, "*")
        key = {"origin": FOREIGN, "authorization": "Bearer sk-one"}
        assert http.get("/v1/models", headers=key).status_code == 200
        for path in ("/health", "/metrics"):
            assert "access-control-allow-origin" not in http.get(path, headers=key).headers
        assert "access-control-allow-origin" not in preflight(http, FOREIGN, "/metrics").headers
