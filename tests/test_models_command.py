"""`macrame models`: what is on disk, fetching, removing, with a real server that speaks as the hub does."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from deploy import models
from deploy.models_list import NodeModels, render
from deploy.models_use import user_of
from proto import control_pb2
from shard_loader.inventory import HUB_CACHE, OWN_STORE, KeptModel, inventory, remove_stored
from shard_loader.sources import HubError
from shard_loader.store import FOLDER, FileEntry, Manifest, Store, model_folder
from tests.hub_server import Fault, HubServer
from tests.tiny_models import write_checkpoint
from tests.waiting import wait_for

MODEL = "tests/tiny"


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    folder = write_checkpoint("llama", tmp_path_factory.mktemp("hub") / "tiny", num_layers=5)
    with HubServer({MODEL: folder}) as server:
        yield server


Macrame = Callable[..., list[tuple[int, str, str]]]
RUNNER = """
import contextlib, io, json, sys
from deploy import models
for arguments in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = models.main(arguments)
    print(json.dumps([code, out.getvalue(), err.getvalue()]))
"""


@pytest.fixture
def macrame(hub: HubServer, tmp_path: Path) -> Macrame:
    """Runs several `macrame models ...` in one process, on a machine with an empty disk."""
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}

    def run(*commands: list[str]) -> list[tuple[int, str, str]]:
        result = subprocess.run(
            [sys.executable, "-c", RUNNER, json.dumps(commands)],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=True,
        )
        return [tuple(json.loads(line)) for line in result.stdout.splitlines()]

    return run


def test_a_part_is_pulled_then_the_rest_then_nothing_and_all_of_it_removed(
    macrame: Macrame, tmp_path: Path
) -> None:
    pull, show = ["pull", MODEL, "--json"], ["list", "--json"]
    results = macrame(
        [*pull, "--layers", "0:2"],
        show,
        pull,
        show,
        pull[:2],
        ["remove", MODEL],
        ["remove", MODEL, "--yes", "--json"],
        show,
        ["pull", "tests/nothing"],
        [*pull, "--layers", "3:99"],
    )
    part, some, rest, whole, again, asked, removed, none, unknown, beyond = results
    first, second = json.loads(part[1]), json.loads(rest[1])
    assert 0 < first["fetched_bytes"] == first["wanted_bytes"]
    assert second["fetched_bytes"] == second["wanted_bytes"] - first["fetched_bytes"]
    (kept,) = _listed(some)
    assert (kept["model"], kept["place"], kept["revision"]) == (MODEL, OWN_STORE, first["revision"])
    assert first["wanted_bytes"] < kept["here_bytes"] < kept["total_bytes"]
    (kept,) = _listed(whole)
    assert kept["here_bytes"] == kept["total_bytes"]
    assert again[1] == f"{MODEL} is in {second['folder']}: it was there.\n"
    assert asked == (3, "", "macrame models: nobody is there to ask: give --yes to remove it\n")
    assert json.loads(removed[1]) == {"model": MODEL, "freed_bytes": kept["here_bytes"]}
    assert _listed(none) == []
    assert unknown[0] == 1
    assert "tests/nothing is neither a folder here nor a model on the Hugging Face hub" in unknown[2]
    assert beyond[0] == 3
    assert "--layers 3:99: layers [3, 99) do not lie within the model's 5 layers" in beyond[2]


def _listed(result: tuple[int, str, str]) -> list[dict[str, Any]]:
    (node,) = json.loads(result[1])["nodes"]
    return list(node["models"])


def test_usage_errors(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["pull"], "pull needs a MODEL, such as"),
        (["list", "x"], "list takes no MODEL: it lists all"),
        (["remove", "x", "--config", "c"], "--config is for list: remove works on this machine"),
        (["pull", "x", "--layers", "3"], "argument --layers: '3' must be A:B with A below B"),
        (["pull", "x", "--layers", "3:3"], "argument --layers: '3:3' must be A:B with A below B"),
    ):
        with pytest.raises(SystemExit) as ended:
            models.main(arguments)
        assert ended.value.code == 3
        assert f"macrame models: {message}" in capsys.readouterr().err


def hub_cache(root: Path, *, is_whole: bool) -> None:
    """A model as `hf download` leaves it."""
    repo, commit = root / "models--org--m", "a" * 40
    snapshot = repo / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    (repo / "blobs").mkdir()
    names = ["config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for name in names if is_whole else names[:2]:
        (repo / "blobs" / name).write_bytes(b"x" * 10)
        (snapshot / name).symlink_to(repo / "blobs" / name)


@pytest.mark.parametrize("is_whole", [True, False])
def test_the_hugging_face_cache_is_listed_and_never_removed(
    tmp_path: Path, is_whole: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub_cache(tmp_path, is_whole=is_whole)
    (kept,) = inventory(cache_dir=tmp_path, root=tmp_path / "none")
    assert (kept.model, kept.place, kept.is_whole) == ("org/m", HUB_CACHE, is_whole)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert models.main(["remove", "org/m", "--yes"]) == 3
    assert "remove it with 'hf cache rm model/org/m'" in capsys.readouterr().err
    assert models.main(["remove", "org/other", "--yes"]) == 3
    assert "org/other is not on this machine" in capsys.readouterr().err
    assert (tmp_path / "models--org--m" / "blobs" / "config.json").exists()


@pytest.mark.parametrize("form", ["-m cluster.run_node --config c.json", "run_node --config=c.json --rank 0"])
def test_what_a_node_here_runs_is_not_removed(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.json").write_text(json.dumps({"model": MODEL, "nodes": [{"host": "127.0.0.1"}]}))
    place = model_folder(MODEL, tmp_path) / ("c" * 40)
    store = Store.create(place, Manifest(MODEL, "c" * 40, {"config.json": FileEntry("config.json", 2)}))
    store.add_small(FileEntry("config.json", 2), b"{}")
    store.seal()
    kept = inventory(cache_dir=tmp_path / "none", root=tmp_path)
    monkeypatch.setattr("shard_loader.inventory.inventory", lambda: kept)
    command = [sys.executable, "-c", "input()", *form.split()]
    with subprocess.Popen(command, cwd=tmp_path, stdin=subprocess.PIPE) as node:
        wait_for(lambda: user_of(MODEL) == node.pid)
        assert user_of("org/other") is None
        assert models.main(["remove", MODEL, "--yes"]) == 1
        node.kill()
    assert capsys.readouterr().err == (
        f"macrame models: a node here runs {MODEL} (process {node.pid}): stop it first, such as with "
        "'macrame down --config cluster.json'\n"
    )
    assert place.is_dir()
    assert user_of(MODEL) is None


def test_nobody_to_ask_removes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = KeptModel(MODEL, "c" * 40, OWN_STORE, 2, 2, tmp_path)
    monkeypatch.setattr("shard_loader.inventory.inventory", lambda: [kept])
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    assert models.main(["remove", MODEL]) == 3
    assert capsys.readouterr().err == "macrame models: nobody is there to ask: give --yes to remove it\n"


def test_no_cache_is_no_error(tmp_path: Path) -> None:
    assert inventory(cache_dir=tmp_path / "none", root=tmp_path / "nor this") == []
    with pytest.raises(HubError, match=r"nothing of a/b is in "):
        remove_stored("a/b", tmp_path)


def test_what_is_being_fetched_is_not_removed(tmp_path: Path) -> None:
    content = b"{}"
    entry = FileEntry("config.json", len(content))
    store = Store.create(
        model_folder(MODEL, tmp_path) / ("c" * 40), Manifest(MODEL, "c" * 40, {entry.name: entry})
    )
    store.add_small(entry, content)
    store.seal()
    (kept,) = inventory(cache_dir=tmp_path / "none", root=tmp_path)
    assert (kept.here_bytes, kept.total_bytes, kept.place) == (2, 2, OWN_STORE)
    with subprocess.Popen(["sleep", "30"]) as other:
        mark = store.folder / FOLDER / f"fetching.{other.pid}"
        mark.touch()
        with pytest.raises(HubError, match=f"process {other.pid} is fetching {MODEL} now: stop it first"):
            remove_stored(MODEL, tmp_path)
        other.kill()
    assert remove_stored(MODEL, tmp_path) == 2  # the mark of a process that is gone does not count
    assert inventory(cache_dir=tmp_path / "none", root=tmp_path) == []


def test_a_row_says_how_much_is_here_and_a_line_who_runs_what() -> None:
    def kept(here: int, total: int) -> control_pb2.KeptModel:
        return control_pb2.KeptModel(
            model="org/m", revision="b" * 40, place=OWN_STORE, here_bytes=here, total_bytes=total
        )

    nodes = [
        NodeModels("mini", 0, [kept(10, 40)], 5 * 10**9, "org/m", (0, 3)),
        NodeModels("pro", 1, [kept(40, 40), kept(7, 0)], 10**9),
        NodeModels("air", 2, trouble="does not answer at air:50051: is run_node running there?"),
        NodeModels("max", 3, [], 10**9, "", (3, 5)),
    ]
    text = render(nodes, None)
    assert "25% of 40 B" in text
    assert "all of it" in text
    assert "in part" in text
    assert text.splitlines()[-4:] == [
        "rank 0 (mini): runs layers 0:3 of org/m, 5.0 GB free",
        "rank 1 (pro): 1.0 GB free",
        "rank 2 (air): does not answer at air:50051: is run_node running there?",
        "rank 3 (max): runs layers 3:5 of its model, has no model of the hub on disk, 1.0 GB free",
    ]
    assert max(map(len, render(nodes[:1], 40).splitlines())) <= 52, "a narrow terminal gets blocks"


@pytest.mark.long
def test_a_pull_goes_on_where_ctrl_c_stopped_it(tmp_path: Path) -> None:
    folder = write_checkpoint("llama", tmp_path / "hub", num_layers=5)
    with HubServer({MODEL: folder}) as hub:
        hub.trouble(Fault.HOLD, r"\.safetensors", min_start=9, times=1)
        environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
        command = [sys.executable, "-m", "deploy.models", "pull", MODEL]
        with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
            assert hub.held.wait(30)
            process.send_signal(signal.SIGINT)
            hub.release()
            _, told = process.communicate(timeout=30)
        assert process.returncode == 130
        assert told.splitlines()[-1] == (
            "macrame models: stopped; what came is kept, and the same command goes on from there"
        )
        subprocess.run(command, env=environment, check=True, capture_output=True)
    (kept,) = inventory(cache_dir=tmp_path / "none", root=tmp_path / "macrame")
    assert kept.is_whole
