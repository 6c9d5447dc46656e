"""The head service: clients in, tokens out. One lock holds the scheduler; nothing under it blocks."""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from queue import SimpleQueue

import grpc

from cluster.abilities import Abilities
from cluster.client import STATUS_CODES, Client, Item
from cluster.conversation import Conversation
from cluster.draft_queue import OnDrafted
from cluster.drafter import DraftCall
from cluster.fault import Fault, injected
from cluster.foretold import Drafted
from cluster.instructions import Draft, Emit, EndDrafts, Fail, FailureKind, Instruction, Send, Start
from cluster.log_book import LogBook
from cluster.request import Request
from cluster.room import Limits
from cluster.sampling_values import validate
from cluster.scheduler import Scheduler
from cluster.trace_head import note_fed, note_returned
from cluster.trace_recorder import recorder
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


class Head(head_pb2_grpc.HeadServicer):
    """Holds the scheduler, feeds the ring, and hands tokens to the clients that wait for them.

    `feed(frame)` puts a frame into the ring and never blocks; `cluster_status()` is the coordinator's view.
    """

    def __init__(
        self,
        *,
        max_queued: int,
        queue_timeout_s: float | None = None,
        feed: Callable[[ring_pb2.Frame], None],
        cluster_status: Callable[[], head_pb2.ClusterStatus],
        changed: threading.Condition,
        logs: LogBook | None = None,
        ask_drafter: Callable[[int, DraftCall, OnDrafted], None] | None = None,
        end_drafts: Callable[[int, bool], None] | None = None,
    ) -> None:
        self._ask_drafter, self._end_drafts = ask_drafter, end_drafts
        self._asked_at: dict[int, float] = {}  # the draft model, by session
        self._logs = logs or LogBook({})
        self._scheduler = Scheduler(max_queued=max_queued, queue_timeout_s=queue_timeout_s)
        self._feed = feed
        self._cluster_status = cluster_status
        self._changed = changed
        self._lock = threading.Lock()
        self._clients: dict[str, Client] = {}
        self._conversations: set[Conversation] = set()
        self._errors: Counter[str] = Counter()  # by FailureKind's value; empty: none
        self._limits: Limits | None = None
        self._sent_at: dict[int, float] = {}  # frames in the ring, by their number
        self._watchers = threading.BoundedSemaphore(MAX_WATCHERS)
        self._is_closing = False
        self._held_since: float | None = None
        self.abilities = Abilities()  # of the model, once there is a plan
        self.predicted: Mapping[int, head_pb2.PredictedMemory] = {}  # by rank, once there is a plan
        self.planned_from = head_pb2.PlanningReply()  # what the plan was made from, once there is one

    # -- the ring's side ----------------------------------------------------------------------------------
    def ring_up(self, epoch: int, limits: Limits) -> None:
        """The ring of this epoch is ready."""
        with self._lock:
            if self._is_closing:
                return
            self._limits = limits = _as_injected(limits)
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

    def expire(self) -> None:
        """Tell those that have waited too long. Called again and again."""
        with self._lock:
            self._carry_out(self._scheduler.expire(time.monotonic()))

    def on_result(self, frame: ring_pb2.Frame) -> None:
        """A RESULT frame, on whatever thread received it."""
        began = time.perf_counter() if recorder.on else 0.0
        now = time.monotonic()
        with self._lock:
            sent_at = self._sent_at.pop(frame.seq, now)
            times_ms = (now - sent_at) * 1e3, now * 1e3
            instructions = self._scheduler.on_result(frame.epoch, frame.seq, frame.slots, *times_ms)
            self._carry_out(instructions)
        if began:
            note_returned(frame, began, instructions)

    def on_drafted(self, session: int, drafted: Drafted) -> None:
        """The draft model's answer, on the compute thread."""
        now = time.monotonic()
        with self._lock:
            draft_ms = (now - self._asked_at.get(session, now)) * 1e3
            self._carry_out(self._scheduler.on_drafted(session, drafted, draft_ms))

    def close(self) -> None:
        """End every client with a sentence; handlers return."""
        self._is_closing = True
        self.ring_down("the head is stopping; send the request again when it is back")
        with self._lock:
            conversations = tuple(self._conversations)
        for conversation in conversations:
            conversation.hang_up()
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
            status.num_drafted, status.num_draft_pauses = (
                speculation.num_drafted,
                speculation.record.num_pauses,
            )
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
            priority=request.priority,
        )

    # -- the clients' side: RPC handler threads -----------------------------------------------------------
    def Generate(  # noqa: N802
        self, request: head_pb2.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[head_pb2.GenerateReply]:
        """Tokens as they come; leaving the stream cancels the request on every stage."""
        inbox: SimpleQueue[Item] = SimpleQueue()
        client = Client.of(
            request, request.request_id or uuid.uuid4().hex, lambda _client, item: inbox.put(item)
        )
        try:
            if not context.add_callback(lambda: self._leave(client)):
                return
            self._submit(client, request)
            while (item := inbox.get()) is not None:  # None: the client left
                if isinstance(item, Fail):
                    client.log.fail(item)
                    context.abort(STATUS_CODES[item.kind], item.message)
                yield client.reply(item)
                if isinstance(item, Emit) and item.finish_reason:
                    return
        finally:
            self._ended(client)

    def Converse(  # noqa: N802
        self, request_iterator: Iterator[head_pb2.Ask], context: grpc.ServicerContext
    ) -> Iterator[head_pb2.Answers]:
        """Tokens of many requests as they come; leaving the stream cancels them all."""
        conversation = Conversation(self._submit, self._leave, self._ended)
        with self._lock:
            self._conversations.add(conversation)
        try:
            if context.add_callback(conversation.close) and not self._is_closing:
                args = (request_iterator,)
                threading.Thread(
                    target=conversation.listen, args=args, name="conversation", daemon=True
                ).start()
                yield from conversation.answers()
        finally:
            with self._lock:
                self._conversations.discard(conversation)
            conversation.close()

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
            client.put(Fail(request.request_id, FailureKind.CANCELLED, "the request was cancelled"))
        self._leave(client)
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

    def _submit(self, client: Client, request: head_pb2.GenerateRequest) -> None:
        request_id = client.request_id
        with self._lock:
            if client.is_gone:
                return
            if self._limits is not None:
                try:
                    _check_size(request.sampling)
                    if len(request.adapter) > MAX_ADAPTER_CHARS:
                        raise ValueError(f"adapter: a name has at most {MAX_ADAPTER_CHARS} characters")
                    self.abilities.check(request.sampling)
                    validate(request.sampling, self._limits.vocab_size)
                except ValueError as error:
                    client.put(Fail(request_id, FailureKind.INVALID, str(error)))
                    return
            if request_id in self._clients:
                message = f"request id {request_id!r} is already running; choose another"
                client.put(Fail(request_id, FailureKind.INVALID, message))
                return
            self._clients[request_id] = client
            self._carry_out(
                self._scheduler.submit(
                    request_id,
                    list(request.prompt),
                    request.max_tokens,
                    request.sampling,
                    request.adapter,
                    trace_id=client.log.trace_id,
                    priority=request.priority,
                    now_s=client.submitted_at,
                )
            )

    def _ended(self, client: Client) -> None:
        """Nothing more is told to it; called once."""
        if client.is_finished:
            client.log.enough()
        if kind := client.log.kind:
            with self._lock:
                self._errors[kind] += 1
        client.log.end(client.submitted_at, client.started_at)

    def _leave(self, client: Client) -> None:
        """The call ended, one way or another."""
        with self._lock:
            client.is_gone = True
            if self._clients.get(client.request_id) is client:
                del self._clients[client.request_id]
                self._carry_out(self._scheduler.cancel(client.request_id))
        client.put(None)

    def _carry_out(self, instructions: list[Instruction]) -> None:
        """Do what the scheduler said, what the ring waits for first. With the lock held; nothing blocks."""
        for instruction in instructions:
            if isinstance(instruction, Send):
                if instruction.frame.slots:
                    self._sent_at[instruction.frame.seq] = time.monotonic()
                    if recorder.on:
                        note_fed(instruction.frame)
                self._feed(instruction.frame)
            elif isinstance(instruction, (Draft, EndDrafts)):
                self._draft(instruction)
        for instruction in instructions:
            if isinstance(instruction, (Send, Draft, EndDrafts)):
                continue
            if (client := self._clients.get(instruction.request_id)) is None:
                continue
            if isinstance(instruction, Start):
                client.started_at = time.monotonic()
                continue
            client.put(instruction)
            if isinstance(instruction, Fail) or (isinstance(instruction, Emit) and instruction.finish_reason):
                del self._clients[instruction.request_id]

    def _draft(self, instruction: Draft | EndDrafts) -> None:
        session = instruction.session
        if isinstance(instruction, EndDrafts):
            self._asked_at.pop(session, None)
            if self._end_drafts is not None:
                self._end_drafts(session, instruction.is_over)
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
            self._ask_drafter(instruction.epoch, call, lambda drafted: told(session, drafted))


def _as_injected(limits: Limits) -> Limits:
    """Less in the ring, where a test or a benchmark asks for that."""
    frames, rows = (int(injected(f)) for f in (Fault.FRAMES_IN_FLIGHT, Fault.ROWS_PER_FRAME))
    if frames:
        limits = replace(limits, max_in_flight=frames, max_lone_chunks=0)
    return replace(limits, max_rows=rows or limits.max_rows)


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
