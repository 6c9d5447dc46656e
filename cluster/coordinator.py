"""Brings the ring up and keeps it up: waits for nodes, plans, proves the cuts, assigns, and counts epochs.

One thread, a tick every 100 ms or at once when a node's state changes. It alone decides that the ring serves.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum

import grpc

from cluster.config import ClusterConfig
from cluster.errors import EXIT_DOES_NOT_FIT, EXIT_ERROR, EXIT_UNREACHABLE, EXIT_USAGE, UserError
from cluster.head import Head
from cluster.membership import Member, Reach, Watcher
from cluster.node import Node
from cluster.planning import plan_cluster
from cluster.proof import prove
from cluster.rpc import connect
from cluster.scheduler import Limits
from planner.plan import Plan
from proto import control_pb2, control_pb2_grpc, head_pb2

logger = logging.getLogger(__name__)

TICK_S = 0.1
ASSIGN_AGAIN_S = 1.0
ASSIGN_TIMEOUT_S = 3.0
MIN_EPOCH_S = 0.5  # between two epochs while the ring is not serving
STOP_S = 0.5  # for the loop and the watchers to end


class Phase(Enum):
    """What `/health` says."""

    STARTING = "starting"
    LOADING = "loading"
    OK = "ok"
    DEGRADED = "degraded"


@dataclass(slots=True)
class _Joined:
    """A rank that was given the present epoch."""

    incarnation: int
    assigned_at: float
    is_accepted: bool = False
    reason: str = ""


@dataclass(slots=True)
class _View:
    """What outsiders may see, replaced as a whole."""

    phase: Phase = Phase.STARTING
    reason: str = "the head is starting"
    epoch: int = 0
    plan_json: str = ""
    changed_at: float = field(default_factory=time.monotonic)


class Coordinator:
    """The head's control loop. `on_fatal(error)` is called once when the ring can never serve."""

    def __init__(
        self,
        config: ClusterConfig,
        node: Node,
        *,
        wait_s: float | None,
        on_fatal: Callable[[UserError], None],
        say: Callable[[str], None],
    ) -> None:
        self._config, self._node = config, node
        self._on_fatal, self._say = on_fatal, say
        self._deadline = None if wait_s is None else time.monotonic() + wait_s
        self.changed = threading.Condition()
        self.head = Head(
            max_queued=config.api.queue,
            feed=node.feed,
            cluster_status=self.cluster_status,
            changed=self.changed,
        )
        node.on_result = self.head.on_result
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._watchers = [
            Watcher(n, config.digest, node.incarnation, node.token, self._wake.set)
            for n in config.nodes
            if n.use
        ]
        self._thread = threading.Thread(target=self._run, name="coordinator", daemon=True)
        self._plan: Plan | None = None
        self._plan_json = ""
        self._num_known = -1  # profiles, when the last plan lacked some
        self._missing_ranks: tuple[int, ...] = ()
        self._vocab_size = 0
        self._epoch = int(time.time() * 1e3)  # later than any of an earlier head: none makes one each ms
        self._epoch_at = 0.0
        self._joined: dict[int, _Joined] = {}
        self._is_serving = False
        self._has_served = False
        self._view = _View()

    # -- life ---------------------------------------------------------------------------------------------
    def start(self) -> None:
        """Start watching nodes; the node's own server is already listening."""
        for watcher in self._watchers:
            watcher.start()
        self._thread.start()

    def close(self) -> None:
        """End every request, then the loop and the watchers."""
        self._stopping.set()
        self._wake.set()
        self.head.close()
        for watcher in self._watchers:
            watcher.leave()
        deadline = time.monotonic() + STOP_S  # for all of them together: frozen nodes answer none
        for watcher in self._watchers:
            watcher.join(max(0.0, deadline - time.monotonic()))
        if self._thread.ident is not None:
            self._thread.join(max(0.0, deadline - time.monotonic()))

    # -- what others see ----------------------------------------------------------------------------------
    def cluster_status(self) -> head_pb2.ClusterStatus:
        """The whole cluster; safe from any thread."""
        view, now = self._view, time.monotonic()
        status = head_pb2.ClusterStatus(
            status=view.phase.value,
            epoch=view.epoch,
            plan_json=view.plan_json,
            reason=view.reason,
            incarnation=self._node.incarnation,
        )
        for watcher in self._watchers:
            member = watcher.member
            state, reason = self._describe(member)
            status.ranks.add(
                rank=member.rank,
                name=member.node.name,
                state=state,
                reason=reason,
                node=member.status,
                age_s=now - member.heard_at if member.heard_at else 0.0,
            )
        self.head.fill(status)
        return status

    def _describe(self, member: Member) -> tuple[str, str]:
        if member.reach is Reach.REFUSED:
            return "failed", member.reason
        if member.reach is not Reach.CONNECTED or member.status is None:
            return member.reach.value, member.reason
        joined = self._joined.get(member.rank)
        if joined is not None and joined.reason:
            return "failed", joined.reason
        status = member.status
        return control_pb2.NodeState.Name(status.state).lower(), status.reason or status.lost_edge

    def _show(self, phase: Phase, reason: str) -> None:
        view = self._view
        if (view.phase, view.reason, view.epoch) == (phase, reason, self._epoch):
            return
        self._view = _View(phase, reason, self._epoch, self._plan_json)
        self._say(phase.value if not reason else f"{phase.value}: {reason}")
        with self.changed:
            self.changed.notify_all()

    # -- the loop -----------------------------------------------------------------------------------------
    def _run(self) -> None:
        while not self._stopping.is_set():
            self._wake.wait(TICK_S)
            self._wake.clear()
            try:
                self._tick(time.monotonic())
            except UserError as error:
                self._fail(error)
                return
            except Exception as error:  # border of the thread: the head ends instead of hanging
                logger.exception("the coordinator failed")
                self._fail(UserError(f"the coordinator failed: {type(error).__name__}: {error}", EXIT_ERROR))
                return

    def _fail(self, error: UserError) -> None:
        self._show(Phase.DEGRADED, str(error))
        self.head.ring_down(str(error))
        self._on_fatal(error)

    def _tick(self, now: float) -> None:
        members = {watcher.member.rank: watcher.member for watcher in self._watchers}
        if self._plan is None and not self._try_plan(members, now):
            return
        broken = self._what_broke(members)
        if broken is not None and (self._is_serving or self._may_mend(now)):
            self._next_epoch(broken, now)
        self._assign_all(members, now)
        self._settle(members, now)

    def _try_plan(self, members: Mapping[int, Member], now: float) -> bool:
        if self._node.model_dir is None:
            self._show(Phase.STARTING, f"fetching {self._config.model}")
            return False
        measured = {rank: member.profile for rank, member in members.items()}
        num_known = sum(profile is not None for profile in measured.values())
        if num_known == self._num_known:  # the model's files need not be read ten times a second
            self._wait_for([members[rank] for rank in self._missing_ranks], now)
            return False
        try:
            planning = plan_cluster(self._config, self._node.model_dir, measured)
        except ValueError as error:
            raise UserError(str(error), EXIT_USAGE) from error
        if planning.refusal:
            raise UserError(planning.refusal, EXIT_DOES_NOT_FIT)
        if planning.plan is None:
            self._num_known, self._missing_ranks = num_known, planning.missing_ranks
            self._wait_for([members[rank] for rank in planning.missing_ranks], now)
            return False
        self._say(planning.table)
        self._show(Phase.STARTING, "proving the plan's cuts on a tiny model of the same architecture")
        prove(self._node.model_dir, planning.plan, self._stopping)
        if self._stopping.is_set():
            return False
        self._plan, self._plan_json = planning.plan, planning.plan.to_json()
        self._vocab_size = planning.model.vocab_size
        self._epoch_at = now
        return True

    def _wait_for(self, missing: list[Member], now: float) -> None:
        reasons = "; ".join(m.reason or f"{m.label} is not there yet" for m in missing)
        self._show(Phase.DEGRADED if self._has_served else Phase.STARTING, reasons)
        self._check_deadline(now, reasons)

    def _check_deadline(self, now: float, reasons: str) -> None:
        if self._deadline is not None and now > self._deadline and not self._has_served:
            raise UserError(f"waited long enough (--wait-s): {reasons}", EXIT_UNREACHABLE)

    @property
    def _needed(self) -> set[int]:
        """Ranks without which nothing can be served: the head and those that own layers."""
        assert self._plan is not None
        return {self._node.rank} | {a.rank for a in self._plan.assignments}

    def _may_mend(self, now: float) -> bool:
        """A new epoch can only help once all that it needs have joined this one."""
        return now - self._epoch_at > MIN_EPOCH_S and all(map(self._has_joined, self._needed))

    def _has_joined(self, rank: int) -> bool:
        joined = self._joined.get(rank)
        return joined is not None and joined.is_accepted

    def _what_broke(self, members: Mapping[int, Member]) -> str | None:
        for rank, joined in self._joined.items():
            if rank not in self._needed or not joined.is_accepted:
                continue
            member = members[rank]
            if member.reach is not Reach.CONNECTED:
                return member.reason
            status = member.status
            assert status is not None
            if status.incarnation != joined.incarnation:
                return f"{member.label} was restarted"
            if status.epoch != self._epoch:
                if self._is_serving:  # it was seen in this epoch
                    return f"{member.label} left the ring{status.reason and ': '}{status.reason}"
                continue  # an older status is still on its way
            if status.lost_edge:
                return f"{member.label} lost an edge: {status.lost_edge}"
            if self._is_serving and status.state == control_pb2.FAILED:
                return f"{member.label} failed: {status.reason}"
            if self._is_serving and (stall := self._stall(member)):
                return stall
        return None

    def _stall(self, member: Member) -> str:
        """What keeps the node's compute thread for too long, or an empty string."""
        status = member.status
        if status is None or status.busy_s <= self._config.stall_timeout_s:
            return ""
        return f"{member.label} has been {status.activity} for {status.busy_s:.0f} s without progress"

    def _next_epoch(self, reason: str, now: float) -> None:
        was_serving, self._is_serving = self._is_serving, False
        self._epoch += 1
        self._epoch_at = now
        self._joined.clear()
        if was_serving:
            self.head.ring_down(f"the ring broke: {reason}; send the request again when it serves")
        self._show(Phase.DEGRADED if self._has_served else Phase.LOADING, reason)

    def _assign_all(self, members: Mapping[int, Member], now: float) -> None:
        assert self._plan is not None
        due: list[Member] = []
        for rank, member in members.items():
            joined, status = self._joined.get(rank), member.status
            if member.reach is not Reach.CONNECTED or status is None:
                continue
            is_there = status.epoch == self._epoch and joined is not None and joined.is_accepted
            if not is_there and (joined is None or now - joined.assigned_at > ASSIGN_AGAIN_S):
                due.append(member)
        if not due:
            return
        request = control_pb2.AssignRequest(
            epoch=self._epoch,
            config_digest=self._config.digest,
            plan_json=self._plan_json,
            plan_digest=self._plan.digest,
            model_digest=self._node.model_digest,
            head_incarnation=self._node.incarnation,
            revision=self._node.revision,
        )
        channels = [connect(member.address, self._node.token) for member in due]
        calls = [
            control_pb2_grpc.ControlStub(channel).Assign.future(request, timeout=ASSIGN_TIMEOUT_S)
            for channel in channels
        ]
        for member, call, channel in zip(due, calls, channels, strict=True):
            assert member.status is not None
            joined = _Joined(member.status.incarnation, now)
            try:
                reply = call.result()
                joined.is_accepted, joined.reason = reply.accepted, reply.reason
            except grpc.RpcError:
                joined.reason = ""  # the watcher says what is wrong with it
            finally:
                channel.close()
            self._joined[member.rank] = joined

    def _settle(self, members: Mapping[int, Member], now: float) -> None:
        """Serve when every needed rank is ready in this epoch; else say what is waited for."""
        assert self._plan is not None
        waiting: list[str] = []
        is_loading = True
        for rank in sorted(self._needed):
            member = members[rank]
            joined, status = self._joined.get(rank), member.status
            if member.reach is not Reach.CONNECTED or status is None:
                waiting.append(member.reason or f"{member.label} is not there yet")
                is_loading = False
            elif joined is not None and joined.reason:
                waiting.append(joined.reason)
                is_loading = False
            elif status.epoch == self._epoch and status.state == control_pb2.FAILED:
                if rank == self._node.rank and not self._has_served:
                    raise UserError(status.reason, EXIT_ERROR)  # no other node's restart can mend it
                waiting.append(f"{member.label} failed: {status.reason}")
                is_loading = False
            elif status.epoch == self._epoch and (stall := self._stall(member)):
                waiting.append(stall)
            elif status.epoch == self._epoch and status.lost_edge:
                waiting.append(f"{member.label} lost an edge: {status.lost_edge}")
            elif (
                not self._has_joined(rank)
                or status.epoch != self._epoch
                or status.state != control_pb2.READY
                or status.incarnation != self._joined[rank].incarnation
            ):
                waiting.append(f"{member.label} is {_state_word(status)}")
        if not waiting:
            if not self._is_serving:
                self._serve()
            return
        if self._is_serving:
            return  # a status of the present epoch that is not READY comes with a reason: _what_broke
        phase = Phase.DEGRADED if self._has_served else (Phase.LOADING if is_loading else Phase.STARTING)
        self._show(phase, "; ".join(waiting))
        self._check_deadline(now, "; ".join(waiting))

    def _serve(self) -> None:
        assert self._plan is not None
        plan = self._plan
        self._is_serving = self._has_served = True
        self.head.ring_up(
            self._epoch,
            Limits(
                context=plan.context,
                max_active=plan.concurrency,
                max_in_flight=len(plan.assignments) + 1,
                vocab_size=self._vocab_size,
            ),
        )
        self._show(Phase.OK, "")


def _state_word(status: control_pb2.NodeStatus) -> str:
    word = control_pb2.NodeState.Name(status.state).lower()
    if status.state == control_pb2.LOADING and status.load_total_bytes:
        word = status.activity if status.activity == "fetching" else word
        return f"{word} ({status.loaded_bytes / 1e9:.2f} of {status.load_total_bytes / 1e9:.2f} GB)"
    return word
