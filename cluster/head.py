"""The head service: clients in, tokens out. One lock holds the scheduler; nothing under it blocks."""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from queue import SimpleQueue

import grpc

from cluster.draft_queue import OnDrafted
from cluster.drafter import DraftCall
from cluster.instructions import Draft, Emit, EndDrafts, Fail, FailureKind, Instruction, Send, Start
from cluster.log_book import LogBook
from cluster.log_line import checked_id
from cluster.request import Request
from cluster.request_log import RequestLog
from cluster.room import Limits
from cluster.sampler import validate
from cluster.scheduler import Scheduler
from proto import head_pb2, head_pb2_grpc, ring_pb2
from proto.codec import MAX_HEADER_BYTES

logger = logging.getLogger(__name__)

STATUS_INTERVAL_S = 0.2
HOLD_LIMIT_S = 30.0  # requests that wait while none may start are refused after so long
# A frame's header holds what a request says and what it is told, besides ids and positions.
MAX_ADAPTER_CHARS = 128
MAX_SAMPLING_BYTES = MAX_HEADER_BYTES - (64 << 10)
MAX_TOP_LOGPROBS = 1024
MAX_WATCHERS = 16  # each holds a worker, and requests need those

_STATUS_CODES = {
    FailureKind.INVALID: grpc.StatusCode.INVALID_ARGUMENT,
    FailureKind.BUSY: grpc.StatusCode.RESOURCE_EXHAUSTED,
    FailureKind.UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    FailureKind.FAILED: grpc.StatusCode.INTERNAL,
    FailureKind.CANCELLED: grpc.StatusCode.CANCELLED,
}


@dataclass(slots=True)
class _Client:
    """One Generate call that waits for its tokens."""

    inbox: SimpleQueue[Emit | Fail | None] = field(default_factory=SimpleQueue)
    submitted_at: float = field(default_factory=time.monotonic)
    started_at: float = 0.0  # its first chunk entered the ring
    is_gone: bool = False
    is_finished: bool = False  # it has all it wanted, before the last token


