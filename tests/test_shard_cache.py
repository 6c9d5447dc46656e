"""The second load equals the first and makes nothing; what is broken or cut short is made again."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from planner.load_options import LoadOptions, Quantization
from shard_loader import cache_io, making, shard_cache
from shard_loader.shard import Shard
from shard_loader.shard_cache import MANIFEST, CacheSettings, default_folder, entry_key
from shard_loader.weights import load_shard
from tests.tiny_models import write_checkpoint

NUM_LAYERS = 3
FOUR_BITS = LoadOptions(Quantization.of("affine"))
OTHER = LoadOptions(Quantization.of("affine", 8))


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny tensors count."""
    monkeypatch.setattr(making, "SMALL_BYTES", 1000)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_checkpoint("qwen3_moe", tmp_path / "model", num_layers=NUM_LAYERS, unstack_experts=True)


@pytest.fixture
def cache(tmp_path: Path) -> CacheSettings:
    return CacheSettings(tmp_path / "cache")


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A number for each parameter that is made and not found."""
    calls: list[int] = []
    make = making.Making.make

    def counted(self: making.Making) -> None:
        calls.append(len(self.outputs))
        make(self)

    monkeypatch.setattr(making.Making, "make", counted)
    return calls


def arrays(shard: Shard) -> dict[str, mx.array]:
    return {name: array for group in shard.ownership.groups for name, array in group.items()}


def same(one: Shard, other: Shard) -> bool:
    a, b = arrays(one), arrays(other)
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and mx.array_equal(a[n], b[n]).item() for n in a
    )


def entries(cache: CacheSettings) -> list[Path]:
    return sorted(path for path in cache.folder.iterdir() if (path / MANIFEST).exists())


@pytest.mark.parametrize("options", [LoadOptions(), FOUR_BITS], ids=["stacked", "quantised"])
def test_the_second_load_makes_nothing_and_is_the_same(
    options: LoadOptions, model: Path, cache: CacheSettings, made: list[int]
) -> None:
    cache = CacheSettings(cache.folder, True)
    plain = load_shard(model, 1, 3, options=options)
    num_made = len(made)
    first = load_shard(model, 1, 3, options=options, cache=cache)
    assert len(made) == 2 * num_made > 0
    seen: list[tuple[int, int]] = []
    second = load_shard(
        model, 1, 3, options=options, cache=cache, on_progress=lambda *done: seen.append(done)
    )
    assert len(made) == 2 * num_made
    assert same(plain, first)
    assert same(plain, second)
    assert seen[-1] == (second.footprint.total_bytes,) * 2
    assert [path.name for path in cache.folder.iterdir()] == [entry_key(model, (1, 3), options)]


def test_stacks_are_kept_when_asked_and_raw_tensors_never(model: Path, cache: CacheSettings) -> None:
    load_shard(model, 0, 3, cache=cache)  # stacking reads into place: an entry would save nothing
    assert not cache.folder.exists()
    shard = load_shard(model, 0, 3, cache=CacheSettings(cache.folder, True))
    (entry,) = entries(cache)
    kept = json.loads((entry / MANIFEST).read_text())["sums"]
    assert kept.keys() == {name for name in arrays(shard) if ".switch_mlp." in name}


def test_a_plain_checkpoint_is_not_copied(tmp_path: Path, cache: CacheSettings) -> None:
    model = write_checkpoint("llama", tmp_path / "llama", num_layers=NUM_LAYERS)
    load_shard(model, 0, 2, cache=cache)
    load_shard(model, 0, 2, cache=CacheSettings(cache.folder, True))  # nothing differs from the files
    assert not cache.folder.exists()
    load_shard(model, 0, 2, options=FOUR_BITS, cache=CacheSettings(cache.folder, False))
    assert not cache.folder.exists()
    load_shard(model, 0, 2, options=FOUR_BITS, cache=cache)
    assert len(entries(cache)) == 1


def test_the_key_tells_everything_apart(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {
        entry_key(model, layers, options) for layers in ((0, 1), (0, 2)) for options in (FOUR_BITS, OTHER)
    }
    config = model / "config.json"
    config.write_text(config.read_text() + "\n")
    keys.add(entry_key(model, (0, 1), FOUR_BITS))
    os.utime(model / "model.safetensors", ns=(1, 1))
    keys.add(entry_key(model, (0, 1), FOUR_BITS))
    monkeypatch.setattr(shard_cache, "version", lambda name: "0")
    keys.add(entry_key(model, (0, 1), FOUR_BITS))
    assert len(keys) == 7


def test_files_of_the_hubs_cache_are_told_by_their_hash(model: Path, tmp_path: Path) -> None:
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    shutil.move(model / "model.safetensors", blobs / ("ab" * 20))
    (model / "model.safetensors").symlink_to(blobs / ("ab" * 20))
    before = entry_key(model, (0, 1), FOUR_BITS)
    os.utime(blobs / ("ab" * 20), ns=(1, 1))
    assert entry_key(model, (0, 1), FOUR_BITS) == before
    (blobs / ("ab" * 20)).rename(blobs / ("cd" * 20))
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").symlink_to(blobs / ("cd" * 20))
    assert entry_key(model, (0, 1), FOUR_BITS) != before


def test_another_model_of_equal_sizes_and_times_has_another_key(tmp_path: Path) -> None:
    folders = [
        write_checkpoint("llama", tmp_path / name, num_layers=3, seed=i) for i, name in enumerate("ab")
    ]
    for folder in folders:
        os.utime(folder / "model.safetensors", ns=(1, 1))
    assert len({entry_key(folder, (0, 1), FOUR_BITS) for folder in folders}) == 2
    shutil.copytree(folders[1], tmp_path / "blobs")  # no cache of the hub, whatever its name
    before = entry_key(tmp_path / "blobs", (0, 1), FOUR_BITS)
    shutil.copy(folders[0] / "model.safetensors", tmp_path / "blobs")
    assert entry_key(tmp_path / "blobs", (0, 1), FOUR_BITS) != before


def flip(entry: Path) -> None:
    """One bit in the middle of the last tensor."""
    data = entry / "shard.safetensors"
    content = bytearray(data.read_bytes())
    content[-100] ^= 4
    data.write_bytes(content)


def cut(entry: Path) -> None:
    data = entry / "shard.safetensors"
    data.write_bytes(data.read_bytes()[:-1])


def cut_behind_its_back(entry: Path) -> None:
    cut(entry)
    manifest = json.loads((entry / MANIFEST).read_text())
    (entry / MANIFEST).write_text(json.dumps(manifest | {"bytes": manifest["bytes"] - 1}))


def garble(entry: Path) -> None:
    (entry / MANIFEST).write_text("{")


def exchange(entry: Path) -> None:
    """Another shard's data."""
    manifest = json.loads((entry / MANIFEST).read_text())
    mx.save_safetensors(str(entry / "shard.safetensors"), {"x": mx.zeros((3,))})
    size = (entry / "shard.safetensors").stat().st_size
    (entry / MANIFEST).write_text(json.dumps(manifest | {"bytes": size}))


