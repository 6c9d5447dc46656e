from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from planner.headers import INDEX_NAME, ModelFilesError, read_config, read_headers
from tests.fake_models import llama_config, llama_tensors, write_file, write_model

SECOND = "model-00002-of-00002.safetensors"


def two_files(folder: Path) -> Path:
    tensors = list(llama_tensors().items())
    return write_model(folder, llama_config(), dict(tensors[:20]), dict(tensors[20:]))


def raw_file(folder: Path, header: bytes, *, size: int | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_bytes(
        struct.pack("<Q", len(header) if size is None else size) + header + bytes(8)
    )
    return folder


def entry(**overrides: object) -> bytes:
    return json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | overrides}).encode()


def test_headers_say_where_each_tensor_lies(tmp_path: Path) -> None:
    folder = write_model(tmp_path, llama_config(), {"a": ("BF16", (3, 5)), "b": ("F32", ())})
    headers = read_headers(folder)
    data_start = (folder / "model.safetensors").stat().st_size - 34
    assert list(headers) == ["a", "b"]
    assert (headers["a"].dtype, headers["a"].shape, headers["a"].nbytes) == ("BF16", (3, 5), 30)
    assert (headers["a"].start, headers["b"].start) == (data_start, data_start + 30)
    assert headers["b"].file == "model.safetensors"


def test_all_files_of_the_index_are_read(tmp_path: Path) -> None:
    headers = read_headers(two_files(tmp_path))
    assert set(headers) == set(llama_tensors())
    assert {header.file for header in headers.values()} == {"model-00001-of-00002.safetensors", SECOND}


def test_a_file_that_the_index_does_not_name_is_not_read(tmp_path: Path) -> None:
    folder = two_files(tmp_path)
    write_file(folder / "model-old.safetensors", {"stale": ("F32", (4,))})
    assert "stale" not in read_headers(folder)


def test_a_missing_file_of_the_index_is_named(tmp_path: Path) -> None:
    folder = two_files(tmp_path)
    (folder / SECOND).unlink()
    with pytest.raises(ModelFilesError, match=rf"{SECOND} is missing: {INDEX_NAME} names it"):
        read_headers(folder)


@pytest.mark.parametrize("cut", [1, 20_000])
def test_a_truncated_file_is_named(tmp_path: Path, cut: int) -> None:
    folder = two_files(tmp_path)
    path = folder / SECOND
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - cut)
    with pytest.raises(ModelFilesError, match=rf"{SECOND} is truncated: .* download it again"):
        read_headers(folder)


@pytest.mark.parametrize("size", [0, 5, 30])
def test_a_file_that_ends_in_its_header_is_truncated(tmp_path: Path, size: int) -> None:
    folder = write_model(tmp_path, llama_config(), llama_tensors())
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(size)
    with pytest.raises(ModelFilesError, match=r"model\.safetensors is truncated"):
        read_headers(folder)


def test_a_tensor_that_its_file_lacks_is_named(tmp_path: Path) -> None:
    folder = two_files(tmp_path)
    index = json.loads((folder / INDEX_NAME).read_text())
    index["weight_map"]["model.extra"] = SECOND
    (folder / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(
        ModelFilesError, match=rf"says that model.extra is in {SECOND}, but .* does not hold it"
    ):
        read_headers(folder)


def test_a_tensor_in_two_files_is_an_error(tmp_path: Path) -> None:
    folder = write_model(tmp_path, llama_config(), {"w": ("F32", (1,))})
    write_file(folder / "model-b.safetensors", {"w": ("F32", (1,))})
    with pytest.raises(ModelFilesError, match="both hold the tensor w"):
        read_headers(folder)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"\x00\xff{", "its header is not JSON"),
        (b"[1, 2]", "its header is not a JSON object"),
        (b'{"w": 3}', "malformed header entry for w"),
        (entry(dtype="F12"), "stores w as 'F12', which is no known dtype"),
        (entry(dtype=["F32"]), "no known dtype"),
        (entry(shape=[-2]), "malformed header entry for w"),
        (entry(shape="2"), "malformed header entry for w"),
        (entry(shape=[True, 2]), "malformed header entry for w"),
        (entry(data_offsets=[8, 0]), "malformed header entry for w"),
        (entry(data_offsets=[0]), "malformed header entry for w"),
        (entry(shape=[3]), r"gives w 8 bytes, but F32 \[3\] needs another number"),
    ],
)
def test_a_malformed_header_is_an_error(tmp_path: Path, header: bytes, message: str) -> None:
    with pytest.raises(ModelFilesError, match=f"model.safetensors .*{message}"):
        read_headers(raw_file(tmp_path, header))


def test_a_huge_header_is_not_read(tmp_path: Path) -> None:
    with pytest.raises(ModelFilesError, match="its header would have 1152921504606846976 bytes"):
        read_headers(raw_file(tmp_path, b"{}", size=1 << 60))


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", 7])
def test_an_index_may_not_leave_the_folder(tmp_path: Path, name: object) -> None:
    folder = write_model(tmp_path / "model", llama_config(), llama_tensors())
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(ModelFilesError, match="which is no file of the model folder"):
        read_headers(folder)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": {}}'])
def test_a_broken_index_is_named(tmp_path: Path, text: str) -> None:
    folder = write_model(tmp_path, llama_config(), llama_tensors())
    (folder / INDEX_NAME).write_text(text)
    with pytest.raises(ModelFilesError, match=INDEX_NAME):
        read_headers(folder)


def test_folders_without_a_model_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelFilesError, match=r"has no model\*\.safetensors"):
        read_headers(tmp_path)
    with pytest.raises(ModelFilesError, match="is not a folder"):
        read_headers(tmp_path / "nowhere")
    with pytest.raises(ModelFilesError, match=r"config\.json is missing"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ModelFilesError, match=r"config\.json is not a JSON object"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{'a': 1}")
    with pytest.raises(ModelFilesError, match=r"config\.json is not valid JSON"):
        read_config(tmp_path)
