"""The control service of one node over gRPC, with a real node behind it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from cluster import control
from cluster.config import load_config
from cluster.control import ControlService
from cluster.measured_speeds import MeasuredSpeeds
from cluster.node import Node
from cluster.planning import plan_cluster
from cluster.probe import this_machine
from cluster.rpc import make_server
from proto import control_pb2, control_pb2_grpc
from tests.node_process import node, write_cluster
from tests.test_measured_speeds import FOUND
from tests.tiny_models import write_checkpoint
from tests.waiting import wait_for

HEAD = 77  # an incarnation


class Served:
    """A node of one stage with its control service."""

    def __init__(self, directory: Path, model: Path) -> None:
        self.config = load_config(write_cluster(directory, model, node(name="n0")))
        self.model = model
        self.node = Node(self.config, 0, credentials=None, import_base_rss_bytes=0)
        self.node.start()
        self.service = ControlService(self.node, this_machine())
        add: Callable[[grpc.Server], None] = lambda server: (  # noqa: E731
            control_pb2_grpc.add_ControlServicer_to_server(self.service, server)
        )
        self.server, port = make_server("127.0.0.1:0", [add], None, max_workers=8)
        self.server.start()
        self.channel = grpc.insecure_channel(f"127.0.0.1:{port}")
        self.stub = control_pb2_grpc.ControlStub(self.channel)

    def close(self) -> None:
        self.service.close()
        assert self.node.close(5.0)
        self.channel.close()
        self.server.stop(1.0).wait()

    def assign(self, epoch: int = 1, **values: object) -> control_pb2.AssignReply:
        plan = plan_cluster(self.config, self.model, {}).plan
        assert plan is not None
        fields = {
            "epoch": epoch,
            "config_digest": self.config.digest,
            "plan_json": plan.to_json(),
            "plan_digest": plan.digest,
            "model_digest": self.node.model.digest,
            "head_incarnation": HEAD,
        }
        request = control_pb2.AssignRequest(**{**fields, **values})
        return self.stub.Assign(request, timeout=20.0)

    def status(self) -> control_pb2.NodeStatus:
        return self.stub.Status(control_pb2.StatusRequest(), timeout=20.0)

    def wait_state(self, state: control_pb2.NodeState) -> control_pb2.NodeStatus:
        wait_for(lambda: self.status().state == state, 10.0)
        return self.status()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint("llama", tmp_path_factory.mktemp("model") / "tiny", num_layers=3)


@pytest.fixture
def served(tmp_path: Path, model: Path) -> Iterator[Served]:
    one = Served(tmp_path, model)
    yield one
    one.close()


def test_a_profile_says_what_the_machine_is(served: Served) -> None:
    profile = served.stub.Profile(control_pb2.ProfileRequest(), timeout=20.0)
    assert (profile.name, profile.config_digest) == ("n0", served.config.digest)
    assert 0 < profile.ceiling_bytes <= profile.memory_bytes
    assert profile.mlx_version
    assert profile.macrame_version
    assert not profile.HasField("speeds")  # nothing was measured on the machine of the tests


def test_a_node_tells_what_macrame_profile_measured(served: Served) -> None:
    known = dataclasses.replace(this_machine(), measured=FOUND.speeds, measured_on=FOUND.measured_on)
    served.service._profile = known
    profile = served.stub.Profile(control_pb2.ProfileRequest(), timeout=20.0)
    assert MeasuredSpeeds.from_proto(profile.speeds) == FOUND
    planning = plan_cluster(served.config, served.model, {0: profile})
    assert planning.plan is not None
    assert "were measured" not in planning.table  # the file says that n0 is another chip


def test_plans_that_are_not_taken(served: Served) -> None:
    assert served.assign().reason == "n0 is still fetching the model"
    served.node.model.found(served.model)
    refusals = {
        "n0 runs with another config (digest ": {"config_digest": "0" * 16},
        f"n0 has other files for {served.model} (digest ": {"model_digest": "0" * 16},
        "the plan cannot be read: ": {"plan_json": "{"},
        f"model.safetensors of {served.model} has other bytes on n0 than on the head": {
            "file_samples": {"model.safetensors": "0" * 16}
        },
        "the plan has digest ": {"plan_digest": "0" * 16},
    }
    for start, values in refusals.items():
        reply = served.assign(**values)
        assert not reply.accepted
        assert reply.reason.startswith(start)
    plan = plan_cluster(served.config, served.model, {}).plan
    assert plan is not None
    elsewhere = dataclasses.replace(plan, assignments=(dataclasses.replace(plan.assignments[0], rank=7),))
    reply = served.assign(plan_json=elsewhere.to_json(), plan_digest=elsewhere.digest)
    assert not reply.accepted
    assert reply.reason == "the plan gives layers to rank 7, which is not in the config"
    for text in ("[]", "{}", "null", '{"assignments": 3}', "[" * 100_000):
        reply = served.assign(plan_json=text)
        assert not reply.accepted
        assert reply.reason.startswith("the plan cannot be read: ")
    assert served.status().state == control_pb2.IDLE
    assert not served.node.was_assigned


def test_a_plan_is_loaded_once_and_an_old_epoch_refused(served: Served) -> None:
    served.node.model.found(served.model)
    assert served.assign(5) == control_pb2.AssignReply(accepted=True)
    ready = served.wait_state(control_pb2.READY)
    assert (ready.epoch, ready.start, ready.stop) == (5, 0, 3)
    assert ready.footprint.full_model_bytes == ready.loaded_bytes == ready.load_total_bytes > 0
    assert served.assign(5).accepted  # the head's second try of the same
    reply = served.assign(4)
    assert not reply.accepted
    assert reply.reason == "epoch 4 is over; n0 is in epoch 5"
    assert reply.is_overtaken
    assert served.assign(4, head_incarnation=HEAD + 1).accepted  # another head counts for itself
    assert served.wait_state(control_pb2.READY).epoch == 4


def test_drain_leaves_the_epoch_and_keeps_the_node(served: Served) -> None:
    served.node.model.found(served.model)
    served.assign()
    served.wait_state(control_pb2.READY)
    assert served.stub.Drain(control_pb2.DrainRequest(), timeout=20.0).sessions_left == 0
    idle = served.status()
    assert (idle.state, idle.reason, idle.epoch) == (control_pb2.IDLE, "drained", 0)
    assert served.assign(2).accepted
    served.wait_state(control_pb2.READY)


def test_a_watcher_gets_beats_and_changes(served: Served) -> None:
    served.node.model.found(served.model)
    call = served.stub.Watch(control_pb2.WatchRequest(beat_interval_ms=1), timeout=10.0)
    assert next(call).state == control_pb2.IDLE
    served.assign()
    assert next(s for s in call if s.state == control_pb2.READY).epoch == 1
    call.cancel()


def test_a_node_leaves_its_epoch_when_its_head_is_gone(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "HEAD_GONE_S", 0.3)
    served.node.model.found(served.model)
    served.assign()
    watches = [
        served.stub.Watch(control_pb2.WatchRequest(beat_interval_ms=50, head_incarnation=HEAD))
        for _ in range(2)
    ]
    onlooker = served.stub.Watch(control_pb2.WatchRequest(beat_interval_ms=50))
    for call in (*watches, onlooker):
        next(call)
    served.wait_state(control_pb2.READY)
    watches[0].cancel()
    with pytest.raises(AssertionError):
        wait_for(lambda: served.status().state != control_pb2.READY, 0.6)  # one still watches
    watches[1].cancel()
    wait_for(lambda: served.status().state == control_pb2.IDLE, 3.0)
    assert served.status().reason == "the head is gone"
    onlooker.cancel()


def test_a_stopping_node_takes_no_plan(served: Served) -> None:
    served.node.model.found(served.model)
    assert served.node.close(5.0)
    assert served.assign().reason == "n0 is stopping"


def test_a_head_that_left_before_its_watch_began_is_not_counted(served: Served) -> None:
    class Over:
        """The context of a call that is over."""

        def add_callback(self, callback: Callable[[], None]) -> bool:
            return False

    watch = served.service.Watch(control_pb2.WatchRequest(head_incarnation=HEAD), Over())  # type: ignore[arg-type]
    assert list(watch) == []
    assert served.service._num_heads == 0


def test_watchers_leave_workers_to_edges(served: Served) -> None:
    for semaphore in served.service._watchers.values():
        while semaphore.acquire(blocking=False):
            pass
    for incarnation, whose in ((0, "an onlooker"), (HEAD, "a head")):
        with pytest.raises(grpc.RpcError) as raised:
            list(served.stub.Watch(control_pb2.WatchRequest(head_incarnation=incarnation), timeout=20.0))
        assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED, whose
        assert raised.value.details() == ("16 streams watch this node already; close one, or ask with Status")
