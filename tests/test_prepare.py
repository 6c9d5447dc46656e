"""What a hub may hold instead of a model, each refused with a sentence."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from shard_loader.hub import ModelPlace, find_model
from shard_loader.hub_source import HubSource
from shard_loader.sources import HubError
from tests.hub_server import HubServer
from tests.tiny_models import write_checkpoint

MODEL = "tests/odd"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    write_checkpoint("llama", tmp_path / "served", num_layers=3)
    with HubServer({MODEL: tmp_path / "served"}) as server:
        yield server


def find(directory: Path, hub: HubServer) -> ModelPlace:
    source = HubSource(endpoint=hub.url)
    return find_model(MODEL, directory, cache_dir=directory, root=directory / "macrame", hub=source)


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        (
            "config.json",
            None,
            r"tests/odd has no config\.json on the hub: it is no model that mlx-lm can read",
        ),
        ("model.safetensors", None, r"tests/odd has no model\*\.safetensors on the hub: convert it"),
        ("model.safetensors", b"", r"model\.safetensors of tests/odd has 0 bytes and is no safetensors file"),
        ("model.safetensors", b"<html>" * 9, r"is no safetensors file: its header would have \d+ bytes"),
        (
            "model.safetensors.index.json",
            b"[]",
            r"model\.safetensors\.index\.json of tests/odd cannot be read: ",
        ),
    ],
)
def test_what_is_no_model_is_refused(
    file: str, content: bytes | None, sentence: str, tmp_path: Path, hub: HubServer
) -> None:
    path = tmp_path / "served" / file
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    with pytest.raises(HubError, match=sentence):
        find(tmp_path, hub)


def test_a_small_file_of_other_bytes_is_refused(tmp_path: Path, hub: HubServer) -> None:
    repo = hub.repos[MODEL]
    config = tmp_path / "served" / "config.json"
    repo.etag(config)  # announced from now on
    config.write_bytes(config.read_bytes().replace(b"llama", b"lambs"))
    with pytest.raises(
        HubError, match=r"config\.json of tests/odd came with other bytes than were announced"
    ):
        find(tmp_path, hub)


def test_an_interrupted_preparation_is_not_taken_for_one(tmp_path: Path, hub: HubServer) -> None:
    place = find(tmp_path, hub)
    (place.folder / ".macrame" / "manifest.json").unlink()  # it comes last
    before = len(hub.log)
    assert find(tmp_path, hub) == place
    assert len(hub.log) == before + 1, "the commit is asked for; what is here is not fetched again"
    (place.folder / "tokenizer.json").unlink()
    assert find(tmp_path, hub) == place
    assert (place.folder / "tokenizer.json").is_file()


def test_names_that_leave_the_folder_are_no_files(tmp_path: Path, hub: HubServer) -> None:
    served = tmp_path / "served"
    (served / "..evil.json").write_text("{}")
    (served / ".hidden.json").write_text("{}")
    (served / "model.py").write_text("raise SystemExit")
    place = find(tmp_path, hub)
    names = {path.name for path in place.folder.iterdir()}
    assert names == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        ".macrame",
    }
