"""What a process says that it used, against the operating system's own word."""

from __future__ import annotations

import time

import psutil
import pytest

from cluster import usage
from cluster.usage import Usage, peak_rss_bytes


def test_the_peak_is_at_least_the_present_and_grows() -> None:
    before = peak_rss_bytes()
    assert before >= psutil.Process().memory_info().rss * 0.95
    block = bytearray(64 << 20)
    block[::4096] = b"x" * len(block[::4096])
    after = peak_rss_bytes()
    assert after >= psutil.Process().memory_info().rss * 0.95
    del block
    assert peak_rss_bytes() >= 0.98 * after  # what is freed stays counted; the kernel batches its sums


def test_it_is_read_at_most_once_an_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    monkeypatch.setattr(usage, "_rss_bytes", lambda: reads.append(1) or (7, len(reads)))
    used = Usage()
    assert [used.peak_rss_bytes for _ in range(5)] == [1] * 5
    assert used.rss_bytes == 7
    monkeypatch.setattr(usage, "READ_AGAIN_S", 0.0)
    assert used.peak_rss_bytes == 2


def test_cpu_time_counts_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usage, "READ_AGAIN_S", 0.0)
    used = Usage()
    before = used.cpu_s
    until = time.process_time() + 0.2
    while time.process_time() < until:
        pass
    assert 0.15 < used.cpu_s - before < 2.0
