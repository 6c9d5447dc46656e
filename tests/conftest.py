"""Before anything imports MLX: exactness is defined without compiled kernels, and no test reaches a hub.

Then the fixtures that several files share.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

os.environ.setdefault("MLX_DISABLE_COMPILE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="macrame-cache-")  # never the user's own
os.environ["XDG_DATA_HOME"] = tempfile.mkdtemp(prefix="macrame-data-")
for folder in ("XDG_CACHE_HOME", "XDG_DATA_HOME"):
    atexit.register(shutil.rmtree, os.environ[folder], ignore_errors=True)
# A ring's processes would each compile all of our modules anew: half of what their start takes.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
for secret in ("MACRAME_TOKEN", "MACRAME_API_KEYS", "MACRAME_FAULT", "MACRAME_CACHE", "MACRAME_KERNELS"):
    os.environ.pop(secret, None)

import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import psutil
import pytest

if TYPE_CHECKING:
    from tests.api_server import Served

LEAK_WAIT_S = 3.0


def _children() -> set[int]:
    return {p.pid for p in psutil.Process().children(recursive=True) if not _is_a_nodes_own(p)}


def _is_a_nodes_own(process: psutil.Process) -> bool:
    """A node starts its process for grammars when first asked for one, and that ends with the node."""
    try:
        return process.ppid() != os.getpid() and "cluster.guide_process" in process.cmdline()
    except psutil.Error:  # it has just ended
        return True


def _listening() -> set[int]:
    return {c.laddr.port for c in psutil.Process().net_connections("tcp") if c.status == psutil.CONN_LISTEN}


def _threads() -> set[threading.Thread]:
    """Python's own: it learns of a foreign one, as gRPC has them, at its first line, and never of its end.

    A head's conversation with an HTTP process lasts as long as that, which several tests may share.
    """
    own = (t for t in threading.enumerate() if not isinstance(t, threading._DummyThread))
    shared = ("ThreadPoolExecutor", "asyncio_", "AnyIO", "conversation")
    return {t for t in own if not t.name.startswith(shared)}


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


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels run on this CPU, thread by thread."""
    monkeypatch.setenv("MACRAME_KERNELS", "emulate")


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The HTTP process in front of a scripted ring, once for all tests that leave it running."""
    from tests.api_server import serving  # clients that few tests need

    with serving(tmp_path_factory.mktemp("served")) as served:
        yield served


@pytest.fixture
def served(shared: Served) -> Served:
    """The same, with a ring as new."""
    shared.ring.reset()
    return shared


@pytest.fixture
def refusing(served: Served) -> Iterator[Served]:
    """The same, for requests that must not reach the ring."""
    yield served
    assert not served.ring.opened
