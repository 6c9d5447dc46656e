"""When the ring serves and when it counts a new epoch, decided tick by tick over nodes that only talk."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from cluster import coordinator as module
from cluster.assigner import Joined
from cluster.config import load_config
from cluster.coordinator import MIN_EPOCH_S, Coordinator
from cluster.errors import EXIT_ERROR, EXIT_UNREACHABLE, UserError
from cluster.membership import Member, Reach
from cluster.node import Node
from cluster.planning import Planning, plan_cluster
from proto import control_pb2
from tests.node_process import node, write_cluster
from tests.tiny_models import write_checkpoint

LAYERS = ("0:2", "2:4", "4:5")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint("llama", tmp_path_factory.mktemp("model") / "tiny", num_layers=5)


class Told:
    """A coordinator whose members say what a test wants; an Assign is taken by each connected one."""

    def __init__(self, directory: Path, model: Path, patch: pytest.MonkeyPatch) -> None:
        nodes = [node(name=f"n{rank}", layers=layers) for rank, layers in enumerate(LAYERS)]
        config = load_config(write_cluster(directory, model, *nodes, stall_timeout_s=10))
        own = Node(config, 0, credentials=None, import_base_rss_bytes=0)
        own.model.found(model)
        self.said: list[str] = []
        self.now = 0.0
        self.coordinator = Coordinator(
            config, own, wait_s=None, on_fatal=lambda error: None, say=self.said.append
        )
        self.members = [watcher.member for watcher in self.coordinator._watchers]
        self.is_heard = True  # replies to Assign arrive
        patch.setattr(module, "Prover", lambda *_: None)  # every cut counts as legal
        patch.setattr(self.coordinator, "_assign_all", self._assign_all)

    def _assign_all(self, members: Mapping[int, Member], now: float) -> None:
        joined = self.coordinator._assigner.joined
        for rank, member in members.items():
            if member.reach is Reach.CONNECTED and rank not in joined:
                assert member.status is not None
                joined[rank] = Joined(member.status.incarnation, now, is_accepted=self.is_heard)
                self.say(rank, epoch=self.epoch, state=control_pb2.READY, lost_edge="", reason="")

    @property
    def epoch(self) -> int:
        return self.coordinator._epoch

    @property
    def status(self) -> str:
        return self.coordinator.cluster_status().status

    @property
    def reason(self) -> str:
        return self.coordinator.cluster_status().reason

    def say(self, rank: int, **values: object) -> None:
        """The rank's next status: the last one with these changes."""
        member = self.members[rank]
        status = control_pb2.NodeStatus(rank=rank, incarnation=rank + 1)
        if member.status is not None:
            status.CopyFrom(member.status)
        for key, value in values.items():
            setattr(status, key, value)
        member.status, member.reach = status, Reach.CONNECTED

    def tick(self, after_s: float = 2 * MIN_EPOCH_S) -> None:
        self.now += after_s
        self.coordinator._tick(self.now)

    def serve(self) -> None:
        for rank in range(len(LAYERS)):
            self.say(rank)
        self.tick()
        assert self.status == "ok", self.reason


@pytest.fixture
def told(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Told]:
    ring = Told(tmp_path, model, monkeypatch)
    yield ring
    ring.coordinator.close()


def test_it_serves_once_all_are_ready(told: Told) -> None:
    told.say(0)
    told.say(1)
    told.tick()
    assert told.status == "starting"
    told.serve()


def test_no_service_before_an_assignment_is_known_to_be_taken(told: Told) -> None:
    told.is_heard = False
    for rank in range(len(LAYERS)):
        told.say(rank)
    told.tick()
    assert told.status == "loading"
    for joined in told.coordinator._assigner.joined.values():
        joined.is_accepted = True
    told.tick()
    assert told.status == "ok"


def test_a_refused_edge_counts_no_epochs_while_a_node_is_missing(told: Told) -> None:
    told.say(0)
    told.say(1)
    told.tick()
    epoch = told.epoch
    told.say(1, lost_edge="rank 2 refused the edge: the cluster token is missing or wrong")
    for _ in range(5):
        told.tick()
    assert told.epoch == epoch
    assert "refused the edge" in told.reason
    told.say(2)
    told.tick()
    assert told.epoch == epoch
    told.tick()
    assert (told.epoch, told.status) == (epoch + 1, "ok")


