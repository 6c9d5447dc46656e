"""Before anything imports MLX: exactness is defined without compiled kernels, and no test reaches a hub."""

from __future__ import annotations

import os

os.environ.setdefault("MLX_DISABLE_COMPILE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
for secret in ("MACRAME_TOKEN", "MACRAME_API_KEYS", "MACRAME_FAULT", "MACRAME_CACHE"):
    os.environ.pop(secret, None)

import threading
import time
from collections.abc import Iterator

import psutil
import pytest

LEAK_WAIT_S = 3.0


def _children() -> set[int]:
    return {p.pid for p in psutil.Process().children(recursive=True)}


def _listening() -> set[int]:
    return {c.laddr.port for c in psutil.Process().net_connections("tcp") if c.status == psutil.CONN_LISTEN}


def _threads() -> set[threading.Thread]:
    return {
        t for t in threading.enumerate() if not t.name.startswith(("ThreadPoolExecutor", "asyncio_", "AnyIO"))
    }


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    """No test leaves a process, a thread or a listening socket behind."""
    children, listening, threads = _children(), _listening(), _threads()
    yield
    deadline = time.monotonic() + LEAK_WAIT_S
    while True:
        left = (_children() - children, _listening() - listening, _threads() - threads)
        if not any(left):
            return
        if time.monotonic() > deadline:
            pytest.fail(f"left behind: processes {left[0]}, listening ports {left[1]}, threads {left[2]}")
        threading.Event().wait(0.02)
