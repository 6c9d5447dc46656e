"""Reading rates of real files."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from cluster import profile_disk
from cluster.profile_disk import CHUNK_BYTES, DiskRate, disk_rate, file_rate


def test_a_file_of_its_own_is_read_and_removed(tmp_path: Path) -> None:
    found = disk_rate(tmp_path / "new", 2 * CHUNK_BYTES)
    assert isinstance(found, DiskRate)
    assert found.num_bytes == 2 * CHUNK_BYTES
    assert found.bytes_ms > 0
    assert found.how in {"direct", "dropped", "cached"}
    assert list((tmp_path / "new").iterdir()) == []


def test_a_file_system_without_direct_reads_says_how_it_was_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "f"
    path.write_bytes(bytes(CHUNK_BYTES + 5))
    real = os.open

    def refusing(name: Any, flags: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(name, flags)

    monkeypatch.setattr(os, "open", refusing)
    assert file_rate(path).how == "dropped"
    monkeypatch.delattr(os, "posix_fadvise")
    found = file_rate(path)
    assert (found.how, found.num_bytes) == ("cached", CHUNK_BYTES + 5)


def test_macos_reads_past_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "f"
    path.write_bytes(bytes(10))
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(profile_disk.sys, "platform", "darwin")
    monkeypatch.setattr("fcntl.fcntl", lambda fd, key, value: asked.append((key, value)))
    assert file_rate(path).how == "direct"
    assert asked == [(48, 1)]


def test_reading_stops_in_time(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(bytes(3 * CHUNK_BYTES))
    assert file_rate(path, max_s=0.0).num_bytes == CHUNK_BYTES


def test_what_cannot_be_measured_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    found = disk_rate(tmp_path / "file" / "below", 1)
    assert isinstance(found, str)
    assert "cannot be used: Not a directory" in found
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr(profile_disk.shutil, "disk_usage", lambda _: usage)
    assert disk_rate(tmp_path, 100) == f"the disk of {tmp_path} is nearly full"
    (tmp_path / "empty").write_bytes(b"")
    with pytest.raises(OSError, match="the file is empty"):
        file_rate(tmp_path / "empty")
