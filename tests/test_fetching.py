"""What a node does with an assignment of a hub model, before anything is loaded."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from huggingface_hub import constants

from cluster.config import ClusterConfig, load_config
from cluster.fetching import ModelFetcher
from cluster.node import Node
from cluster.planning import plan_cluster
from planner.digests import model_digest
from proto import control_pb2
from shard_loader.hub_source import HubSource
from shard_loader.sources import HubError
from shard_loader.weights import load_shard
from tests.hub_server import HubServer
from tests.node_process import node, write_cluster
from tests.tiny_models import write_checkpoint

MODEL = "tests/tiny"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_checkpoint("llama", tmp_path / "served", num_layers=3)


def assignment(config: ClusterConfig, model: Path, **values: object) -> control_pb2.AssignRequest:
    plan = plan_cluster(config, model, {}).plan
    assert plan is not None
    return control_pb2.AssignRequest(
        epoch=1,
        config_digest=config.digest,
        plan_json=plan.to_json(),
        plan_digest=plan.digest,
        model_digest=model_digest(model),
        **values,
    )


def test_a_fetch_brings_a_stage_and_refuses_other_files(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("MACRAME_CACHE", raising=False)
    fetcher = ModelFetcher(
        load_config(write_cluster(tmp_path, MODEL, node(name="n0"), node(name="n1"))), 0, None
    )
    calls: list[tuple[int, int]] = []
    with HubServer({MODEL: model}) as server:
        for module in ("shard_loader.hub", "cluster.fetching"):
            monkeypatch.setattr(f"{module}.HubSource", lambda: HubSource(endpoint=server.url))
        place = fetcher.find()
        fetch = lambda digest: fetcher.fetch(  # noqa: E731
            place.revision, digest, (0, 2), lambda *both: calls.append(both), threading.Event()
        )
        assert fetch(model_digest(model)) == place.folder
        assert calls[-1] == (fetcher.result.from_hub, fetcher.result.wanted_bytes)
        with pytest.raises(
            HubError, match=rf"n0 has other files for {MODEL} at .* \(digest .*, the head's is 0000"
        ):
            fetch("0" * 16)
    load_shard(place.folder, 0, 2)


def test_plans_are_taken_when_it_is_known_where_the_model_is(tmp_path: Path, model: Path) -> None:
    config = load_config(write_cluster(tmp_path, MODEL, node(name="n0")))
    one = Node(config, 0, credentials=None, import_base_rss_bytes=0)
    of_hub, of_folder = (assignment(config, model, revision=revision) for revision in ("a" * 40, ""))
    assert one.assign(of_hub).reason == "n0 is still fetching the model"
    one.model.expected()
    sentence = (
        f"the head reads {MODEL} from a folder, which n0 does not have: copy it to the same place on n0"
    )
    assert sentence in one.assign(of_folder).reason
    assert one.assign(of_hub).accepted
    assert one.status().state == control_pb2.LOADING


def test_a_folder_serves_for_a_revision_if_it_is_the_same(tmp_path: Path, model: Path) -> None:
    config = load_config(write_cluster(tmp_path, MODEL, node(name="n0")))
    one = Node(config, 0, credentials=None, import_base_rss_bytes=0)
    one.model.found(model)
    request = assignment(config, model, revision="a" * 40)
    other = control_pb2.AssignRequest()
    other.CopyFrom(request)
    other.model_digest = "0" * 16
    assert "n0 has other files for tests/tiny" in one.assign(other).reason
    assert one.assign(request).accepted
