from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from shard_loader import hub
from shard_loader.hub import HubError, resolve_model

HUB_ID = "some-org/Some-Model-8bit"


def make_model(folder: Path, files: dict[str, Any] | None = None) -> Path:
    folder.mkdir(parents=True)
    for name, content in (files or {"config.json": {}, "model.safetensors": {}}).items():
        (folder / name).write_text(json.dumps(content))
    return folder


def make_cached(cache: Path, files: dict[str, Any]) -> Path:
    """A snapshot as the Hugging Face cache keeps it."""
    repo = cache / f"models--{HUB_ID.replace('/', '--')}"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    return make_model(repo / "snapshots" / ("0" * 40), files)


def test_a_relative_path_is_looked_up_beside_the_config_then_in_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, work = tmp_path / "base", tmp_path / "work"
    there = make_model(work / "models" / "m")
    monkeypatch.chdir(work)
    assert resolve_model("models/m", base) == there
    here = make_model(base / "models" / "m")
    assert resolve_model("models/m", base) == here
    assert resolve_model("./models/m", base) == here
    assert resolve_model(str(there), base) == there


def test_the_home_folder_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert (
        resolve_model("~/m", Path("/")) == make_model(tmp_path / "m") if (tmp_path / "m").exists() else True
    )
    folder = make_model(tmp_path / "n")
    assert resolve_model("~/n", tmp_path / "base") == folder


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    make_model(tmp_path / "m", {"notes.json": {}})
    with pytest.raises(
        HubError, match=r"/m has no config\.json: a model folder holds config\.json and safetensors"
    ):
        resolve_model("m", tmp_path)


@pytest.mark.parametrize("model", ["", "  "])
def test_an_empty_model_is_refused(model: str, tmp_path: Path) -> None:
    with pytest.raises(HubError, match="the model is empty: name a folder or a hub id"):
        resolve_model(model, tmp_path)


@pytest.mark.parametrize(
    "model", ["/no/such/folder", "./nothing", "../x", "a/b/c", "a b", "org/../m", "~/nothing"]
)
def test_what_is_neither_a_folder_nor_an_id_is_refused(model: str, tmp_path: Path) -> None:
    with pytest.raises(HubError, match="there is no model folder .* is no hub id"):
        resolve_model(model, tmp_path)


def test_a_cached_snapshot_is_used_without_a_network(tmp_path: Path) -> None:
    snapshot = make_cached(tmp_path, {"config.json": {}, "model.safetensors": {}})
    assert resolve_model(HUB_ID, tmp_path / "base", cache_dir=tmp_path) == snapshot


INDEX = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}


@pytest.mark.parametrize(
    "files",
    [
        {"config.json": {}},
        {"model.safetensors": {}},
        {"config.json": {}, "model.safetensors.index.json": INDEX, "model-00001-of-00002.safetensors": {}},
        {"config.json": {}, "model.safetensors.index.json": [], "model-00001-of-00002.safetensors": {}},
    ],
    ids=["no weights", "no config", "a file of the index is missing", "broken index"],
)
def test_an_incomplete_snapshot_is_downloaded_and_offline_says_so(
    files: dict[str, Any], tmp_path: Path
) -> None:
    make_cached(tmp_path, files)
    with pytest.raises(
        HubError, match=f"{HUB_ID} is not complete in the local cache .* `hf download {HUB_ID}`"
    ):
        resolve_model(HUB_ID, tmp_path / "base", cache_dir=tmp_path)


def test_a_download_is_asked_for_once_and_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def snapshot_download(repo: str, **options: Any) -> str:
        asked.append((repo, options))
        if options.get("local_files_only"):
            raise hub.LocalEntryNotFoundError("not here")
        return str(tmp_path / "downloaded")

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    assert resolve_model(HUB_ID, tmp_path) == tmp_path / "downloaded"
    assert [repo for repo, _ in asked] == [HUB_ID, HUB_ID]
    assert "model*.safetensors" in asked[1][1]["allow_patterns"]
    assert "*.py" not in asked[1][1]["allow_patterns"]


def failure(kind: Callable[..., Exception], text: str) -> Exception:
    request = httpx2.Request("GET", "https://hub.invalid")
    return kind(text, response=httpx2.Response(404, request=request))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            failure(RepositoryNotFoundError, "404"),
            "is neither a folder here nor a model on the Hugging Face hub",
        ),
        (failure(GatedRepoError, "403"), "asks you to accept its licence: .* then run `hf auth login`"),
        (OSError(28, "No space left on device"), "cannot be downloaded: .*No space left on device"),
        (ValueError("bad\nsecond line"), "cannot be downloaded: bad$"),
    ],
    ids=["unknown", "gated", "full disk", "other"],
)
def test_a_failed_download_is_one_sentence(
    error: Exception, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def snapshot_download(repo: str, **options: Any) -> str:
        raise hub.LocalEntryNotFoundError("not here") if options.get("local_files_only") else error

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    with pytest.raises(HubError, match=f"{HUB_ID} {message}") as caught:
        resolve_model(HUB_ID, tmp_path)
    assert "\n" not in str(caught.value)
