from __future__ import annotations

import json
from pathlib import Path

import pytest

from planner.digests import model_digest
from planner.headers import INDEX_NAME, ModelFilesError, read_headers
from planner.missing import known_headers, missing_tensors
from tests.tiny_models import write_checkpoint


@pytest.mark.parametrize(
    ("arch", "which"),
    [
        *((arch, -1) for arch in ("llama", "qwen3", "qwen3_moe", "gpt_oss", "deepseek_v3", "gemma3_text")),
        *((arch, 0) for arch in ("llama", "qwen3_moe", "gpt_oss")),
    ],
)
def test_what_a_lost_file_held_is_known_from_its_siblings(arch: str, which: int, tmp_path: Path) -> None:
    folder = write_checkpoint(arch, tmp_path, num_layers=7, max_shard_bytes=300_000)
    whole, digest = read_headers(folder), model_digest(folder)
    lost = sorted(folder.glob("*.safetensors"))[which]
    lost.unlink()
    with pytest.raises(ModelFilesError, match=f"{lost.name} is missing: {INDEX_NAME} names it"):
        read_headers(folder)
    known = known_headers(folder)
    assert {n: (h.dtype, h.shape, h.file) for n, h in known.items()} == {
        n: (h.dtype, h.shape, h.file) for n, h in whole.items()
    }
    assert model_digest(folder) == digest
    assert missing_tensors(folder).keys() == {n for n, h in whole.items() if h.file == lost.name}


def test_the_embedding_of_a_tied_model_has_no_sibling(tmp_path: Path) -> None:
    folder = write_checkpoint("qwen3", tmp_path, num_layers=3, max_shard_bytes=300_000)
    min(folder.glob("*.safetensors")).unlink()
    with pytest.raises(ModelFilesError, match=r"nothing else tells the shape of its model\.embed_tokens\."):
        known_headers(folder)


def test_a_tensor_without_a_sibling_is_refused(tmp_path: Path) -> None:
    folder = write_checkpoint("llama", tmp_path, num_layers=3, max_shard_bytes=300_000)
    index = json.loads((folder / INDEX_NAME).read_text())
    index["weight_map"]["model.strange.weight"] = "model-00009-of-00009.safetensors"
    (folder / INDEX_NAME).write_text(json.dumps(index))
    sentence = r"00009.safetensors is missing, and nothing else tells the shape of its model\.strange\.weight"
    with pytest.raises(ModelFilesError, match=sentence):
        known_headers(folder)


def test_when_all_files_are_missing_the_first_is_named(tmp_path: Path) -> None:
    folder = write_checkpoint("llama", tmp_path, num_layers=3, max_shard_bytes=300_000)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(ModelFilesError, match=r"model-00001-of-.* is missing"):
        known_headers(folder)
