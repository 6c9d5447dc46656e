"""What a test may not leave behind: processes, listening sockets, threads.

Asked twice a test. On Linux /proc answers for this process alone; psutil, which answers elsewhere, goes
through all processes and connections of the machine, which over all tests takes half a minute.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil

LISTENING = "0A"  # TCP_LISTEN of the kernel's tcp_states.h, as /proc/net/tcp writes it
_HAS_PROC = sys.platform == "linux" and Path(f"/proc/self/task/{os.getpid()}/children").exists()


def children() -> set[int]:
    """Process ids of all that this process and its own have started and that are still there."""
    if _HAS_PROC:
        found = _below(os.getpid())
    else:
        found = {process.pid for process in psutil.Process().children(recursive=True)}
    return {pid for pid in found if not _is_a_nodes_own(pid)}


def _below(pid: int) -> set[int]:
    found: set[int] = set()
    with contextlib.suppress(OSError):  # it has just ended
        for thread in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError):
                own = {int(word) for word in Path(f"/proc/{pid}/task/{thread}/children").read_text().split()}
                found |= own.union(*map(_below, own))
    return found


def _is_a_nodes_own(pid: int) -> bool:
    """A node starts its process for grammars when first asked for one, and that ends with the node."""
    try:
        process = psutil.Process(pid)
        return process.ppid() != os.getpid() and "cluster.guide_process" in process.cmdline()
    except psutil.Error:  # it has just ended
        return True


def listening() -> set[int]:
    """TCP ports that this process listens on."""
    if _HAS_PROC:
        return set(_listening_of_proc())
    connections = psutil.Process().net_connections("tcp")
    return {connection.laddr.port for connection in connections if connection.status == psutil.CONN_LISTEN}


def _listening_of_proc() -> Iterator[int]:
    sockets = set()
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            sockets.add(os.readlink(f"/proc/self/fd/{descriptor}"))
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):  # a kernel without IPv6
            for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()  # number, address:port in hexadecimal, the peer's, state, ..., inode
                if fields[3] == LISTENING and f"socket:[{fields[9]}]" in sockets:
                    yield int(fields[1].rpartition(":")[2], 16)


def threads() -> set[threading.Thread]:
    """Python's own: it learns of a foreign one, as gRPC has them, at its first line, and never of its end.

    A head's conversation with an HTTP process lasts as long as that, which several tests may share.
    """
    own = (t for t in threading.enumerate() if not isinstance(t, threading._DummyThread))
    shared = ("ThreadPoolExecutor", "asyncio_", "AnyIO", "conversation")
    return {t for t in own if not t.name.startswith(shared)}
