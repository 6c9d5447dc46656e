"""What a stage reads, and that nothing else is needed: shards of sparse folders equal those of whole ones."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest
from huggingface_hub import constants

from planner.headers import read_headers
from shard_loader import reads
from shard_loader.fetch import fetch_tensors
from shard_loader.hub import find_model
from shard_loader.hub_source import HubSource
from shard_loader.layout import ghost
from shard_loader.survey import own_tensors
from shard_loader.weights import WeightsError, load_shard
from tests.hub_server import HubServer
from tests.tiny_models import write_checkpoint

STAGES = [(0, 1), (1, 4), (4, 5)]
MODELS = {
    "llama": {},
    "qwen3": {},
    "qwen3_moe": {"unstack_experts": True},
    "gemma3_text": {},
    "gpt_oss": {},
    "deepseek_v3": {},
    "mamba2": {},
    "quantised": {"quantize": {"bits": 4, "group_size": 32}},
}


def write(name: str, folder: Path) -> Path:
    arch = "qwen3" if name == "quantised" else name
    return write_checkpoint(arch, folder, num_layers=5, max_shard_bytes=200_000, **MODELS[name])  # type: ignore[arg-type]


@pytest.mark.parametrize("name", MODELS)
def test_a_shard_of_fetched_bytes_is_the_shard(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    folder = write(name, tmp_path / "whole")
    everything: set[str] = set()
    with HubServer({"tests/m": folder}) as server:
        for start, stop in STAGES:
            hub = HubSource(endpoint=server.url)
            root = tmp_path / f"{start}"
            place = find_model("tests/m", root, cache_dir=root, root=root, hub=hub)
            assert place.store is not None
            own = own_tensors(place.folder, start, stop)
            assert own == own_tensors(folder, start, stop)
            fetch_tensors(place.store, own, [hub])
            here, there = (load_shard(f, start, stop).ownership.groups for f in (place.folder, folder))
            for mine, theirs in zip(here, there, strict=True):
                assert mine.keys() == theirs.keys()
                assert all(mx.array_equal(mine[n], theirs[n], equal_nan=True) for n in mine)
            everything |= own
            with pytest.raises(WeightsError, match="has not been fetched, and layers 0:5 read"):
                load_shard(place.folder, 0, 5)
    assert everything == read_headers(folder).keys()


def test_many_tensors_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write("qwen3_moe", tmp_path)
    found = [own_tensors(folder, *layers) for layers in STAGES]
    exports = []
    export = reads._export
    monkeypatch.setattr(reads, "_export", lambda *args: exports.append(1) or export(*args))
    assert [own_tensors(folder, *layers) for layers in STAGES] == found
    assert len(exports) == 5, "one look at each layer is enough"
    monkeypatch.setattr(reads, "MAX_NAMES", 7)
    assert [own_tensors(folder, *layers) for layers in STAGES] == found


def test_an_array_that_only_python_takes_for_another_is_read(tmp_path: Path) -> None:
    """rwkv7's sanitize reshapes some tensors to the shape that they have already."""
    mx.save_safetensors(str(tmp_path / "x.safetensors"), {name: mx.ones((2, 3)) for name in "abc"})
    tensors = mx.load(str(tmp_path / "x.safetensors"))
    same = tensors["a"].reshape(2, 3)
    assert same is not tensors["a"]
    groups = [{"layer": same}, {"sum": tensors["b"] + tensors["b"]}]
    assert reads.tensors_read(groups, tensors) == {"a", "b"}
    ghosts = {"a": tensors["a"], "c": ghost(tensors["c"])}
    assert reads.tensors_read([{"c": ghosts["c"].reshape(2, 3)}], {"c": ghosts["c"]}, are_ghosts=True) == {
        "c"
    }