class Head(head_pb2_grpc.HeadServicer):
    """Holds the scheduler, feeds the ring, and hands tokens to the clients that wait for them.

    `feed(frame)` puts a frame into the ring and never blocks; `cluster_status()` is the coordinator's view.
    """

    def __init__(
        self,
        *,
        max_queued: int,
        feed: Callable[[ring_pb2.Frame], None],
        cluster_status: Callable[[], head_pb2.ClusterStatus],
        changed: threading.Condition,
        logs: LogBook | None = None,
        ask_drafter: Callable[[int, DraftCall, OnDrafted], None] | None = None,
        end_drafts: Callable[[int], None] | None = None,
    ) -> None:
        self._ask_drafter, self._end_drafts = ask_drafter, end_drafts
        self._asked_at: dict[int, float] = {}  # the draft model, by session
        self._logs = logs or LogBook({})
        self._scheduler = Scheduler(max_queued=max_queued)
        self._feed = feed
        self._cluster_status = cluster_status
        self._changed = changed
        self._lock = threading.Lock()
        self._clients: dict[str, _Client] = {}
        self._errors: Counter[str] = Counter()  # by FailureKind's value; empty: none
        self._limits: Limits | None = None
        self._sent_at: dict[int, float] = {}  # frames in the ring, by their number
        self._watchers = threading.BoundedSemaphore(MAX_WATCHERS)
        self._is_closing = False
        self._held_since: float | None = None
        self.predicted: Mapping[int, head_pb2.PredictedMemory] = {}  # by rank, once there is a plan
        self.planned_from = head_pb2.PlanningReply()  # what the plan was made from, once there is one

    # -- the ring's side ----------------------------------------------------------------------------------
    def ring_up(self, epoch: int, limits: Limits) -> None:
        """The ring of this epoch is ready."""
        with self._lock:
            if self._is_closing:
                return
            self._limits = limits
            self._scheduler.ring_up(epoch, limits)

    def ring_down(self, reason: str) -> None:
        """The ring broke: every request ends with `reason`."""
        with self._lock:
            self._sent_at.clear()
            self._asked_at.clear()
            self._carry_out(self._scheduler.ring_down(reason))

    def hold(self, reason: str) -> None:
        """Start no new request while there is a reason; what runs goes on. Called again and again."""
        now = time.monotonic()
        with self._lock:
            if not reason and self._held_since is None:
                return
            self._carry_out(self._scheduler.hold(reason))
            self._held_since = (self._held_since or now) if reason else None
            if self._held_since is not None and now - self._held_since > HOLD_LIMIT_S:
                self._carry_out(self._scheduler.refuse_queued())

    def on_result(self, frame: ring_pb2.Frame) -> None:
        """A RESULT frame, on whatever thread received it."""
        now = time.monotonic()
        with self._lock:
            sent_at = self._sent_at.pop(frame.seq, now)
            trip_ms = (now - sent_at) * 1e3
            self._carry_out(self._scheduler.on_result(frame.epoch, frame.seq, frame.slots, trip_ms))

    def on_drafted(self, session: int, position: int, ids: list[int]) -> None:
        """The draft model's answer, on the compute thread."""
        now = time.monotonic()
        with self._lock:
            draft_ms = (now - self._asked_at.get(session, now)) * 1e3
            self._carry_out(self._scheduler.on_drafted(session, position, ids, draft_ms))

    def close(self) -> None:
        """End every client with a sentence; handlers return."""
        self._is_closing = True
        self.ring_down("the head is stopping; send the request again when it is back")
        with self._changed:
            self._changed.notify_all()

    def fill(self, status: head_pb2.ClusterStatus) -> None:
        """Add the scheduler's numbers and the plan's predictions to a cluster status."""
        for rank in status.ranks:
            if rank.rank in self.predicted:
                rank.predicted.CopyFrom(self.predicted[rank.rank])
        with self._lock:
            scheduler, counters = self._scheduler, self._scheduler.counters
            status.num_active, status.num_queued = scheduler.num_active, scheduler.num_queued
            status.num_requests = counters.num_requests
            status.num_prompt_tokens = counters.num_prompt_tokens
            status.num_kept, status.num_cached_tokens = scheduler.num_kept, counters.num_cached_tokens
            status.num_prompts, status.num_cached_prompts = counters.num_prompts, counters.num_cached_prompts
            status.num_completion_tokens = counters.num_completion_tokens
            speculation = scheduler.speculation
            status.num_guessed, status.num_guessed_right = speculation.num_guessed, speculation.num_right
            status.num_failed = counters.num_failed
            for kind in FailureKind:
                status.errors.add(kind=kind.value, count=self._errors[kind.value])
            status.requests.extend(map(self._request_status, scheduler.requests))
            if self._limits is not None:
                # Of small ones more run than whole contexts fit.
                status.max_active = max(self._limits.max_active, scheduler.num_active)
                status.context = self._limits.context
                status.vocab_size = self._limits.vocab_size

    def _request_status(self, request: Request) -> head_pb2.RequestStatus:
        """With the lock held."""
        client = self._clients.get(request.request_id)
        return head_pb2.RequestStatus(
            id=request.request_id,
            state=request.state,
            prompt_tokens=len(request.prompt),
            prefilled_tokens=min(request.num_sent, len(request.prompt)),
            completion_tokens=request.num_completion,
            max_tokens=request.max_tokens,
            age_s=0.0 if client is None else time.monotonic() - client.submitted_at,
            adapter=request.adapter,
        )

    # -- the clients' side: RPC handler threads -----------------------------------------------------------
    def Generate(  # noqa: N802
        self, request: head_pb2.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[head_pb2.GenerateReply]:
        """Tokens as they come; leaving the stream cancels the request on every stage."""
        request_id = request.request_id or uuid.uuid4().hex
        client = _Client()
        log = RequestLog(checked_id(request.trace_id or request_id), len(request.prompt))
        try:
            yield from self._answer(request_id, client, request, context, log)
        finally:
            if client.is_finished:
                log.enough()
            self._count(log.kind)
            log.end(client.submitted_at, client.started_at)

    def _answer(
        self,
        request_id: str,
        client: _Client,
        request: head_pb2.GenerateRequest,
        context: grpc.ServicerContext,
        log: RequestLog,
    ) -> Iterator[head_pb2.GenerateReply]:
        if not context.add_callback(lambda: self._leave(request_id, client)):
            return
        self._submit(request_id, client, request, log.trace_id)
        first_ms = 0.0
        while True:
            item = client.inbox.get()
            if item is None:
                return  # the client left
            if isinstance(item, Fail):
                log.fail(item)
                context.abort(_STATUS_CODES[item.kind], item.message)
            assert isinstance(item, Emit)
            reply = head_pb2.GenerateReply(tokens=[item.token], finish_reason=item.finish_reason)
            if item.num_completion == 1 or item.finish_reason:
                if item.num_completion == 1:
                    first_ms = (time.monotonic() - client.started_at) * 1e3
                    log.first_s = first_ms / 1e3
                reply.prompt_tokens, reply.completion_tokens = item.num_prompt, item.num_completion
                reply.cached_tokens = item.num_cached
                reply.queue_ms = (client.started_at - client.submitted_at) * 1e3
                reply.prefill_ms = first_ms
            if item.finish_reason:
                log.finish(item)
            yield reply
            if item.finish_reason:
                return

    def Cancel(  # noqa: N802
        self, request: head_pb2.CancelRequest, context: grpc.ServicerContext
    ) -> head_pb2.CancelReply:
        """End a request by its id; `is_finished`: without an error, because its client has all it wanted."""
        with self._lock:
            client = self._clients.get(request.request_id)
        if client is None:
            return head_pb2.CancelReply(found=False)
        client.is_finished = request.is_finished
        if not request.is_finished:
            client.inbox.put(Fail(request.request_id, FailureKind.CANCELLED, "the request was cancelled"))
        self._leave(request.request_id, client)
        return head_pb2.CancelReply(found=True)

    def GetCluster(  # noqa: N802
        self, request: head_pb2.ClusterRequest, context: grpc.ServicerContext
    ) -> head_pb2.ClusterStatus:
        """The cluster as the head sees it."""
        return self._cluster_status()

    def WatchCluster(  # noqa: N802
        self, request: head_pb2.ClusterRequest, context: grpc.ServicerContext
    ) -> Iterator[head_pb2.ClusterStatus]:
        """The same, every STATUS_INTERVAL_S and at each change; to MAX_WATCHERS at once."""
        if not self._watchers.acquire(blocking=False):
            context.abort(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"{MAX_WATCHERS} streams watch this cluster already; close one, or ask with GetCluster",
            )
        try:
            while context.is_active() and not self._is_closing:
                yield self._cluster_status()
                with self._changed:
                    self._changed.wait(STATUS_INTERVAL_S)
        finally:
            self._watchers.release()

    def GetPlanning(  # noqa: N802
        self, request: head_pb2.PlanningRequest, context: grpc.ServicerContext
    ) -> head_pb2.PlanningReply:
        """What the plan was made from."""
        reply = self.planned_from
        if not reply.planning_json:
            context.abort(grpc.StatusCode.UNAVAILABLE, "the head has no plan yet; ask again when it serves")
        return reply

    def GetLogs(  # noqa: N802
        self, request: head_pb2.LogsRequest, context: grpc.ServicerContext
    ) -> Iterator[head_pb2.RankLogs]:
        """The latest log lines, one message for each rank."""
        try:
            told = self._logs.tell(request.rank if request.HasField("rank") else None, request.lines)
        except KeyError:
            context.abort(grpc.StatusCode.NOT_FOUND, f"there is no rank {request.rank} in this ring")
        yield from told

    def _submit(
        self, request_id: str, client: _Client, request: head_pb2.GenerateRequest, trace_id: str
    ) -> None:
        with self._lock:
            if client.is_gone:
                return
            if self._limits is not None:
                try:
                    _check_size(request.sampling)
                    if len(request.adapter) > MAX_ADAPTER_CHARS:
                        raise ValueError(f"adapter: a name has at most {MAX_ADAPTER_CHARS} characters")
                    validate(request.sampling, self._limits.vocab_size)
                except ValueError as error:
                    client.inbox.put(Fail(request_id, FailureKind.INVALID, str(error)))
                    return
            if request_id in self._clients:
                message = f"request id {request_id!r} is already running; choose another"
                client.inbox.put(Fail(request_id, FailureKind.INVALID, message))
                return
            self._clients[request_id] = client
            self._carry_out(
                self._scheduler.submit(
                    request_id,
                    list(request.prompt),
                    request.max_tokens,
                    request.sampling,
                    request.adapter,
                    trace_id=trace_id,
                )
            )

    def _count(self, kind: str) -> None:
        if kind:
            with self._lock:
                self._errors[kind] += 1

    def _leave(self, request_id: str, client: _Client) -> None:
        """The call ended, one way or another."""
        with self._lock:
            client.is_gone = True
            if self._clients.get(request_id) is client:
                del self._clients[request_id]
                self._carry_out(self._scheduler.cancel(request_id))
        client.inbox.put(None)

    def _carry_out(self, instructions: list[Instruction]) -> None:
        """Do what the scheduler said, with the lock held; nothing here blocks."""
        for instruction in instructions:
            if isinstance(instruction, Send):
                if instruction.frame.slots:
                    self._sent_at[instruction.frame.seq] = time.monotonic()
                self._feed(instruction.frame)
                continue
            if isinstance(instruction, (Draft, EndDrafts)):
                self._draft(instruction)
                continue
            client = self._clients.get(instruction.request_id)
            if client is None:
                continue
            if isinstance(instruction, Start):
                client.started_at = time.monotonic()
                continue
            client.inbox.put(instruction)
            if isinstance(instruction, Fail) or instruction.finish_reason:
                del self._clients[instruction.request_id]

    def _draft(self, instruction: Draft | EndDrafts) -> None:
        session = instruction.session
        if isinstance(instruction, EndDrafts):
            self._asked_at.pop(session, None)
            if self._end_drafts is not None:
                self._end_drafts(session)
        elif self._ask_drafter is not None:
            self._asked_at[session] = time.monotonic()
            call = DraftCall(
                session,
                instruction.tokens,
                instruction.num_drafts,
                instruction.sampling,
                instruction.num_prompt,
            )
            told = self.on_drafted
            self._ask_drafter(instruction.epoch, call, lambda position, ids: told(session, position, ids))


def _check_size(sampling: ring_pb2.Sampling) -> None:
    """Raises ValueError for what no frame could carry: it would break the ring for all."""
    if sampling.top_logprobs > MAX_TOP_LOGPROBS:
        raise ValueError(
            f"top_logprobs: {sampling.top_logprobs} is not allowed, it must be from 0 to {MAX_TOP_LOGPROBS}"
        )
    nbytes = sampling.ByteSize()
    if nbytes > MAX_SAMPLING_BYTES:
        raise ValueError(
            f"logit_bias, stop_ids and grammar: together they take {nbytes} bytes, more than "
            f"{MAX_SAMPLING_BYTES}; name fewer tokens, or send a smaller grammar"
        )
