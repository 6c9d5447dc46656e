"""What no test may leave behind is found, by the kernel's tables as by psutil."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading

import pytest

from tests import leaks

# A process with one of its own, which says its number; both end with their standard input.
TWO = (
    "import subprocess, sys; code = 'import sys; sys.stdin.read()'; "
    "child = subprocess.Popen([sys.executable, '-c', code]); "
    "print(child.pid, flush=True); child.wait()"
)


@pytest.fixture(params=[True, False], ids=["proc", "psutil"])
def _way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param and not leaks._HAS_PROC:
        pytest.skip("this system has no /proc")
    monkeypatch.setattr(leaks, "_HAS_PROC", request.param)


@pytest.mark.usefixtures("_way")
def test_processes_and_what_they_start_are_found() -> None:
    before = leaks.children()
    command = [sys.executable, "-c", TWO]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        below = int(process.stdout.readline())
        assert leaks.children() - before == {process.pid, below}
    assert leaks.children() == before


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_a_socket_that_listens_is_found(family: socket.AddressFamily) -> None:
    before = leaks.listening()
    with socket.socket(family) as one:
        try:
            one.bind(("::1" if family == socket.AF_INET6 else "127.0.0.1", 0))
        except OSError:
            pytest.skip("no IPv6 here")
        assert leaks.listening() == before  # bound alone is not yet heard
        one.listen()
        assert leaks.listening() - before == {one.getsockname()[1]}
    assert leaks.listening() == before


def test_a_thread_that_goes_on_is_found() -> None:
    before, end = leaks.threads(), threading.Event()
    thread = threading.Thread(target=end.wait)
    thread.start()
    assert leaks.threads() - before == {thread}
    end.set()
    thread.join()
    assert leaks.threads() == before
    assert os.getpid() not in leaks.children()
