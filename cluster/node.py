"""One node: its compute thread, edges and present epoch. RPC threads call in; one lock guards the epoch."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from cluster.compute import ComputeThread, LoadWork, StepWork
from cluster.config import ClusterConfig
from cluster.load_bar import LoadBar
from cluster.memory_limits import MemoryNeed
from cluster.ring import NOT_ASSIGNED, EdgeSender, IncomingFrame
from cluster.routes import Edge, Route, hello, refusal, route
from cluster.usage import Usage
from planner.adapters import digest_with
from planner.headers import model_digest
from planner.plan import Plan
from proto import control_pb2, ring_pb2
from proto.codec import Tensor
from shard_loader.shard_cache import CacheSettings

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
        self, config: ClusterConfig, rank: int, *, token: str | None, import_base_rss_bytes: int
    ) -> None:
        self.config, self.rank, self.token = config, rank, token
        self.name = config.nodes[rank].name
        self.incarnation = time.time_ns()
        self.model_dir: Path | None = None
        self.model_digest = ""
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

    # -- life ---------------------------------------------------------------------------------------------
    def start(self) -> None:
        """Start the compute thread."""
        self._compute.start()

    def set_model(self, model_dir: Path) -> None:
        """The model's files are here and whole; from now on plans are accepted."""
        self.model_digest = digest_with(model_digest(model_dir), self.config.adapters)
        self.model_dir = model_dir

    def close(self, timeout_s: float) -> bool:
        """Leave the ring; False if the compute thread was still busy after `timeout_s`."""
        with self._lock:
            self.is_closing = True
            self._epoch = None
            senders = self._take_senders()
        self._notify()
        for sender in senders:
            sender.close()
        return self._compute.stop(timeout_s)

    # -- what the head asks -------------------------------------------------------------------------------
    def assign(self, request: control_pb2.AssignRequest) -> str:
        """Take a plan and an epoch; returns why not, or an empty string."""
        if request.config_digest != self.config.digest:
            return (
                f"{self.name} runs with another config (digest {self.config.digest}, the head's is "
                f"{request.config_digest}); copy the head's config there and restart it"
            )
        if self.model_dir is None:
            return f"{self.name} is still fetching the model"
        if request.model_digest != self.model_digest:
            return (
                f"{self.name} has other files for {self.config.model} (digest {self.model_digest}, the "
                f"head's is {request.model_digest}); give every node the same revision"
                + (" and the same adapters" if self.config.adapters else "")
            )
        plan = Plan.from_json(request.plan_json)
        if plan.digest != request.plan_digest:
            return f"the plan has digest {plan.digest}, but was announced as {request.plan_digest}"
        strangers = [a.rank for a in plan.assignments if a.rank >= len(self.config.nodes)]
        if strangers:
            return f"the plan gives layers to rank {strangers[0]}, which is not in the config"
        with self._lock:
            if self.is_closing:
                return f"{self.name} is stopping"
            present = self._epoch
            if present is not None and present.head_incarnation == request.head_incarnation:
                if request.epoch == present.number:
                    return ""
                if request.epoch < present.number:
                    return f"epoch {request.epoch} is over; this node is in epoch {present.number}"
            old = self._take_senders()
            self.was_assigned = True
            mine = route(plan, self.rank)
            self._epoch = Epoch(request.epoch, request.head_incarnation, plan, request.plan_digest, mine)
            self._state, self._reason, self._lost_edge = control_pb2.LOADING, "", ""
            start, stop = mine.layers
            part = mine.assignment
            need = None
            if part is not None:
                need = MemoryNeed(part.need_bytes, part.budget_bytes, part.reserve_bytes)
            self._compute.post(self._load_work(request.epoch, self.model_dir, (start, stop), need))
            for edge in mine.outgoing:
                self._senders[edge] = self._new_sender(edge, self._epoch)
        self._notify()
        for sender in old:
            sender.close()
        return ""

    def leave(self, reason: str) -> None:
        """The head is gone: end every session and keep the weights."""
        with self._lock:
            present = self._epoch
            if present is None or self.model_dir is None:
                return
            old = self._take_senders()
            self._epoch = None
            self._state, self._reason = control_pb2.IDLE, reason
            start, stop = present.route.layers
            self._compute.post(self._load_work(-1, self.model_dir, (start, stop), None))
        self._notify()
        for sender in old:
            sender.close()

    def status(self) -> control_pb2.NodeStatus:
        """The present state; safe from any thread."""
        with self._lock:
            epoch, state, reason, lost_edge = self._epoch, self._state, self._reason, self._lost_edge
            hops = [ms for sender in self._senders.values() for ms in sender.recent_hop_ms()]
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
            active_bytes=mx.get_active_memory(),
            peak_bytes=mx.get_peak_memory(),
            peak_rss_bytes=self._usage.peak_rss_bytes,
            import_base_rss_bytes=self._import_base_rss_bytes,
            cpu_s=self._usage.cpu_s,
            pid=os.getpid(),
            lost_edge=lost_edge,
            start=start,
            stop=stop,
            num_threads=threading.active_count(),
        )
        if engine is not None:
            part, stats = engine.shard.footprint, engine.stats
            status.footprint.layers_bytes = part.layers_bytes
            status.footprint.embed_bytes = part.embed_bytes
            status.footprint.norm_bytes = part.norm_bytes
            status.footprint.head_bytes = part.head_bytes
            status.footprint.other_bytes = part.other_bytes
            status.footprint.full_model_bytes = part.full_model_bytes
            status.num_sessions = len(engine.sessions)
            status.kv_bytes = engine.kv_bytes
            status.stats.num_steps = stats.num_steps
            status.stats.num_tokens = stats.num_tokens
            status.stats.busy_ms = stats.busy_ms
            status.stats.uptime_ms = (time.monotonic() - self._ready_at) * 1e3
            status.stats.recent_step_ms.extend(list(stats.recent_step_ms))
            status.stats.recent_hop_ms.extend(hops)
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

    def accept(self, got: ring_pb2.Hello) -> str | None:
        """Whether an incoming edge belongs here: None, NOT_ASSIGNED, or the sentence that refuses it."""
        with self._lock:
            epoch = self._epoch
            if epoch is None or got.epoch > epoch.number:
                return NOT_ASSIGNED
            return refusal(
                got,
                epoch.route,
                config_digest=self.config.digest,
                plan_digest=epoch.plan_digest,
                epoch=epoch.number,
            )

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

    def _load_work(
        self, epoch: int, model_dir: Path, layers: tuple[int, int], need: MemoryNeed | None
    ) -> LoadWork:
        config, load = self.config, self.config.load
        cache = CacheSettings.of(load.cache, load.cache_dir, load.cache_gb)
        return LoadWork(
            epoch, model_dir, self.model_digest, *layers, need, load.options, config.adapters, cache
        )

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
            peer.address,
            self.token,
            opening,
            on_up=lambda: self._on_edge_up(epoch.number, edge),
            on_down=lambda reason: self._lose(epoch.number, reason),
            on_refused=lambda reason: self._lose(epoch.number, reason),
            beat=self.beat,
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
            self._state = control_pb2.CONNECTING
            self._settle()
        self._notify()

    def _on_failed(self, number: int, reason: str) -> None:
        with self._lock:
            if self._epoch is not None and self._epoch.number == number:
                self._state, self._reason = control_pb2.FAILED, reason
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
            self._ready_at = time.monotonic()

    def _lose(self, number: int, reason: str) -> None:
        with self._lock:
            if self._epoch is None or self._epoch.number != number or self._lost_edge:
                return
            self._lost_edge = reason
            if self._state == control_pb2.READY:
                self._state = control_pb2.CONNECTING
        self._notify()

    def _notify(self) -> None:
        with self.changed:
            self.changed.notify_all()


def _nothing() -> None:
    """The credit of a frame that never crossed the wire."""
