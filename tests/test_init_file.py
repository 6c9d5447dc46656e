"""From machines to the text of a cluster file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from cluster.config import load_config
from cluster.errors import UserError
from deploy.init_file import as_text, check, document, model_of, next_commands, placed, refuse_existing, write
from tests.services import machine

OWN = machine(destination=None, host="127.0.0.1", name="mini1")
AWAY = machine(seen_us_as="192.168.1.20")


def test_this_machine_is_the_head_and_has_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "box")
    here, there = placed([AWAY, OWN])
    assert (here.name, here.host) == ("mini1", "192.168.1.20")
    assert there == AWAY
    assert placed([OWN]) == [OWN]
    assert placed([AWAY]) == [AWAY]


def test_names_are_told_apart() -> None:
    names = [one.name for one in placed([machine(name=name) for name in ("a", "a", "a-2", "a")])]
    assert names == ["a", "a-2", "a-2-2", "a-3"]


@pytest.mark.parametrize("name", ["cluster.json", "cluster.yaml"])
def test_the_file_is_what_a_node_reads(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    machines = placed([AWAY, machine(name="mini3"), machine(name="linux", host="10.0.0.9", gpu_cores=None)])
    text = as_text(path, document("org/name", machines, 8081))
    check(path, text)
    assert not path.exists()
    write(path, text)
    config = load_config(path)
    assert [(node.name, node.address, node.gpu_cores) for node in config.nodes] == [
        ("mini2", "mini2.local:50051", 10),
        ("mini3", "mini2.local:50052", 10),
        ("linux", "10.0.0.9:50051", None),
    ]
    assert config.nodes[0].memory_gb == 17.17
    assert (config.model, config.api.port) == ("org/name", 8081)


def test_a_person_can_read_it(tmp_path: Path) -> None:
    text = as_text(tmp_path / "cluster.json", document("org/name", [AWAY], 8080))
    assert text == (
        '{\n  "model": "org/name",\n  "nodes": [\n'
        '    {"name": "mini2", "host": "mini2.local", "memory_gb": 17.17, '
        '"chip": "Apple M4", "gpu_cores": 10}\n'
        "  ]\n}\n"
    )
    assert yaml.safe_load(as_text(Path("c.yml"), json.loads(text))) == json.loads(text)


def test_what_could_not_be_read_is_refused(tmp_path: Path) -> None:
    text = as_text(tmp_path / "cluster.json", document("org/name", [machine(host="a b")], 8080))
    with pytest.raises(UserError, match="must be a bare host name or address"):
        check(tmp_path / "cluster.json", text)


def test_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own").mkdir()
    assert model_of(" org/name ") == "org/name"
    assert model_of("own") == str(tmp_path / "own")
    with pytest.raises(UserError, match="which model\\?"):
        model_of("  ")
    for text in ("./none", "none", "a/b/c"):
        with pytest.raises(UserError, match=f"{text} is neither a folder here nor a Hugging Face id"):
            model_of(text)


def test_what_to_type_next() -> None:
    path = Path("my cluster.json")
    assert next_commands(path, [OWN], Path("f")) == [
        "plan-dry-run --config 'my cluster.json'",
        "macrame up --config 'my cluster.json'",
    ]
    machines = [OWN, AWAY, machine(name="mini3", destination="alice@mini3.local", host="mini3.local")]
    assert next_commands(Path("c.json"), machines, Path("f"))[1] == (
        "macrame up --config c.json --ssh --ssh-to mini3=alice@mini3.local --ssh-config f"
    )


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "cluster.json"
    refuse_existing(path, is_forced=False)
    path.touch()
    with pytest.raises(
        UserError, match="is there already: --force writes over it, --output FILE writes another"
    ):
        refuse_existing(path, is_forced=False)
    refuse_existing(path, is_forced=True)
    with pytest.raises(UserError, match=f"the folder {tmp_path}/none does not exist: make it first"):
        refuse_existing(tmp_path / "none" / "c.json", is_forced=True)
    with pytest.raises(UserError, match="cannot be written"):
        write(tmp_path / "none" / "c.json", "{}")
