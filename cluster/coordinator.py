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

from cluster.abilities import abilities_of
from cluster.assigner import Assigner
from cluster.config import ClusterConfig
from cluster.draft_load import DraftLoad
from cluster.draft_model import read_drafter
from cluster.errors import EXIT_DOES_NOT_FIT, EXIT_ERROR, EXIT_UNREACHABLE, EXIT_USAGE, UserError
from cluster.head import Head
from cluster.log_book import LogBook
from cluster.membership import Member, Reach, Watcher, short_of_memory
from cluster.node import Node
from cluster.plan_choices import AS_IN_FILE, PlanChoices
from cluster.planning import plan_cluster
from cluster.proof import Prover
from cluster.ring_limits import RingLimits
from cluster.roll_call import RollCall
from planner.plan import Plan
from proto import control_pb2, head_pb2

logger = logging.getLogger(__name__)

TICK_S = 0.1
MIN_EPOCH_S = 0.5  # between two epochs while the ring is not serving
STOP_S = 0.5  # for the loop and the watchers to end


class Phase(Enum):
    """What `/health` says."""

    STARTING = "starting"
    LOADING = "loading"
    OK = "ok"
    DEGRADED = "degraded"


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
        choices: PlanChoices = AS_IN_FILE,
    ) -> None:
        self._config, self._node, self._choices = config, node, choices
        self._on_fatal, self._say = on_fatal, say
        self._deadline = None if wait_s is None else time.monotonic() + wait_s
        self.changed = threading.Condition()
        logs = LogBook({n.rank: n.name for n in config.nodes if n.use})
        self.head = Head(
            max_queued=config.api.queue,
            queue_timeout_s=config.api.queue_timeout_s,
            feed=node.feed,
            cluster_status=self.cluster_status,
            changed=self.changed,
            logs=logs,
            ask_drafter=node.ask_drafter,
            end_drafts=node.end_drafts,
        )
        node.on_result = self.head.on_result
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._watchers = [
            Watcher(
                n,
                config.digest,
                node.incarnation,
                node.credentials,
                self._wake.set,
                logs=logs,
                silence_limit_s=config.silence_timeout_s,
            )
            for n in config.nodes
            if n.use
        ]
        self._thread = threading.Thread(target=self._run, name="coordinator", daemon=True)
        self._plan: Plan | None = None
        self._plan_json = ""
        self._num_known = -1  # profiles, when the last plan lacked some
        self._missing_ranks: tuple[int, ...] = ()
        self._ring_limits: RingLimits | None = None
        self._epoch = int(time.time() * 1e3)  # later than any of an earlier head: none makes one each ms
        self._epoch_at = 0.0
        self._incarnation = node.incarnation  # what the epochs are counted under
        self._assigner = Assigner(node.credentials, self._wake.set)
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
        if not self._thread.is_alive():
            self._assigner.begin()

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
        joined = self._assigner.joined.get(member.rank)
        if joined is not None and joined.reason:
            return "failed", joined.reason
        status = member.status
        return control_pb2.NodeState.Name(status.state).lower(), status.reason or status.lost_edge

    def _show(self, phase: Phase, reason: str, *, is_said: bool = True) -> None:
        view = self._view
        if (view.phase, view.reason, view.epoch) == (phase, reason, self._epoch):
            return
        self._view = _View(phase, reason, self._epoch, self._plan_json)
        if is_said:
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
        self.head.ring_down(str(error))
        self._show(Phase.DEGRADED, str(error), is_said=False)  # run_node's last line says it
        self._on_fatal(error)

    def _tick(self, now: float) -> None:
        members = {watcher.member.rank: watcher.member for watcher in self._watchers}
        if self._plan is None and not self._try_plan(members, now):
            return
        self._assigner.collect()
        broken = self._roll_call(members).what_broke()
        if broken is not None and (self._is_serving or self._may_mend(now)):
            self._next_epoch(broken, now)
        self._assign_all(members, now)
        self._settle(self._roll_call(members), now)
        self.head.expire()
        self.head.hold(short_of_memory(members[rank] for rank in self._needed))

    def _roll_call(self, members: Mapping[int, Member]) -> RollCall:
        return RollCall(
            epoch=self._epoch,
            is_serving=self._is_serving,
            needed=self._needed,
            members=members,
            joined=self._assigner.joined,
            stall_timeout_s=self._config.stall_timeout_s,
        )

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
            prover = Prover(self._node.model_dir, self._stopping, self._starting)
            files, model_dir = self._node.draft_files, self._node.model_dir
            draft = None if files is None else read_drafter(self._config, files[0], model_dir)
            planning = plan_cluster(self._config, model_dir, measured, prover, self._choices, draft=draft)
        except ValueError as error:
            raise UserError(str(error), EXIT_USAGE) from error
        if planning.refusal:
            raise UserError(planning.refusal, EXIT_DOES_NOT_FIT)
        if planning.plan is None:
            self._num_known, self._missing_ranks = num_known, planning.missing_ranks
            self._wait_for([members[rank] for rank in planning.missing_ranks], now)
            return False
        if self._stopping.is_set():
            return False
        speculation = self._config.speculation
        self._ring_limits = RingLimits(
            planning.plan,
            planning.model,
            planning.rows,
            planning.chunks,
            self._config.max_batch_size,
            max_drafts=speculation.max_draft_tokens if speculation.is_on else 0,
            has_ngrams=speculation.has_ngrams,
            draft=draft,
        )
        if files is not None and draft is not None and planning.plan.drafter is not None:
            vocab_size = planning.model.vocab_size
            self._node.draft = DraftLoad(draft, planning.plan.drafter, files[0], vocab_size, files[1])
        self._say(planning.table)
        self._plan, self._plan_json = planning.plan, planning.plan.to_json()
        self.head.predicted = planning.predicted
        self.head.abilities = abilities_of(planning.model, model_dir, prover)
        self.head.planned_from = head_pb2.PlanningReply(
            planning_json=planning.planned_from, config_digest=self._config.digest
        )
        self._epoch_at = now
        return True

    def _starting(self, reason: str) -> None:
        self._show(Phase.STARTING, reason)

    def _wait_for(self, missing: list[Member], now: float) -> None:
        reasons = "; ".join(m.reason or f"{m.label} is not there yet" for m in missing)
        self._show(Phase.DEGRADED if self._has_served else Phase.STARTING, reasons)
        self._check_deadline(now, reasons)

    def _check_deadline(self, now: float, reasons: str) -> None:
        if self._deadline is not None and now > self._deadline and not self._has_served:
            raise UserError(f"waited long enough (--wait-s): {reasons}", EXIT_UNREACHABLE)

    @property
    def _needed(self) -> frozenset[int]:
        """Ranks without which nothing can be served: the head and those that own layers."""
        assert self._plan is not None
        return frozenset({self._node.rank} | {a.rank for a in self._plan.assignments})

    def _may_mend(self, now: float) -> bool:
        """A new epoch can only help once all that it needs have joined this one."""
        return now - self._epoch_at > MIN_EPOCH_S and all(map(self._assigner.has_joined, self._needed))

    def _next_epoch(self, reason: str, now: float) -> None:
        was_serving, self._is_serving = self._is_serving, False
        self._epoch += 1
        self._epoch_at = now
        self._assigner.begin()
        if was_serving:
            self.head.ring_down(f"the ring broke: {reason}; send the request again when it serves")
        self._show(Phase.DEGRADED if self._has_served else Phase.LOADING, reason)

    def _assign_all(self, members: Mapping[int, Member], now: float) -> None:
        assert self._plan is not None
        assigner = self._assigner
        if assigner.is_overtaken:  # no number of ours is sure to be later, but a new incarnation's are
            self._incarnation = time.time_ns()
            self._next_epoch("a node was given a later epoch than this head's", now)
        due = [
            member
            for rank, member in members.items()
            if member.reach is Reach.CONNECTED
            and member.status is not None
            and not (member.status.epoch == self._epoch and assigner.has_joined(rank))
            and assigner.is_due(rank, now)
        ]
        if not due:
            return
        request = control_pb2.AssignRequest(
            epoch=self._epoch,
            config_digest=self._config.digest,
            plan_json=self._plan_json,
            plan_digest=self._plan.digest,
            model_digest=self._node.model.digest,
            head_incarnation=self._incarnation,
            revision=self._node.model.revision,
            file_samples=self._node.model.samples,
            addresses=[
                control_pb2.RankAddresses(rank=rank, addresses=member.profile.addresses)
                for rank, member in members.items()
                if member.profile is not None
            ],
        )
        assigner.send(due, request, now)

    def _settle(self, roll: RollCall, now: float) -> None:
        """Serve when every needed rank is ready in this epoch; else say what is waited for."""
        waiting = roll.waiting()
        if waiting is None:
            if not self._is_serving:
                self._serve(roll.members)
            return
        if self._is_serving:
            return  # a status of the present epoch that is not READY comes with a reason: what_broke
        if not self._has_served and (reason := roll.failure_of(self._node.rank)):
            raise UserError(reason, EXIT_ERROR)  # no other node's restart can mend it
        phase = (
            Phase.DEGRADED if self._has_served else Phase.LOADING if waiting.is_loading else Phase.STARTING
        )
        self._show(phase, str(waiting))
        is_late = self._deadline is not None and now > self._deadline and not self._has_served
        if is_late and (failed := roll.failures()):
            raise UserError(failed[0], EXIT_ERROR)  # waiting longer would not have helped
        self._check_deadline(now, str(waiting))

    def _serve(self, members: Mapping[int, Member]) -> None:
        assert self._plan is not None
        assert self._ring_limits is not None
        self._is_serving = self._has_served = True
        parts = (members[part.rank].status for part in self._plan.assignments)
        limits = self._ring_limits.limits(status for status in parts if status is not None)
        self.head.ring_up(self._epoch, limits)
        self._show(Phase.OK, "")
