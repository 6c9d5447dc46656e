from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.memory_pressure import Level, Reading
from cluster.memory_watch import (
    MemoryWatch,
    _macos_level,
    _with_stalls,
    _within_container,
    read_memory,
    stall_shares,
)

GB = 10**9
PSI = "some avg10=12.50 avg60=1.00 avg300=0.00 total=9\nfull avg10=3.00 avg60=0.00 avg300=0.00 total=2\n"


def test_this_machine_can_be_read() -> None:
    reading = read_memory()
    assert 0 < reading.available_bytes <= reading.total_bytes <= psutil.virtual_memory().total
    assert reading.swap_used_bytes >= 0
    assert 0 <= reading.full_stall_share <= reading.some_stall_share <= 1


def test_stall_shares_are_those_of_the_last_ten_seconds() -> None:
    assert stall_shares(PSI) == {"some": 0.125, "full": 0.03}
    assert stall_shares("") == stall_shares("nonsense\n") == {}


def test_a_containers_own_stalls_count_where_it_has_some(tmp_path: Path) -> None:
    (tmp_path / "memory.pressure").write_text(PSI)
    reading = _with_stalls(Reading(16 * GB, 8 * GB), root=tmp_path)
    assert (reading.some_stall_share, reading.full_stall_share) == (0.125, 0.03)


@pytest.mark.parametrize("version", [1, 2])
def test_a_containers_limit_takes_the_machines_place(version: int, tmp_path: Path) -> None:
    names = ("memory.max", "memory.current", "memory.stat")
    if version == 1:
        (tmp_path / "memory").mkdir()
        names = ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat")
    key = "inactive_file" if version == 2 else "total_inactive_file"
    for name, text in zip(
        names, (str(4 * GB), str(3 * GB), f"anon 7\n{key} {GB // 2}\nfile 9\n"), strict=True
    ):
        (tmp_path / name).write_text(text + "\n")
    reading = _within_container(Reading(16 * GB, 8 * GB), root=tmp_path)
    assert (reading.total_bytes, reading.available_bytes) == (4 * GB, 3 * GB // 2)


def test_no_limit_leaves_the_machines_numbers(tmp_path: Path) -> None:
    for name, text in (("memory.max", "max"), ("memory.current", "5"), ("memory.stat", "inactive_file 1")):
        (tmp_path / name).write_text(text)
    machine = Reading(16 * GB, 8 * GB)
    assert _within_container(machine, root=tmp_path) == machine
    assert _within_container(machine, root=tmp_path / "none") == machine


def test_a_fault_takes_the_place_of_what_is_available(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "share"
    monkeypatch.setenv("MACRAME_FAULT", f"step_delay_ms=1,available_share={file}")
    assert read_memory().available_bytes > 0.01 * read_memory().total_bytes  # no file yet
    file.write_text("0.01")
    reading = read_memory()
    assert reading.available_bytes == int(0.01 * reading.total_bytes)


@pytest.mark.parametrize(
    ("value", "failed", "level"),
    [(1, 0, Level.NORMAL), (2, 0, Level.WARNING), (4, 0, Level.CRITICAL), (4, -1, Level.NORMAL)],
)
def test_macos_levels_are_the_kernels(
    value: int, failed: int, level: Level, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    class Library:
        def sysctlbyname(self, name: bytes, out: Any, *_: Any) -> int:
            asked.append(name)
            out._obj.value = value
            return failed

    monkeypatch.setattr("ctypes.CDLL", lambda _: Library())
    assert _macos_level() is level
    assert asked == [b"kern.memorystatus_vm_pressure_level"]


def test_the_thread_reports_changes_and_trims() -> None:
    shares = iter([0.5, 0.03, 0.5])
    changed, trimmed, over = threading.Semaphore(0), threading.Semaphore(0), threading.Event()

    def read() -> Reading:
        return Reading(100 * GB, int(next(shares, 0.5) * 100 * GB))

    def on_change() -> None:
        changed.release()
        if watch.pressure.level is Level.NORMAL:
            over.set()

    watch = MemoryWatch(on_change=on_change, trim=trimmed.release, read=read, tick_s=0.001)
    watch.start()
    try:
        assert over.wait(10.0)
    finally:
        watch.close()
    assert changed.acquire(blocking=False)
    assert changed.acquire(blocking=False)
    assert not changed.acquire(blocking=False)
    assert trimmed.acquire(blocking=False)
    assert watch.num_trims == 1
    assert watch.pressure.is_admitting


def test_a_reading_that_fails_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    failed, read_again = threading.Event(), threading.Event()

    def read() -> Reading:
        if not failed.is_set():
            failed.set()
            raise OSError("no such file")
        read_again.set()
        return Reading(100 * GB, 50 * GB)

    watch = MemoryWatch(on_change=lambda: None, trim=lambda: None, read=read, tick_s=0.001)
    watch.start()
    try:
        assert read_again.wait(10.0)
    finally:
        watch.close()
    assert "memory could not be read" in caplog.text