def test_a_lost_edge_ends_the_epoch_once(told: Told) -> None:
    told.serve()
    epoch = told.epoch
    told.say(1, lost_edge="rank 2 has been silent for 1.0 s")
    told.members[2].reach, told.members[2].reason = Reach.FROZEN, "rank 2 is frozen"
    for _ in range(5):
        told.tick()
    assert (told.epoch, told.status) == (epoch + 1, "degraded")
    assert told.reason == "rank 2 is frozen"
    told.say(2)
    told.tick()
    assert (told.epoch, told.status) == (epoch + 1, "ok")


def test_a_stall_ends_the_epoch_once_and_service_comes_back(told: Told) -> None:
    told.serve()
    epoch = told.epoch
    told.say(2, busy_s=11.0, activity="computing")
    for _ in range(5):
        told.tick()
        assert told.epoch == epoch + 1
        assert told.status == "degraded"
        assert "has been computing for 11 s without progress" in told.reason
    told.say(2, busy_s=0.0)
    told.tick()
    assert (told.epoch, told.status) == (epoch + 1, "ok")


@pytest.mark.parametrize("state", [control_pb2.IDLE, control_pb2.DRAINING])
def test_a_node_that_leaves_its_epoch_ends_it(told: Told, state: control_pb2.NodeState) -> None:
    told.serve()
    epoch = told.epoch
    told.say(0, epoch=0, state=state, reason="drained")
    told.tick()
    assert told.epoch == epoch + 1
    assert any("rank 0 (n0" in line and line.endswith("left the ring: drained") for line in told.said)


def test_a_restarted_node_ends_the_epoch(told: Told) -> None:
    told.serve()
    epoch = told.epoch
    told.say(2, incarnation=99)
    told.tick()
    assert told.epoch == epoch + 1
    assert told.coordinator._assigner.joined[2].incarnation == 99


def test_a_later_head_has_later_epochs(told: Told, tmp_path: Path, model: Path) -> None:
    for _ in range(20):  # more than a ring that breaks again and again counts in the time of a restart
        told.coordinator._next_epoch("broken", told.now)
    with pytest.MonkeyPatch.context() as patch:
        soon = time.time() + 1.0
        patch.setattr(time, "time", lambda: soon)
        later = Told(tmp_path, model, patch)
    assert later.epoch > told.epoch


def test_waiting_for_nodes_reads_the_model_once(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = Told(tmp_path, model, monkeypatch)
    num_plans = 0

    def planned(*arguments: object, **more: object) -> Planning:
        nonlocal num_plans
        num_plans += 1
        planning = plan_cluster(*arguments, **more)  # type: ignore[arg-type]
        return planning if num_plans > 1 else Planning(planning.model, missing_ranks=(1, 2))

    monkeypatch.setattr(module, "plan_cluster", planned)
    for _ in range(5):
        told.tick()
    assert num_plans == 1
    assert told.reason.count("is not there yet") == 2
    told.members[1].profile = control_pb2.NodeProfile(name="n1")
    told.serve()
    assert num_plans == 2


# -- the end of patience ----------------------------------------------------------------------------------


def test_a_failed_load_is_the_nodes_reason_and_not_its_absence(told: Told) -> None:
    told.coordinator._deadline = 3.0
    for rank in range(len(LAYERS)):
        told.say(rank)
    told.coordinator._try_plan({m.rank: m for m in told.members}, 0.0)
    told._assign_all({m.rank: m for m in told.members}, 0.0)
    told.say(2, state=control_pb2.FAILED, reason="the checkpoint lacks tensor 'x'")
    told.tick(1.0)  # it may be mended and started again
    assert told.reason == f"{told.members[2].label} failed: the checkpoint lacks tensor 'x'"
    with pytest.raises(UserError, match="failed: the checkpoint lacks tensor 'x'") as caught:
        told.tick(3.0)
    assert caught.value.exit_code == EXIT_ERROR


def test_a_node_that_never_comes_is_unreachable(told: Told) -> None:
    told.coordinator._deadline = 3.0
    told.say(0)
    told.tick(1.0)
    with pytest.raises(UserError, match=r"waited long enough \(--wait-s\): ") as caught:
        told.tick(3.0)
    assert caught.value.exit_code == EXIT_UNREACHABLE


def test_what_ends_the_head_is_said_by_its_last_line_alone(told: Told) -> None:
    told.coordinator._fail(UserError("it cannot be"))
    assert (told.status, told.reason) == ("degraded", "it cannot be")
    assert told.said == []
