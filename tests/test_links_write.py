"""Measured links in a cluster file: what changes, what stays, and which files are left alone."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest

from cluster.config import load_config
from cluster.errors import UserError
from cluster.links_write import write_links

LINK = {"between": ["a", "b"], "latency_ms": 0.3, "bandwidth_gbit_s": 9.4}


def document(**values: Any) -> dict[str, Any]:
    nodes = [{"name": name, "host": f"{name}.local"} for name in "abc"]
    return {"model": "x/y", "nodes": nodes, "context": 4096, **values}


def test_only_the_links_change(tmp_path: Path) -> None:
    path = tmp_path / "cluster.json"
    kept = {"between": ["b", "c"], "latency_ms": 5}
    before = document(links=[{"between": ["b", "a"], "latency_ms": 99}, kept], stall_timeout_s=60)
    path.write_text(json.dumps(before, indent=4))
    path.chmod(0o640)
    write_links(path, [LINK])
    after = json.loads(path.read_text())
    assert after.pop("links") == [kept, LINK]
    del before["links"]
    assert after == before
    assert list(after) == list(before)
    assert path.read_text().startswith('{\n    "model"')
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert load_config(path).links[1].bandwidth_gbit_s == 9.4
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_to_the_file_stays_one(tmp_path: Path) -> None:
    path, name = tmp_path / "real.json", tmp_path / "cluster.json"
    path.write_text(json.dumps(document()))
    name.symlink_to(path)
    write_links(name, [LINK])
    assert name.is_symlink()
    assert json.loads(path.read_text())["links"] == [LINK]


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("cluster.yaml", "model: x/y", "is YAML, whose comments would be lost: copy the links of"),
        ("hosts.json", '[{"ssh": "a"}]', "is of an older form, which has no links"),
        ("old.json", '{"model_name": "x", "devices": []}', "is of an older form, which has no links"),
        ("broken.json", "{", "cannot be read as JSON"),
    ],
)
def test_files_that_are_left_alone(tmp_path: Path, name: str, text: str, sentence: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(UserError, match=sentence) as caught:
        write_links(path, [LINK])
    assert caught.value.exit_code == 3
    assert path.read_text() == text


def test_a_file_that_cannot_be_replaced_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "cluster.json"
    path.write_text(json.dumps(document()))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match="cannot be written: No space left on device"):
        write_links(path, [LINK])
    assert json.loads(path.read_text()) == document()
    assert list(tmp_path.iterdir()) == [path]


def test_a_read_only_file_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "cluster.json"
    path.write_text('{"model": "x/y", "nodes": []}')
    path.chmod(0o444)
    with pytest.raises(UserError, match=r"cluster\.json is read-only: make it writable with chmod u\+w"):
        write_links(path, [LINK])
    assert "links" not in path.read_text()
