"""What `macrame up` remembers, and that two of them do not meet."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from pathlib import Path

import pytest

from cluster.config import load_config
from cluster.errors import UserError
from deploy.up_files import hand_out
from deploy.up_record import (
    Placed,
    Record,
    alone,
    cluster_folder,
    cluster_name,
    read_record,
    running_up,
    write_record,
)
from tests.disks import small_disk

RECORD = Record(
    (Placed(0, "a"), Placed(1, "b", "me@b", {"root": "~", "python": "p", "version": "v", "system": "s"})),
    ("-F", "x"),
)


def test_a_record_is_read_as_it_was_written_and_is_private(tmp_path: Path) -> None:
    folder = tmp_path / "clusters" / "c"
    write_record(folder, RECORD)
    assert read_record(folder) == RECORD
    assert (folder / "up.json").stat().st_mode & 0o777 == 0o600
    assert folder.stat().st_mode & 0o077 == 0


def test_the_copy_that_nodes_get_has_the_digest_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "models" / "poet").mkdir(parents=True)
    content = {
        "model": "models",
        "nodes": [{"host": "127.0.0.1"}],
        "load": {"adapters": [{"name": "poet", "path": "models/poet"}]},
    }
    path, copy = tmp_path / "cluster.json", tmp_path / "rank-0" / "cluster.json"
    copy.parent.mkdir()
    path.write_text(json.dumps(content))
    (tmp_path / "models" / "config.json").write_text("{}")
    copy.write_bytes(hand_out(path, None).document)
    assert json.loads(copy.read_text())["model"] == str(tmp_path / "models")
    assert load_config(copy).digest == load_config(path).digest, "else doctor says that nodes run another one"


def test_a_record_of_no_nodes_is_none(tmp_path: Path) -> None:
    write_record(tmp_path, RECORD)
    write_record(tmp_path, Record())
    assert list(tmp_path.iterdir()) == []
    assert read_record(tmp_path) == Record()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"nodes": [{"rank": 0, "no": 1}], "ssh_options": []}'])
def test_a_record_that_cannot_be_read_is_empty(tmp_path: Path, text: str) -> None:
    (tmp_path / "up.json").write_text(text)
    assert read_record(tmp_path) == Record()


def test_a_config_has_one_name_however_it_is_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "my ring.json"
    path.write_text("{}")
    (tmp_path / "link.json").symlink_to(path)
    monkeypatch.chdir(tmp_path)
    assert cluster_name(path) == cluster_name(Path("my ring.json")) == cluster_name(tmp_path / "link.json")
    assert cluster_name(path) != cluster_name(tmp_path / "other.json")
    assert cluster_folder(path).parent.name == "clusters"


def test_one_that_is_just_ending_is_waited_for(tmp_path: Path) -> None:
    config, began, ends = tmp_path / "cluster.json", threading.Event(), threading.Event()

    def other() -> None:
        with alone(tmp_path, config):
            began.set()
            ends.wait(5.0)

    thread = threading.Thread(target=other)
    thread.start()
    assert began.wait(5.0)
    threading.Timer(0.1, ends.set).start()
    with alone(tmp_path, config, patience_s=5.0):
        assert ends.is_set()
    thread.join()


def test_a_second_up_of_a_config_is_refused(tmp_path: Path) -> None:
    config = tmp_path / "cluster.json"
    assert running_up(tmp_path) is None
    with alone(tmp_path, config):
        assert running_up(tmp_path) == os.getpid()
        with pytest.raises(UserError) as caught, alone(tmp_path, config):
            pass
        assert str(caught.value) == (
            f"macrame up of {config} runs already, as process {os.getpid()}: press Ctrl-C there, or run "
            f"macrame down --config {config}"
        )
    assert running_up(tmp_path) is None
    with alone(tmp_path, config):
        pass


def test_a_folder_that_cannot_be_written_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text(json.dumps({}))
    with pytest.raises(UserError, match="cannot be written"), alone(tmp_path / "file", tmp_path / "c.json"):
        pass


def test_a_full_disk_keeps_up_from_starting_and_not_down_from_stopping(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    with small_disk(disk):
        with contextlib.suppress(OSError), (disk / "rest").open("wb", buffering=0) as rest:
            while rest.write(b"x" * 4096):
                pass
        refusal = "up.lock cannot be written: No space left on device"
        with pytest.raises(UserError, match=refusal), alone(disk / "c", tmp_path / "c.json"):
            pass
        with alone(disk / "c", tmp_path / "c.json", is_named=False):
            assert running_up(disk / "c") is None
