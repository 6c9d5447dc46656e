"""Watches how short of memory this machine is.

One thread with a slow tick reads the system and decides (cluster/memory_pressure.py); it never touches MLX:
what has to be freed there it asks the compute thread for.
"""

from __future__ import annotations

import ctypes
import logging
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil

from cluster.container_memory import ROOT, container_memory
from cluster.fault import Fault, injected_text
from cluster.memory_pressure import Level, Pressure, Reading, decide

logger = logging.getLogger(__name__)

TICK_S = 1.0
STOP_S = 1.0
# Level of https://developer.apple.com/documentation/dispatch/dispatchsource/memorypressureevent
_MACOS_LEVELS = {1: Level.NORMAL, 2: Level.WARNING, 4: Level.CRITICAL}


class MemoryWatch:
    """Keeps `reading` and `pressure` up to date between start and close.

    on_change() is called when the level changes, `trim` when MLX should give its cache back; both on the
    watch's own thread, and both must be quick.
    """

    def __init__(
        self,
        *,
        on_change: Callable[[], None],
        trim: Callable[[], None],
        read: Callable[[], Reading] | None = None,
        tick_s: float = TICK_S,
    ) -> None:
        self._on_change, self._trim = on_change, trim
        self._read, self._tick_s = read or read_memory, tick_s
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory-watch", daemon=True)
        self.reading: Reading | None = None
        self.pressure = Pressure()
        self.num_trims = 0

    def start(self) -> None:
        """Start the thread; call once."""
        self._thread.start()

    def close(self) -> None:
        """End the thread."""
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join(STOP_S)

    def _run(self) -> None:
        read_at = time.monotonic()
        while not self._stopping.is_set():
            now = time.monotonic()
            try:
                self._look(now - read_at)
            except (OSError, RuntimeError, ValueError, psutil.Error):  # what reading the system may raise
                logger.exception("memory could not be read")
            read_at = now
            self._stopping.wait(self._tick_s)

    def _look(self, elapsed_s: float) -> None:
        reading = self._read()
        before, self.pressure = self.pressure, decide(self.pressure, self.reading, reading, elapsed_s)
        self.reading = reading
        if self.pressure.must_trim:
            self.num_trims += 1
            self._trim()
        if self.pressure.level is not before.level:
            log = logger.info if self.pressure.level is Level.NORMAL else logger.warning
            log("memory pressure is %s: %s", self.pressure.level.word, self.pressure.reason or "it is over")
            self._on_change()


def read_memory() -> Reading:
    """The system's present state. A fault of the tests may take the place of what is available."""
    memory, swap = psutil.virtual_memory(), psutil.swap_memory()
    reading = Reading(
        total_bytes=memory.total,
        available_bytes=memory.available,
        swap_used_bytes=swap.used,
        swapped_out_bytes=swap.sout,
        system_level=_macos_level() if sys.platform == "darwin" else Level.NORMAL,
    )
    if sys.platform == "linux":
        reading = _within_container(_with_stalls(reading))
    share = _injected_share()
    return reading if share is None else replace(reading, available_bytes=int(share * reading.total_bytes))


def _macos_level() -> Level:
    """What `sysctl kern.memorystatus_vm_pressure_level` prints, asked without a process of its own."""
    value, size = ctypes.c_int(0), ctypes.c_size_t(ctypes.sizeof(ctypes.c_int))
    name = b"kern.memorystatus_vm_pressure_level"
    failed = ctypes.CDLL(None).sysctlbyname(name, ctypes.byref(value), ctypes.byref(size), None, 0)
    return Level.NORMAL if failed else _MACOS_LEVELS.get(value.value, Level.NORMAL)


def _with_stalls(reading: Reading, root: Path = ROOT) -> Reading:
    """Stall times of the container, or of the machine; kernels without them change nothing."""
    for path in (root / "memory.pressure", Path("/proc/pressure/memory")):
        try:
            text = path.read_text()
        except OSError:
            continue
        shares = stall_shares(text)
        return replace(
            reading,
            some_stall_share=shares.get("some", 0.0),
            full_stall_share=shares.get("full", 0.0),
        )
    return reading


def stall_shares(text: str) -> dict[str, float]:
    """{"some", "full"}: shares of the last 10 s, from the lines of a PSI file."""
    shares = {}
    for line in text.splitlines():
        kind, _, rest = line.partition(" ")
        fields = dict(field.split("=", 1) for field in rest.split() if "=" in field)
        if "avg10" in fields:
            shares[kind] = float(fields["avg10"]) / 100
    return shares


def _within_container(reading: Reading, root: Path = ROOT) -> Reading:
    """The container's limit and what is left of it, where that is less than the machine's."""
    container = container_memory(root)
    if container is None or container.limit_bytes >= reading.total_bytes:
        return reading
    left_bytes = min(container.left_bytes, reading.available_bytes)
    return replace(reading, total_bytes=container.limit_bytes, available_bytes=left_bytes)


def _injected_share() -> float | None:
    """The number in the file that the fault names; None without the fault or the file."""
    path = injected_text(Fault.AVAILABLE_SHARE)
    try:
        return float(Path(path).read_text()) if path else None
    except (OSError, ValueError):
        return None
