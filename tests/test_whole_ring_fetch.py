"""Rings of real processes that get their model from a hub, each with a Hugging Face folder of its own."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import httpx
import pytest

from cluster.errors import EXIT_ERROR
from planner.headers import read_headers
from proto import control_pb2
from shard_loader.survey import own_tensors
from tests.api_server import COMPLETIONS, wait_for
from tests.hub_server import Fault, HubServer, Served
from tests.node_process import node, run_node, write_cluster
from tests.reference import greedy
from tests.ring_processes import RingProcesses
from tests.tiny_models import write_checkpoint
from tests.waiting import is_in_time

MODEL = "tests/ring"
LAYERS = [(0, 2), (2, 5), (5, 7)]
PROMPT = list(b"def fetch(")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 85 MB in several files, so that a node's own bytes are several pieces of a fetch."""
    folder = tmp_path_factory.mktemp("hub") / "ring"
    return write_checkpoint(
        "llama",
        folder,
        num_layers=7,
        max_shard_bytes=26_000_000,
        overrides={"hidden_size": 512, "intermediate_size": 1408, "head_dim": 128},
    )


@pytest.fixture
def hub(model: Path) -> Iterator[HubServer]:
    with HubServer({MODEL: model}) as server:
        yield server


def homes(directory: Path, hub: HubServer, names: Mapping[int, str]) -> dict[int, dict[str, str | None]]:
    """Per rank the environment of a machine of its own; `names` are those of its folders."""
    return {
        rank: {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(directory / name),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_USER_AGENT_ORIGIN": f"n{rank}",
            "HF_HUB_CACHE": None,
            "MACRAME_CACHE": None,
        }
        for rank, name in names.items()
    }


def ring(directory: Path, hub: HubServer, layers: Sequence[tuple[int, int]] = LAYERS) -> RingProcesses:
    env_of = homes(directory, hub, {rank: f"home{rank}" for rank in range(len(layers))})
    return RingProcesses(directory, MODEL, layers, env_of=env_of, stall_timeout_s=3)


def own_bytes(model: Path, layers: tuple[int, int]) -> int:
    headers = read_headers(model)
    return sum(headers[name].nbytes for name in own_tensors(model, *layers))


def headers_bytes(model: Path) -> int:
    """Small files and headers."""
    starts: dict[str, int] = {}
    for header in read_headers(model).values():
        starts[header.file] = min(header.start, starts.get(header.file, header.start))
    return sum(starts.values()) + sum(p.stat().st_size for p in model.iterdir() if p.suffix == ".json")


def is_file(served: Served) -> bool:
    return served.file != "api"


def test_each_node_fetches_its_own_bytes_and_the_tokens_are_the_same(
    tmp_path: Path, model: Path, hub: HubServer
) -> None:
    with ring(tmp_path, hub) as running:
        status = running.wait_ok()
        assert running.tokens(PROMPT, 8) == greedy(model, PROMPT, 8)[0]
    print("\nnode  own tensors  from the hub  ratio")
    total_bytes = 0
    for rank, layers in enumerate(LAYERS):
        own, got = own_bytes(model, layers), hub.bytes_of(f"n{rank}", is_file)
        extra = headers_bytes(model) if rank == 0 else 0  # the others copy them from the head
        print(f"n{rank}    {own:>11,}  {got:>12,}  {got / own:.4f}")
        assert own <= got <= 1.01 * own + extra
        assert status.ranks[rank].node.fetched_bytes == pytest.approx(own, rel=0.01)
        total_bytes += got
    files_bytes = sum(path.stat().st_size for path in model.iterdir())
    assert total_bytes <= 1.01 * files_bytes


@pytest.mark.long  # now and then a peer has the bytes before the hub is asked, and the killing comes too late
def test_a_killed_node_goes_on_where_it_was(tmp_path: Path, model: Path, hub: HubServer) -> None:
    hub.trouble(Fault.HOLD, "safetensors", times=1, min_start=1_000_000, client="n1")
    with ring(tmp_path, hub) as running:
        running.wait_listening(1)
        assert hub.held.wait(60.0)
        wait_for(lambda: running.node_status(1).loaded_bytes > 20_000_000, 25.0)
        status = running.node_status(1)
        assert (status.state, status.activity) == (control_pb2.LOADING, "fetching")
        running.wait_status(lambda s: "is fetching (0.0" in s.reason, 10.0)
        running.wait_status(lambda s: "has been fetching for" in s.reason, 20.0)
        before = hub.bytes_of("n1", is_file)
        running.kill(1)
        hub.release()
        hub.troubles.clear()
        running.start(1)
        running.wait_ok()
        assert running.tokens(PROMPT, 4) == greedy(model, PROMPT, 4)[0]
        again = running.node_status(1).fetched_bytes
    own = own_bytes(model, LAYERS[1])
    assert 0 < again < own - before + 4 * 8_500_000, "all but the pieces that were under way is kept"
    assert again < 0.8 * own


def test_a_node_that_fetches_stops_at_once(tmp_path: Path, hub: HubServer) -> None:
    hub.trouble(Fault.HOLD, "safetensors", min_start=1_000_000)
    with ring(tmp_path, hub) as running:
        running.wait_listening(0)
        assert hub.held.wait(60.0)
        began = time.monotonic()
        assert set(running.stop().values()) == {0}
        assert is_in_time(time.monotonic() - began, 3.0)