def lose(entry: Path) -> None:
    (entry / MANIFEST).unlink()


@pytest.mark.parametrize("damage", [flip, cut, cut_behind_its_back, garble, exchange, lose])
def test_a_damaged_entry_is_made_again(
    damage: Callable[[Path], object], model: Path, cache: CacheSettings, made: list[int]
) -> None:
    plain = load_shard(model, 0, 2, options=FOUR_BITS)
    load_shard(model, 0, 2, options=FOUR_BITS, cache=cache)
    (entry,) = entries(cache)
    damage(entry)
    made.clear()
    assert same(plain, load_shard(model, 0, 2, options=FOUR_BITS, cache=cache))
    assert made
    made.clear()
    assert same(plain, load_shard(model, 0, 2, options=FOUR_BITS, cache=cache))
    assert not made


KILLED = """
import sys
from pathlib import Path
from planner.load_options import LoadOptions, Quantization
from shard_loader import cache_io
from shard_loader.shard_cache import CacheSettings
from shard_loader.weights import load_shard
import threading
write, num = cache_io.EntryWriter._write, [0]
def slow(self, data):
    write(self, data[: len(data) // 2] if num[0] == 3 else data)
    num[0] += 1
    if num[0] == 4:
        print("in the middle", flush=True)
        threading.Event().wait()
cache_io.EntryWriter._write = slow
load_shard(Path(sys.argv[1]), 0, 2, options=LoadOptions(Quantization.of("affine")),
           cache=CacheSettings(Path(sys.argv[2]), True))
"""


def test_a_write_that_was_killed_is_never_taken_for_complete(
    tmp_path: Path, cache: CacheSettings, made: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(making, "SMALL_BYTES", 1 << 20)
    wide = {"hidden_size": 512, "intermediate_size": 1024}
    model = write_checkpoint("llama", tmp_path / "model", num_layers=NUM_LAYERS, overrides=wide)
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(model), str(cache.folder)], stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "in the middle\n"
        child.send_signal(signal.SIGKILL)
    (left,) = cache.folder.iterdir()
    assert left.name.startswith("tmp-")
    assert (left / "shard.safetensors").stat().st_size > 0
    plain = load_shard(model, 0, 2, options=FOUR_BITS)
    made.clear()
    assert same(plain, load_shard(model, 0, 2, options=FOUR_BITS, cache=cache))
    assert made
    assert [path.name for path in cache.folder.iterdir()] == [entry_key(model, (0, 2), FOUR_BITS)]


