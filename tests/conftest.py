"""Before anything imports MLX: exactness is defined without compiled kernels, and no test reaches a hub.

Then the fixtures that several files share.
"""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile

os.environ.setdefault("MLX_DISABLE_COMPILE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="macrame-cache-")  # never the user's own
os.environ["XDG_DATA_HOME"] = tempfile.mkdtemp(prefix="macrame-data-")
for folder in ("XDG_CACHE_HOME", "XDG_DATA_HOME"):
    atexit.register(shutil.rmtree, os.environ[folder], ignore_errors=True)
# Else each process of a ring compiles our modules anew, half of its start, and each run of pytest all tests.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
for secret in ("MACRAME_TOKEN", "MACRAME_API_KEYS", "MACRAME_FAULT", "MACRAME_CACHE", "MACRAME_KERNELS"):
    os.environ.pop(secret, None)

import gc
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

from tests import leaks
from tests.waiting import is_in_time

if TYPE_CHECKING:
    from tests.api_server import Served

LEAK_WAIT_S = 3.0

# A processor that halts for a while says nothing of an example.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


def pytest_collection_finish() -> None:
    """What was imported lives to the end: a collection that looks through all of it takes half a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    """No test leaves a process, a thread or a listening socket behind."""
    children, listening, threads = leaks.children(), leaks.listening(), leaks.threads()
    yield
    began = time.monotonic()
    while True:
        left = (leaks.children() - children, leaks.listening() - listening, leaks.threads() - threads)
        if not any(left):
            return
        if not is_in_time(time.monotonic() - began, LEAK_WAIT_S):
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
