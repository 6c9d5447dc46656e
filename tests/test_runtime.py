"""One ring of real processes that has to bear strangers on its ports and the death of its HTTP process."""

from __future__ import annotations

import random
import socket
from pathlib import Path

import httpx
import psutil

from tests.api_server import COMPLETIONS
from tests.reference import greedy
from tests.ring_processes import RingProcesses
from tests.tiny_models import write_checkpoint
from tests.waiting import wait_for

PROMPT = list(b"def f")
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])  # an empty HTTP/2 frame


def serves(ring: RingProcesses) -> bool:
    return ring.tokens(PROMPT, 8) == greedy(Path(ring.config["model"]), PROMPT, 8)[0]


def send(port: int, data: bytes) -> None:
    """Sends the bytes and reads until the node is done with them, or half a second has passed."""
    with socket.create_connection(("127.0.0.1", port), timeout=0.5) as stranger:
        try:
            stranger.sendall(data)
            while stranger.recv(4096):
                pass
        except (TimeoutError, ConnectionError):
            pass


def test_a_ring_bears_strangers_and_the_death_of_its_http_process(tmp_path: Path) -> None:
    model = write_checkpoint("llama", tmp_path / "tiny", num_layers=5)
    with RingProcesses(tmp_path, model, [(0, 3), (3, 5)], with_api=True) as ring:
        ring.wait_api()
        strangers_on_its_ports_harm_nothing(ring)
        a_killed_http_process_comes_back(ring)


def strangers_on_its_ports_harm_nothing(ring: RingProcesses) -> None:
    epoch = ring.wait_ok().epoch
    noise = random.Random(7)
    request = f"GET / HTTP/1.1\r\nHost: 127.0.0.1:{ring.ports[0]}\r\n\r\n".encode()
    for port in ring.ports:
        for data in (request, noise.randbytes(100_000), PREFACE + noise.randbytes(1000), PREFACE + SETTINGS):
            send(port, data)
    # a stream of frames that is not gRPC: a HEADERS frame that promises a gigabyte
    send(ring.ports[1], PREFACE + SETTINGS + bytes([0xFF, 0xFF, 0xFF, 1, 4, 0, 0, 0, 1]) + b"x" * 1000)
    assert serves(ring)
    status = ring.wait_status(lambda s: all(rank.node.num_sessions == 0 for rank in s.ranks))
    assert (status.status, status.epoch) == ("ok", epoch)


def a_killed_http_process_comes_back(ring: RingProcesses) -> None:
    epoch = ring.wait_ok().epoch
    (child,) = psutil.Process(ring.processes[0].pid).children(recursive=True)
    child.kill()
    child.wait(5.0)
    assert serves(ring)  # the head does without
    wait_for(lambda: "the HTTP process ended with code -9; starting it again in 0.5 s" in ring.log(0), 5.0)
    url = ring.wait_api()
    (again,) = psutil.Process(ring.processes[0].pid).children(recursive=True)
    assert again.pid != child.pid
    body = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    answer = httpx.post(url + COMPLETIONS, json=body, timeout=20.0)
    assert answer.json()["choices"][0]["token_ids"] == greedy(Path(ring.config["model"]), PROMPT, 8)[0]
    assert ring.wait_ok().epoch == epoch