@pytest.mark.long
def test_nodes_of_one_machine_share_its_folder(tmp_path: Path, model: Path, hub: HubServer) -> None:
    env_of = homes(tmp_path, hub, dict.fromkeys(range(3), "home"))
    with RingProcesses(tmp_path, MODEL, LAYERS, env_of=env_of, with_api=True) as running:
        url = running.wait_api()
        body = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
        answer = httpx.post(url + COMPLETIONS, json=body | {"return_token_ids": True}, timeout=20.0)
        assert answer.json()["choices"][0]["token_ids"] == greedy(model, PROMPT, 8)[0]
    files_bytes = sum(path.stat().st_size for path in model.iterdir())
    assert hub.bytes_of(where=is_file) <= 1.01 * files_bytes
    (folder,) = (tmp_path / "home" / "macrame" / "models--tests--ring").glob("?" * 40)
    for path in model.glob("*.safetensors"):
        assert (folder / path.name).read_bytes() == path.read_bytes()


def test_a_node_without_internet_gets_everything_from_the_others(
    tmp_path: Path, model: Path, hub: HubServer
) -> None:
    with ring(tmp_path, hub, [(0, 3), (3, 5), (5, 7)]) as running:
        running.wait_ok()
    num_requests = len(hub.log)
    env = homes(tmp_path, hub, {0: "home0", 1: "fresh", 2: "home1", 3: "home2"})
    env[1]["HF_HUB_OFFLINE"] = "1"
    again = RingProcesses(tmp_path, MODEL, [(0, 1), (1, 4), (4, 5), (5, 7)], env_of=env)
    with again as running:
        status = running.wait_ok()
        assert running.tokens(PROMPT, 8) == greedy(model, PROMPT, 8)[0]
        copied = status.ranks[1].node.copied_bytes
    assert copied == pytest.approx(own_bytes(model, (1, 4)), rel=0.01)
    assert len(hub.log) == num_requests, "nobody asked the internet"


@pytest.mark.long
def test_a_file_that_the_hub_lacks_fails_its_owner_by_name(
    tmp_path: Path, model: Path, hub: HubServer
) -> None:
    last = sorted(model.glob("*.safetensors"))[-1].name
    hub.trouble(Fault.MISSING, last)
    with ring(tmp_path, hub) as running:
        status = running.wait_status(lambda s: "failed" in s.reason)
        assert "rank 2 (n2" in status.reason
        assert f"is in {last}, which is missing on the Hugging Face hub (404)" in status.reason
        wait_for(lambda: running.node_status(1).state == control_pb2.READY, 20.0)
        hub.troubles.clear()
        running.kill(2)
        running.start(2)
        running.wait_ok()
        assert running.tokens(PROMPT, 4) == greedy(model, PROMPT, 4)[0]


def test_a_file_that_a_folder_lacks_fails_its_owner_by_name(tmp_path: Path) -> None:
    folder = write_checkpoint("llama", tmp_path / "tiny", num_layers=5, max_shard_bytes=400_000)
    last = sorted(folder.glob("*.safetensors"))[-1]
    last.unlink()
    with RingProcesses(tmp_path, folder, [(0, 1), (1, 2), (2, 5)]) as running:
        status = running.wait_status(lambda s: "failed" in s.reason)
        assert "rank 2 (n2" in status.reason
        sentence = f"{last.name} is missing, and layers 2:5 read"
        assert sentence in status.reason
        assert sentence in running.log(0)
        assert sentence in running.log(2)
        wait_for(lambda: running.node_status(1).state == control_pb2.READY, 20.0)


def test_a_missing_file_fails_its_owner_also_where_it_is_quantised(tmp_path: Path) -> None:
    folder = write_checkpoint("llama", tmp_path / "tiny", num_layers=5, max_shard_bytes=400_000)
    last = sorted(folder.glob("*.safetensors"))[-1]
    last.unlink()
    load = {"quantize": {"bits": 4}, "cache": True}
    with RingProcesses(tmp_path, folder, [(0, 1), (1, 2), (2, 5)], load=load) as running:
        status = running.wait_status(lambda s: "failed" in s.reason)
        assert "rank 2 (n2" in status.reason
        assert f"{last.name} is missing, and layers 2:5 read" in status.reason
        wait_for(lambda: running.node_status(1).state == control_pb2.READY, 20.0)


def test_a_head_that_owns_the_missing_file_ends(tmp_path: Path) -> None:
    folder = write_checkpoint("llama", tmp_path / "tiny", num_layers=5, max_shard_bytes=400_000)
    first = min(folder.glob("*.safetensors"))
    first.unlink()
    running = RingProcesses(tmp_path, folder, [(0, 5)])
    running.start(0)
    assert running.processes[0].wait(60.0) == EXIT_ERROR
    assert f"{first.name} is missing, and layers 0:5 read" in running.log(0)
    running.stop()


@pytest.mark.parametrize(
    ("model", "fault", "sentence"),
    [
        ("tests/none", None, "tests/none is neither a folder here nor a model on the Hugging Face hub"),
        (
            MODEL,
            Fault.GATED,
            f"{MODEL} asks you to accept its licence: do so on https://huggingface.co/{MODEL}",
        ),
    ],
)
def test_a_head_without_a_model_ends_with_the_reason(
    model: str, fault: Fault | None, sentence: str, tmp_path: Path, hub: HubServer
) -> None:
    if fault is not None:
        hub.trouble(fault, "api")
    path = write_cluster(tmp_path, model, node(), node())  # the other one is not there, and has nothing
    env = {key: value for key, value in homes(tmp_path, hub, {0: "home"})[0].items() if value is not None}
    ended = run_node("--rank", 0, "--config", path, "--no-api", env=env)
    assert ended.code == EXIT_ERROR
    assert sentence in ended.sentence
