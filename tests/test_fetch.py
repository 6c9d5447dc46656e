"""Fetching own tensors' bytes from a real HTTP server that speaks as the hub does, faults included."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from planner.headers import read_headers
from planner.model_profile import read_model_profile
from shard_loader import fetch, hub_source, recorder
from shard_loader.fetch import fetch_tensors
from shard_loader.hub import ModelPlace, find_model
from shard_loader.hub_source import HubSource
from shard_loader.journal import Record
from shard_loader.sources import FetchStoppedError, HubError
from shard_loader.spans import total_bytes
from shard_loader.store import Store
from shard_loader.survey import own_tensors
from shard_loader.weights import WeightsError, load_shard
from tests.hub_server import Fault, HubServer, Served
from tests.ring_processes import free_ports
from tests.tiny_models import write_checkpoint

MODEL = "tests/tiny"
LAST = r"model-00003"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "tiny"
    write_checkpoint("llama", folder, num_layers=5, max_shard_bytes=400_000)
    assert len(list(folder.glob("*.safetensors"))) == 3
    return folder


@pytest.fixture
def hub(model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub_source, "FIRST_WAIT_S", 0.01)
    with HubServer({MODEL: model}) as server:
        yield server


class Machine:
    """One machine with folders of its own."""

    def __init__(self, directory: Path, server: HubServer) -> None:
        self.directory, self.server = directory, server
        self.source = HubSource(endpoint=server.url)

    def find(self, revision: str = "") -> ModelPlace:
        return find_model(
            MODEL,
            self.directory / "base",
            revision=revision,
            cache_dir=self.directory / "hub",
            root=self.directory / "macrame",
            hub=self.source,
        )

    def store(self) -> Store:
        store = self.find().store
        assert store is not None
        return store

    def fetch(self, start: int, stop: int, **options: object) -> fetch.Fetched:
        store = self.store()
        return fetch_tensors(store, own_tensors(store.folder, start, stop), [self.source], **options)


@pytest.fixture
def machine(tmp_path: Path, hub: HubServer) -> Machine:
    return Machine(tmp_path / "machine", hub)


def bodies(served: Served) -> bool:
    return served.file.endswith(".safetensors") and served.start > 8 and served.sent > 0


def test_headers_are_all_that_planning_fetches(machine: Machine, model: Path) -> None:
    place = machine.find()
    assert place.revision == machine.server.repos[MODEL].sha
    assert read_headers(place.folder) == read_headers(model)
    assert read_model_profile(place.folder, "m") == read_model_profile(model, "m")
    sizes = {path.name: path.stat().st_size for path in model.iterdir()}
    assert {path.name: path.stat().st_size for path in place.folder.iterdir() if path.is_file()} == sizes
    for file in model.glob("*.safetensors"):
        header_bytes = min(h.start for h in read_headers(model).values() if h.file == file.name)
        assert sum(s.sent for s in machine.server.requests(file.name)) == header_bytes
    assert (place.folder / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
    num_requests = len(machine.server.log)
    assert machine.find() == place
    assert len(machine.server.log) == num_requests, "the second time, nothing is asked"


@pytest.mark.parametrize(("start", "stop"), [(0, 2), (2, 4), (4, 5)])
def test_only_own_bytes_are_fetched(start: int, stop: int, machine: Machine, model: Path) -> None:
    headers = read_headers(model)
    machine.find()
    before = machine.server.bytes_of()
    tensors = own_tensors(machine.store().folder, start, stop)
    assert all(f"layers.{i}." in " ".join(tensors) for i in range(start, stop))
    assert ("lm_head.weight" in tensors) == (stop == 5)
    assert ("model.embed_tokens.weight" in tensors) == (start == 0)
    result = machine.fetch(start, stop)
    own_bytes = sum(headers[name].nbytes for name in tensors)
    assert own_bytes <= machine.server.bytes_of() - before <= 1.01 * own_bytes
    assert result.from_hub == machine.server.bytes_of() - before
    load_shard(machine.store().folder, start, stop)


def test_what_was_not_fetched_is_refused_by_name(machine: Machine) -> None:
    machine.fetch(0, 2)
    with pytest.raises(
        WeightsError, match=r"model\.layers\.\d\..* of .*/model-0000\d.* has not been fetched"
    ):
        load_shard(machine.store().folder, 1, 3)
    with pytest.raises(WeightsError, match=r"lm_head\.weight and \d+ more of .* has not been fetched"):
        load_shard(machine.store().folder, 4, 5)


def test_a_changed_plan_fetches_only_what_is_missing(machine: Machine) -> None:
    first = machine.fetch(0, 2)
    again = machine.fetch(0, 2)
    assert (again.from_hub, again.were_here_bytes) == (0, first.wanted_bytes)
    more = machine.fetch(0, 3)
    assert 0 < more.from_hub < first.from_hub
    load_shard(machine.store().folder, 0, 3)


def test_a_whole_file_is_checked_against_the_hub(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    store = machine.store()
    monkeypatch.setattr(recorder.os, "pwrite", lambda _file, data, _at: len(data))  # a disk that loses all
    with pytest.raises(HubError, match=r"is whole, but not the file that the hub announced \(its sha256"):
        fetch_tensors(store, own_tensors(store.folder, 0, 5), [machine.source])
    monkeypatch.undo()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    machine.fetch(0, 5)
    for path in machine.server.repos[MODEL].folder.iterdir():
        assert (machine.store().folder / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("fault", [Fault.CUT, Fault.BROKEN])
def test_a_passing_fault_costs_no_byte_twice(fault: Fault, machine: Machine) -> None:
    machine.find()
    machine.server.trouble(fault, "safetensors", times=3, min_start=9)
    before = machine.server.bytes_of()
    result = machine.fetch(0, 2)
    assert result.from_hub == result.wanted_bytes
    assert machine.server.bytes_of() - before <= result.wanted_bytes + 3 * 16 * 1024
    load_shard(machine.store().folder, 0, 2)


def test_a_hub_that_asks_for_patience_gets_it(machine: Machine) -> None:
    machine.find()
    machine.server.trouble(Fault.TOO_MANY, "safetensors", times=1, min_start=9)
    calls: list[tuple[int, int]] = []
    machine.fetch(0, 1, on_progress=lambda here, wanted: calls.append((here, wanted)))
    assert len(calls) > 4, "while it waits, it says that it is alive"
    assert calls[0][0] == 0
    assert calls[-1][0] == calls[-1][1]


def test_a_fault_that_stays_ends_the_fetch_and_what_came_is_kept(machine: Machine) -> None:
    machine.find()
    machine.server.trouble(Fault.BROKEN, "model-00002", min_start=9)
    with pytest.raises(
        HubError, match=r"failed 6 times in a row: .*503; try again later, what was fetched is"
    ):
        machine.fetch(0, 4)
    machine.server.troubles.clear()
    result = machine.fetch(0, 4)
    assert 0 < result.were_here_bytes <= result.wanted_bytes


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        (Fault.SHORT, r"the hub sends other bytes of model-.* than those asked for: bytes"),
        (Fault.LONG, r"the hub sends other bytes of model-.* than those asked for: bytes"),
        (Fault.NO_RANGES, r"the hub does not send ranges of model-.* it answers 200"),
        (Fault.CHANGED, r"model-.* has changed on the hub since this fetch began .* start again"),
        (Fault.MISSING, r"model-.* is missing on the Hugging Face hub \(404\)"),
        (
            Fault.GATED,
            rf"{MODEL} asks you to accept its licence: do so on .* `hf auth login`, or set HF_TOKEN",
        ),
    ],
)
def test_a_wrong_answer_is_refused_with_a_sentence(fault: Fault, sentence: str, machine: Machine) -> None:
    machine.find()
    machine.server.trouble(fault, "safetensors", min_start=9)
    with pytest.raises(HubError, match=sentence):
        machine.fetch(0, 2)
    assert not any(bodies(served) and served.status == 200 for served in machine.server.log)


def test_a_gated_model_says_how_to_log_in(machine: Machine) -> None:
    machine.server.trouble(Fault.GATED, "api")
    with pytest.raises(HubError, match="asks you to accept its licence"):
        machine.find()


def test_a_model_that_is_not_there(tmp_path: Path, hub: HubServer) -> None:
    with pytest.raises(
        HubError, match="tests/none is neither a folder here nor a model on the Hugging Face hub"
    ):
        find_model("tests/none", tmp_path, cache_dir=tmp_path, root=tmp_path, hub=HubSource(endpoint=hub.url))
    with pytest.raises(HubError, match="the Hugging Face hub has no revision 00000"):
        find_model(
            MODEL,
            tmp_path,
            revision="0" * 40,
            cache_dir=tmp_path,
            root=tmp_path,
            hub=HubSource(endpoint=hub.url),
        )


def test_offline_says_so(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match=rf"{MODEL} is not in the local cache, and HF_HUB_OFFLINE keeps"):
        machine.find()


def test_offline_a_prepared_model_still_plans(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    place = machine.find()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert machine.find() == place
    with pytest.raises(HubError, match=r"model-00001.* is not in the local cache, and HF_HUB_OFFLINE keeps"):
        machine.fetch(0, 1)


def test_a_full_disk_is_seen_before(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.find()
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(HubError, match=r"needs \d+ more bytes in .* whose disk has 1000 free: make room"):
        machine.fetch(0, 2)
    assert not any(bodies(served) for served in machine.server.log if served.start > 10_000)


def test_a_fetch_can_be_stopped_and_goes_on_later(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "PIECE_BYTES", 50_000)
    monkeypatch.setattr(recorder, "PIECE_BYTES", 20_000)
    machine.find()
    stopping = threading.Event()
    machine.server.trouble(Fault.HOLD, "model-00002", times=1, min_start=9)

    def on_progress(here: int, wanted: int) -> None:
        if machine.server.held.is_set():
            stopping.set()
            machine.server.release()

    with pytest.raises(FetchStoppedError):
        machine.fetch(0, 4, on_progress=on_progress, stopping=stopping)
    machine.server.troubles.clear()
    result = machine.fetch(0, 4)
    assert 0 < result.were_here_bytes <= result.wanted_bytes
    assert result.from_hub == result.wanted_bytes - result.were_here_bytes
    load_shard(machine.store().folder, 0, 4)


def test_after_a_kill_damaged_pieces_are_fetched_again(machine: Machine) -> None:
    machine.fetch(0, 2)
    store = machine.store()
    (store.folder / ".macrame" / "fetching.999999999").touch()  # what a killed process leaves
    record = next(r for r in store.journal.records("model-00001-of-00003.safetensors") if r.start > 0)
    with (store.folder / record.file).open("r+b") as file:
        file.seek(record.start)
        file.write(b"\xff" * 100)
    result = machine.fetch(0, 2)
    assert result.from_hub == record.stop - record.start
    assert not list((store.folder / ".macrame").glob("fetching.*"))


@pytest.mark.parametrize("size", [0, 5000])
def test_a_file_that_was_cut_short_is_fetched_again(size: int, machine: Machine) -> None:
    machine.fetch(0, 2)
    path = machine.store().folder / "model-00001-of-00003.safetensors"
    whole = path.read_bytes()
    os.truncate(path, size)
    assert machine.fetch(0, 2).from_hub > 0
    assert path.read_bytes() == whole


def test_a_line_that_was_cut_short_is_no_line(machine: Machine) -> None:
    machine.fetch(0, 2)
    journal = machine.store().folder / ".macrame" / "journal"
    whole = total_bytes(machine.store().journal.covered("model-00001-of-00003.safetensors"))
    journal.write_bytes(journal.read_bytes().rstrip(b"\n")[:-7])
    store = machine.store()
    store.journal.add(Record("model-00001-of-00003.safetensors", 10**9, 10**9 + 1, "0" * 64))
    covered = machine.store().journal.covered("model-00001-of-00003.safetensors")
    assert covered[-1] == (10**9, 10**9 + 1), "the line after it is read"
    result = machine.fetch(0, 2)
    assert total_bytes(machine.store().journal.covered("model-00001-of-00003.safetensors")) >= whole
    assert result.from_hub > 0


def test_a_file_that_the_hub_lacks_matters_only_to_its_owner(machine: Machine, model: Path) -> None:
    machine.server.trouble(Fault.MISSING, LAST)
    place = machine.find()
    assert not list(place.folder.glob(f"{LAST}*"))
    assert read_model_profile(place.folder, "m") == read_model_profile(model, "m")
    machine.fetch(0, 2)
    load_shard(place.folder, 0, 2)
    sentence = r"lm_head\.weight is in model-00003-of-00003.safetensors, which is missing on the Hugging Face"
    with pytest.raises(HubError, match=sentence):
        machine.fetch(4, 5)
    with pytest.raises(
        WeightsError, match=r"model-00003-of-00003.safetensors is missing, and layers 4:5 read"
    ):
        load_shard(place.folder, 4, 5)


def test_a_store_that_cannot_be_written_says_where_to_put_it(tmp_path: Path, hub: HubServer) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(HubError, match=r"cannot be kept in .*file/models--tests--tiny: .* set MACRAME_CACHE"):
        find_model(
            MODEL, tmp_path, cache_dir=tmp_path, root=tmp_path / "file", hub=HubSource(endpoint=hub.url)
        )


def test_a_hub_that_is_not_there_is_told_soon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub_source, "FIRST_WAIT_S", 0.01)
    (port,) = free_ports(1)
    nobody = HubSource(endpoint=f"http://127.0.0.1:{port}")
    with pytest.raises(
        HubError, match=r"the Hugging Face hub cannot be reached \(.*\): connect this machine"
    ):
        find_model(MODEL, tmp_path, cache_dir=tmp_path, root=tmp_path, hub=nobody)


def test_a_connection_that_says_nothing_is_tried_again(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.find()
    monkeypatch.setattr(hub_source, "TIMEOUT_S", 0.3)
    machine.server.trouble(Fault.HOLD, "safetensors", times=1, min_start=9)
    result = machine.fetch(0, 2)
    assert machine.server.held.is_set()
    assert result.from_hub == result.wanted_bytes


def test_the_token_goes_to_the_hub(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.server.token = "hf_secret"
    with pytest.raises(HubError, match="asks you to accept its licence"):
        machine.find()
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    machine.find()
    machine.fetch(0, 1)


def test_a_folder_that_cannot_be_written_is_read(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "read-only"
    shutil.copytree(model, folder)
    for path in (*folder.iterdir(), folder):
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = sorted(path.name for path in folder.rglob("*"))
    place = find_model(str(folder), tmp_path)
    assert place == ModelPlace(folder)
    load_shard(place.folder, 1, 3)
    assert sorted(path.name for path in folder.rglob("*")) == before
    folder.chmod(0o755)


def test_a_model_that_hf_download_brought_is_used_as_it_is(
    tmp_path: Path, hub: HubServer, model: Path
) -> None:
    """The hub's own client also shows that the server of these tests speaks as the hub does."""
    cache = tmp_path / "hub"
    env = os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_CACHE": str(cache)}
    code = f"from huggingface_hub import snapshot_download; print(snapshot_download({MODEL!r}))"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    num_requests = len(hub.log)
    place = find_model(MODEL, tmp_path, cache_dir=cache, root=tmp_path / "macrame")
    assert str(place.folder) == done.stdout.strip()
    assert place == ModelPlace(place.folder, hub.repos[MODEL].sha)
    assert place.store is None
    load_shard(place.folder, 0, 5)
    assert len(hub.log) == num_requests
    assert not (tmp_path / "macrame").exists()
    (place.folder / "model-00003-of-00003.safetensors").unlink()
    other = find_model(
        MODEL, tmp_path, cache_dir=cache, root=tmp_path / "macrame", hub=HubSource(endpoint=hub.url)
    )
    assert other.revision == place.revision
    assert other.store is not None, "one that lost a file is not taken for complete"
