"""Clients that leave while their grammar waits to be tried: it is tried for nobody."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest

from tests.api_server import CHAT, Served, chat_body, serving
from tests.waiting import wait_for

NUM_CLIENTS = 40
# Every grammar is tried in a process of its own, which writes a line as it starts.
COUNTER = """
import os, sys
if "cluster.api.grammar_checker" in sys.orig_argv:
    with open(os.environ["COUNTED"], "a") as counted:
        counted.write("1")
"""


def asked(served: Served, number: int) -> socket.socket:
    """A client that has sent its request."""
    body = json.dumps(chat_body(guided_regex=f"left{number}[a-z]{{3}}")).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    client = socket.create_connection(("127.0.0.1", served.api.port))
    client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    return client


def test_for_clients_that_have_left_no_grammar_is_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(COUNTER)
    counted = tmp_path / "counted"
    monkeypatch.setenv("COUNTED", str(counted))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(tmp_path / "site"), os.getenv("PYTHONPATH", ""))))
    with serving(tmp_path) as served:
        clients = [asked(served, number) for number in range(NUM_CLIENTS)]
        wait_for(lambda: counted.exists() and len(counted.read_text()) >= 4, 30.0)  # so all are read
        for client in clients:
            client.close()
        served.chat(guided_regex="stays[a-z]{3}")  # its turn comes behind all of those
        assert 1 <= len(counted.read_text()) < NUM_CLIENTS / 2