RACER = """
import sys
from pathlib import Path
from planner.load_options import LoadOptions, Quantization
from shard_loader.shard_cache import CacheSettings
from shard_loader.weights import load_shard
load_shard(Path(sys.argv[1]), 0, 2, options=LoadOptions(Quantization.of("affine")),
           cache=CacheSettings(Path(sys.argv[2]), True))
"""


def test_two_processes_may_race(model: Path, cache: CacheSettings, made: list[int]) -> None:
    def race(_: int) -> int:
        command = [sys.executable, "-c", RACER, str(model), str(cache.folder)]
        return subprocess.run(command, check=False).returncode

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(race, range(3))) == [0, 0, 0]
    assert len(list(cache.folder.iterdir())) == 1


def test_the_longest_unused_go_first(model: Path, cache: CacheSettings) -> None:
    for stop in (1, 2):
        load_shard(model, 0, stop, options=FOUR_BITS, cache=cache)
    keys = [entry_key(model, (0, stop), FOUR_BITS) for stop in (1, 2)]
    sizes = [(cache.folder / key / "shard.safetensors").stat().st_size for key in keys]
    for age, key in enumerate(keys):
        os.utime(cache.folder / key / MANIFEST, (age, age))
    load_shard(model, 0, 1, options=FOUR_BITS, cache=cache)  # used: now the other one is the oldest
    tight = CacheSettings(cache.folder, None, sum(sizes) + 1)
    load_shard(model, 2, 3, options=FOUR_BITS, cache=tight)
    assert {path.name for path in entries(cache)} == {keys[0], entry_key(model, (2, 3), FOUR_BITS)}


def test_an_entry_beyond_the_bound_is_not_kept(
    model: Path, cache: CacheSettings, caplog: pytest.LogCaptureFixture
) -> None:
    load_shard(model, 0, 2, options=FOUR_BITS, cache=CacheSettings(cache.folder, True, 1000))
    assert "not kept in the cache: it would take 0.0 GB, the bound is 0.0 GB" in caplog.text
    assert not entries(cache)


def test_a_full_disk_is_left_alone(
    model: Path, cache: CacheSettings, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = shutil._ntuple_diskusage(10**12, 10**12 - 10**9, 10**9)  # type: ignore[attr-defined]
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: full)
    load_shard(model, 0, 2, options=FOUR_BITS, cache=cache)
    assert "not kept in the cache: the disk has 1.0 GB free, too few for 0.0 GB more" in caplog.text
    assert not entries(cache)


def test_a_disk_that_fails_ends_the_entry_and_not_the_load(
    model: Path, cache: CacheSettings, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_self: Any, _data: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache_io.EntryWriter, "_write", fail)
    shard = load_shard(model, 0, 2, options=FOUR_BITS, cache=cache)
    assert same(shard, load_shard(model, 0, 2, options=FOUR_BITS))
    assert "not kept in the cache: [Errno 28] No space left on device" in caplog.text
    assert list(cache.folder.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_no_error(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    load_shard(model, 0, 2, options=FOUR_BITS, cache=CacheSettings(tmp_path / "file" / "cache"))
    assert "cannot be written: [Errno 20] Not a directory" in caplog.text


def test_unfinished_entries_of_others_are_removed_when_they_are_old(cache: CacheSettings) -> None:
    for name in ("tmp-elsewhere-1-aa", "tmp-elsewhere-2-bb", "tmp-x"):
        (cache.folder / name).mkdir(parents=True)
    os.utime(cache.folder / "tmp-elsewhere-1-aa", (0, 0))
    assert shard_cache.make_room(cache, 10) == ""
    assert [path.name for path in cache.folder.iterdir()] == ["tmp-elsewhere-2-bb"]


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MACRAME_CACHE", str(tmp_path))
    assert CacheSettings.of().folder == tmp_path / "shards"
    assert CacheSettings.of(folder="/elsewhere").folder == Path("/elsewhere")
    assert CacheSettings.of(max_gb=2).max_bytes == 2 * 10**9
    monkeypatch.delenv("MACRAME_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    monkeypatch.setattr(sys, "platform", "linux")
    assert CacheSettings.of().folder == Path("/xdg/macrame/shards")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert default_folder() == Path.home() / "Library/Caches/macrame/shards"


def test_nothing_is_logged_when_all_goes_well(
    model: Path, cache: CacheSettings, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    for _ in range(2):
        load_shard(model, 0, 2, options=FOUR_BITS, cache=cache)
    assert caplog.records == []
