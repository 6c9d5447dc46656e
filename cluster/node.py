"""One node: its compute thread, edges and present epoch. RPC threads call in; one lock guards the epoch."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from cluster.compute import ComputeThread
from cluster.config import ClusterConfig
from cluster.draft_load import DraftLoad
from cluster.draft_model import Fetch
from cluster.draft_queue import DraftEnd, DraftWork, OnDrafted
from cluster.drafter import DraftCall
from cluster.engine_status import fill_engine
from cluster.fault import injected_address
from cluster.load_bar import LoadBar
from cluster.logs import UNSAID, said
from cluster.memory_limits import MemoryNeed
from cluster.memory_status import fill_memory
from cluster.memory_watch import MemoryWatch
from cluster.node_model import NodeModel
from cluster.peer_links import PeerLinks
from cluster.recent_lines import RecentLines
from cluster.ring import NOT_ASSIGNED, EdgeSender, IncomingFrame
from cluster.routes import HEAD_RANK, Edge, Route, hello, refusal, route
from cluster.tls import Credentials
from cluster.usage import Usage
from cluster.work import LoadWork, StepWork, TrimWork
from planner.plan import Plan
from proto import control_pb2, ring_pb2
from proto.codec import Tensor

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Epoch:
    """What the head assigned, and what follows from it."""

    number: int
    head_incarnation: int
    plan: Plan
    plan_digest: str
    route: Route


class Node:
    """Everything of a node but its gRPC server. `on_result` gets the RESULT frames on rank 0."""

    def __init__(
        self,
        config: ClusterConfig,
        rank: int,
        *,
        credentials: Credentials | str | None,
        import_base_rss_bytes: int,
        recent: RecentLines | None = None,
    ) -> None:
        self.config, self.rank = config, rank
        self.recent = recent or RecentLines()  # log lines for the head
        self.credentials = Credentials.of(credentials)
        self.name = config.nodes[rank].name
        self.incarnation = time.time_ns()
        self.model = NodeModel(config, rank, self.credentials)
        self.links = PeerLinks(config, self.credentials)
        self.draft_files: tuple[Path, Fetch | None] | None = None  # rank 0: the draft model, once it is found
        self.draft: DraftLoad | None = None  # rank 0: what the plan says of it
        self._load_work: LoadWork | None = None
        self.on_result: Callable[[ring_pb2.Frame], None] = lambda _frame: None
        self.changed = threading.Condition()
        self.is_closing = False
        self.was_assigned = False
        self._import_base_rss_bytes = import_base_rss_bytes
        self._usage = Usage()
        self._lock = threading.RLock()
        self._epoch: Epoch | None = None
        self._senders: dict[Edge, EdgeSender] = {}
        self._up: set[Edge] = set()
        self._state = control_pb2.IDLE
        self._reason = ""
        self._lost_edge = ""
        self._ready_at = time.monotonic()
        self._compute = ComputeThread(
            self._on_output, self._on_loaded, self._on_failed, LoadBar(self.name).update
        )
        self._memory = MemoryWatch(on_change=self._notify, trim=lambda: self._compute.post(TrimWork()))

    # -- life ---------------------------------------------------------------------------------------------
    def start(self) -> None:
        """Start the compute thread and the watch over memory."""
        self._compute.start()
        self._memory.start()

    @property
    def model_dir(self) -> Path | None:
        """Where the model is on this machine, once that is known."""
        return self.model.folder

    def close(self, timeout_s: float) -> bool:
        """Leave the ring; False if the compute thread was still busy after `timeout_s`."""
        with self._lock:
            self.is_closing = True
            self._epoch = None
            senders = self._take_senders()
        self._notify()
        for sender in senders:
            sender.close()
        self._memory.close()
        return self._compute.stop(timeout_s)

    # -- what the head asks -------------------------------------------------------------------------------
    def assign(self, request: control_pb2.AssignRequest) -> control_pb2.AssignReply:
        """Take a plan and an epoch, or say why not. Raises ValueError for a plan that cannot be read."""
        if reason := self._why_not_mine(request):
            return control_pb2.AssignReply(reason=reason)
        plan = Plan.from_json(request.plan_json)
        if reason := self._why_no_plan(plan, request.plan_digest):
            return control_pb2.AssignReply(reason=reason)
        with self._lock:
            if self.is_closing:
                return control_pb2.AssignReply(reason=f"{self.name} is stopping")
            present = self._epoch
            if present is not None and present.head_incarnation == request.head_incarnation:
                if request.epoch == present.number:
                    return control_pb2.AssignReply(accepted=True)
                if request.epoch < present.number:
                    reason = f"epoch {request.epoch} is over; {self.name} is in epoch {present.number}"
                    return control_pb2.AssignReply(reason=reason, is_overtaken=True)
            old = self._take_senders()
            self._enter(plan, request)
        self._notify()
        for sender in old:
            sender.close()
        return control_pb2.AssignReply(accepted=True)

    def _why_not_mine(self, request: control_pb2.AssignRequest) -> str:
        """Why a head with another config or model is none of ours, or an empty string."""
        if request.config_digest != self.config.digest:
            return (
                f"{self.name} runs with another config (digest {self.config.digest}, the head's is "
                f"{request.config_digest}); copy the head's config there, give both the same --model, and "
                "restart it"
            )
        return self.model.refusal(request)

    def _why_no_plan(self, plan: Plan, announced_digest: str) -> str:
        if plan.digest != announced_digest:
            return f"the plan has digest {plan.digest}, but was announced as {announced_digest}"
        strangers = [a.rank for a in plan.assignments if a.rank >= len(self.config.nodes)]
        if strangers:
            return f"the plan gives layers to rank {strangers[0]}, which is not in the config"
        return ""

    def _enter(self, plan: Plan, request: control_pb2.AssignRequest) -> None:
        """From now on this epoch: load, and open the edges. Called with the lock held."""
        self.was_assigned = True
        mine = route(plan, self.rank)
        self._epoch = Epoch(request.epoch, request.head_incarnation, plan, request.plan_digest, mine)
        self._state, self._reason, self._lost_edge = control_pb2.LOADING, "", ""
        for told in request.addresses:
            if told.rank < len(self.config.nodes):
                self.links.tell(told.rank, told.addresses)
        part = mine.assignment
        need = None
        logger.info("epoch %d: layers %d:%d", request.epoch, *mine.layers)
        if part is not None:
            need = MemoryNeed(part.need_bytes, part.activation_bytes, part.budget_bytes, part.reserve_bytes)
            need = need if self.draft is None else need.with_drafter(self.draft.part)
        self._load_work = replace(self.model.load_work(request, mine.layers, need), drafter=self.draft)
        self._compute.post(self._load_work)
        for edge in mine.outgoing:
            self._senders[edge] = self._new_sender(edge, self._epoch)

    def leave(self, reason: str) -> None:
        """The head is gone: end every session and keep the weights."""
        with self._lock:
            present = self._epoch
            if present is None or self._load_work is None:
                return
            old = self._take_senders()
            logger.info("left epoch %d: %s", present.number, reason)
            self._epoch = None
            self._state, self._reason = control_pb2.IDLE, reason
            self._load_work = replace(self._load_work, epoch=-1, need=None, superseded=threading.Event())
            self._compute.post(self._load_work)
        self._notify()
        for sender in old:
            sender.close()

    def status(self) -> control_pb2.NodeStatus:
        """The present state; safe from any thread."""
        with self._lock:
            epoch, state, reason, lost_edge = self._epoch, self._state, self._reason, self._lost_edge
            senders = tuple(self._senders.values())
        hops = [(sender.to_rank, ms) for sender in senders for ms in sender.recent_hop_ms()]
        if state == control_pb2.CONNECTING and not reason:
            reason = "; ".join(sender.waiting_for for sender in senders if sender.waiting_for)
        compute, engine = self._compute, self._compute.engine
        start, stop = (0, 0) if epoch is None else epoch.route.layers
        status = control_pb2.NodeStatus(
            rank=self.rank,
            name=self.name,
            incarnation=self.incarnation,
            epoch=0 if epoch is None else epoch.number,
            state=control_pb2.DRAINING if self.is_closing else state,
            reason=reason,
            progress=compute.progress,
            busy_s=compute.busy_s,
            activity=compute.activity,
            loaded_bytes=compute.load.loaded_bytes,
            load_total_bytes=compute.load.total_bytes,
            import_base_rss_bytes=self._import_base_rss_bytes,
            cpu_s=self._usage.cpu_s,
            pid=os.getpid(),
            lost_edge=lost_edge,
            start=start,
            stop=stop,
            num_threads=threading.active_count(),
        )
        fill_memory(
            status,
            engine=engine,
            drafts=compute.drafts,
            limits=compute.limits,
            usage=self._usage,
            watch=self._memory,
        )
        for sender in senders:
            place = sender.place
            status.edges.add(
                to_rank=sender.to_rank,
                address=place.address,
                interface=place.interface,
                kind=place.kind,
                is_up=sender.is_up,
            )
        fetched = self.model.fetcher.result
        status.fetched_bytes, status.copied_bytes = fetched.from_hub, fetched.from_peers
        if (tls := self.credentials.tls) is not None:
            status.certificate_ends_s = tls.current().expires_at.timestamp()
            status.certificate_warning = tls.warning()
        if engine is not None:
            fill_engine(status, engine, compute, hops, self._ready_at)
        return status

    def beat(self) -> ring_pb2.Beat:
        """What this node's heartbeats carry."""
        compute = self._compute
        return ring_pb2.Beat(progress=compute.progress, busy_s=compute.busy_s, activity=compute.activity)

    # -- frames -------------------------------------------------------------------------------------------
    def feed(self, frame: ring_pb2.Frame) -> None:
        """Head only: put a frame into the ring. Never blocks."""
        with self._lock:
            epoch = self._epoch
            if epoch is None or epoch.number != frame.epoch or epoch.route.feed is None:
                return
            sender = self._senders.get(epoch.route.feed)
        if sender is None:
            self._compute.post(StepWork(frame, (), _nothing))
        else:
            sender.send(frame, ())

    def ask_drafter(self, epoch: int, call: DraftCall, on_drafted: OnDrafted) -> None:
        """Head only: have the draft model guess. Never blocks; see DraftWork for the answer."""
        self._compute.post(DraftWork(epoch, call, on_drafted))

    def end_drafts(self, session: int, is_over: bool) -> None:
        """Head only: the request ended; not is_over: it does without for a while."""
        self._compute.post(DraftEnd(session, is_over))

    def accept(self, got: ring_pb2.Hello) -> str | None:
        """Whether an incoming edge belongs here: None, NOT_ASSIGNED, or the sentence that refuses it."""
        with self._lock:
            epoch = self._epoch
            if epoch is None or got.epoch > epoch.number:
                return NOT_ASSIGNED
            digests = {"config_digest": self.config.digest, "plan_digest": epoch.plan_digest}
            return refusal(got, epoch.route, epoch=epoch.number, **digests)

    def on_frame(self, incoming: IncomingFrame) -> None:
        """A frame from another rank, on its stream's reader thread."""
        frame = incoming.frame
        if frame.kind == ring_pb2.RESULT:
            incoming.consume()
            self.on_result(frame)
        else:
            self._compute.post(StepWork(frame, incoming.tensors, incoming.consume))

    def on_edge_lost(self, got: ring_pb2.Hello, reason: str) -> None:
        """An incoming edge broke."""
        self._lose(got.epoch, reason)

    # -- callbacks ----------------------------------------------------------------------------------------
    def _new_sender(self, edge: Edge, epoch: Epoch) -> EdgeSender:
        opening = hello(
            edge,
            config_digest=self.config.digest,
            plan_digest=epoch.plan_digest,
            epoch=epoch.number,
            incarnation=self.incarnation,
        )
        peer = self.config.nodes[edge.to_rank]
        return EdgeSender(
            injected_address(edge.to_rank) or peer.address,
            self.credentials,
            opening,
            peer=peer.name,
            on_up=lambda: self._on_edge_up(epoch.number, edge),
            on_down=lambda reason: self._lose(epoch.number, reason),
            on_refused=lambda reason: self._lose(epoch.number, reason),
            beat=self.beat,
            places=lambda: self.links.places(edge.to_rank),
            silence_limit_s=self.config.silence_timeout_s,
        )

    def _take_senders(self) -> list[EdgeSender]:
        senders = list(self._senders.values())
        self._senders, self._up = {}, set()
        return senders

    def _on_output(self, frame: ring_pb2.Frame, tensors: list[Tensor]) -> None:
        with self._lock:
            epoch = self._epoch
            if epoch is None or epoch.number != frame.epoch or epoch.route.output is None:
                return
            sender = self._senders.get(epoch.route.output)
        if sender is not None:
            sender.send(frame, tensors)
        else:
            self.on_result(frame)  # the last stage is the head itself

    def _on_loaded(self, number: int) -> None:
        with self._lock:
            if self._epoch is None or self._epoch.number != number:
                return
            self._state, self._reason = control_pb2.CONNECTING, ""
            self._settle()
        self._notify()

    def _on_failed(self, number: int, reason: str) -> None:
        with self._lock:
            is_present = self._epoch is not None and self._epoch.number == number
            if is_present:
                self._state, self._reason = control_pb2.FAILED, reason
        if is_present:  # the head says what it hears of every node
            extra = UNSAID if self.rank == HEAD_RANK else said(f"[{self.name}] ")
            logger.error("%s", reason, extra=extra)
        self._notify()

    def _on_edge_up(self, number: int, edge: Edge) -> None:
        with self._lock:
            if self._epoch is None or self._epoch.number != number:
                return
            self._up.add(edge)
            self._settle()
        self._notify()

    def _settle(self) -> None:
        """Loaded, and every outgoing edge up: ready. Called with the lock held."""
        assert self._epoch is not None
        if self._state == control_pb2.CONNECTING and self._up.issuperset(self._epoch.route.outgoing):
            is_stage = self._epoch.route.assignment is not None or self._epoch.route.feed is not None
            self._state = control_pb2.READY if is_stage else control_pb2.IDLE
            logger.info("epoch %d: %s", self._epoch.number, "ready" if is_stage else "without layers")
            self._ready_at = time.monotonic()

    def _lose(self, number: int, reason: str) -> None:
        with self._lock:
            if self._epoch is None or self._epoch.number != number or self._lost_edge:
                return
            self._lost_edge = reason
            logger.warning("epoch %d: lost an edge: %s", number, reason, extra=UNSAID)
            if self._state == control_pb2.READY:
                self._state = control_pb2.CONNECTING
        self._notify()

    def _notify(self) -> None:
        with self.changed:
            self.changed.notify_all()


def _nothing() -> None:
    """The credit of a frame that never crossed the wire."""
