"""The head service over gRPC, in front of a ring that answers from a script."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from cluster.head import MAX_WATCHERS
from proto import head_pb2, head_pb2_grpc, ring_pb2
from tests.scripted_ring import CONTEXT, ScriptedRing
from tests.tiny_models import VOCAB_SIZE
from tests.waiting import wait_for


@pytest.fixture
def ring() -> Iterator[ScriptedRing]:
    scripted = ScriptedRing(b"abc", max_active=1)
    yield scripted
    scripted.close()


@pytest.fixture
def head(ring: ScriptedRing) -> Iterator[head_pb2_grpc.HeadStub]:
    with grpc.insecure_channel(f"127.0.0.1:{ring.port}") as channel:
        yield head_pb2_grpc.HeadStub(channel)


def request(max_tokens: int = 3, request_id: str = "", **sampling: object) -> head_pb2.GenerateRequest:
    return head_pb2.GenerateRequest(
        request_id=request_id,
        prompt=[1, 2],
        max_tokens=max_tokens,
        sampling=ring_pb2.Sampling(**sampling),
    )


def failure(call: Iterator[head_pb2.GenerateReply]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as raised:
        list(call)
    return raised.value.code(), str(raised.value.details())


def status(head: head_pb2_grpc.HeadStub) -> head_pb2.ClusterStatus:
    return head.GetCluster(head_pb2.ClusterRequest(), timeout=20.0)


def test_an_answer_and_its_figures(head: head_pb2_grpc.HeadStub) -> None:
    replies = list(head.Generate(request(3), timeout=20.0))
    assert [token.id for reply in replies for token in reply.tokens] == list(b"abc")
    assert [reply.finish_reason for reply in replies] == ["", "", "length"]
    assert [reply.completion_tokens for reply in replies] == [1, 0, 3]
    assert (replies[0].prompt_tokens, replies[-1].prompt_tokens) == (2, 2)
    assert replies[-1].prefill_ms == replies[0].prefill_ms > 0
    assert replies[0].queue_ms >= 0
    now = status(head)
    assert (now.num_requests, now.num_prompt_tokens, now.num_completion_tokens) == (1, 2, 3)
    assert (now.num_active, now.num_queued, now.num_failed) == (0, 0, 0)
    assert (now.max_active, now.context, now.vocab_size) == (1, CONTEXT, VOCAB_SIZE)


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        (request(temperature=-1.0), "temperature"),
        (request(temperature=float("nan")), "temperature"),
        (request(max_tokens=CONTEXT + 1), str(CONTEXT)),
        (head_pb2.GenerateRequest(max_tokens=3), "prompt"),
        (head_pb2.GenerateRequest(prompt=[VOCAB_SIZE], max_tokens=3), str(VOCAB_SIZE)),
        (request(max_tokens=0), "max_tokens"),
    ],
)
def test_what_can_never_run_is_an_invalid_argument(
    wrong: head_pb2.GenerateRequest, word: str, ring: ScriptedRing, head: head_pb2_grpc.HeadStub
) -> None:
    code, message = failure(head.Generate(wrong, timeout=20.0))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert word in message
    assert ring.opened == []


def test_an_id_that_is_running_is_refused_and_the_first_goes_on(
    ring: ScriptedRing, head: head_pb2_grpc.HeadStub
) -> None:
    ring.delay_s = 0.02
    first = head.Generate(request(30, "mine"), timeout=20.0)
    next(first)
    assert failure(head.Generate(request(3, "mine"), timeout=20.0)) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "request id 'mine' is already running; choose another",
    )
    assert sum(len(reply.tokens) for reply in first) == 29
    assert len(list(head.Generate(request(3, "mine"), timeout=20.0))) == 3  # free again


def test_cancel_ends_the_call_and_frees_the_session(ring: ScriptedRing, head: head_pb2_grpc.HeadStub) -> None:
    ring.delay_s = 0.02
    call = head.Generate(request(500, "mine"), timeout=20.0)
    next(call)
    assert head.Cancel(head_pb2.CancelRequest(request_id="mine"), timeout=20.0).found
    assert failure(call) == (grpc.StatusCode.CANCELLED, "the request was cancelled")
    ring.wait_closed(1)
    assert not head.Cancel(head_pb2.CancelRequest(request_id="mine"), timeout=20.0).found
    assert status(head).num_active == 0


def test_a_client_that_has_all_it_wants_is_no_error(ring: ScriptedRing, head: head_pb2_grpc.HeadStub) -> None:
    ring.delay_s = 0.02
    call = head.Generate(request(500, "mine"), timeout=20.0)
    next(call)
    assert head.Cancel(head_pb2.CancelRequest(request_id="mine", is_finished=True), timeout=20.0).found
    list(call)  # it ends without an error
    ring.wait_closed(1)
    left = head.Generate(request(500), timeout=20.0)
    next(left)
    left.cancel()
    wait_for(lambda: {e.kind: e.count for e in status(head).errors}["cancelled"] == 1, 5.0)


def test_a_client_that_leaves_the_queue_leaves_no_trace(
    ring: ScriptedRing, head: head_pb2_grpc.HeadStub
) -> None:
    ring.delay_s = 0.02
    first = head.Generate(request(40), timeout=20.0)
    next(first)
    second = head.Generate(request(3), timeout=20.0)
    wait_for(lambda: status(head).num_queued == 1, 5.0)
    second.cancel()
    wait_for(lambda: status(head).num_queued == 0, 5.0)
    assert sum(len(reply.tokens) for reply in first) == 39
    assert len(ring.opened) == 1


def test_the_status_lists_what_runs_and_what_waits(ring: ScriptedRing, head: head_pb2_grpc.HeadStub) -> None:
    ring.delay_s = 0.02
    calls = [head.Generate(request(60, "first"), timeout=20.0)]
    next(calls[0])
    calls.append(head.Generate(request(3, "second"), timeout=20.0))
    wait_for(lambda: len(status(head).requests) == 2)
    first, second = status(head).requests
    assert (first.id, first.state, first.prompt_tokens, first.prefilled_tokens) == ("first", "decode", 2, 2)
    assert 1 <= first.completion_tokens < 60
    assert (first.max_tokens, first.adapter) == (60, "")
    assert (second.id, second.state, second.prefilled_tokens) == ("second", "queued", 0)
    assert first.age_s > second.age_s > 0
    assert [len(list(call)) for call in calls] == [59, 3]
    assert not status(head).requests


def test_a_full_queue_is_said_to_be_full(ring: ScriptedRing, head: head_pb2_grpc.HeadStub) -> None:
    ring.delay_s = 0.02
    running = head.Generate(request(60), timeout=20.0)
    next(running)
    waiting = [head.Generate(request(3), timeout=20.0) for _ in range(2)]
    wait_for(lambda: status(head).num_queued == 2, 5.0)
    assert failure(head.Generate(request(3), timeout=20.0)) == (
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "1 requests are running and 2 are waiting, which is all that this plan and queue "
        "hold; try again later",
    )
    running.cancel()
    assert [len(list(call)) for call in waiting] == [3, 3]


def test_who_has_waited_too_long_is_told_so(ring: ScriptedRing, head: head_pb2_grpc.HeadStub) -> None:
    ring.delay_s = 0.02
    running = head.Generate(request(60), timeout=20.0)
    next(running)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(failure, head.Generate(request(3), timeout=20.0))
        wait_for(lambda: status(head).num_queued == 1)
        wait_for(lambda: (ring.head.expire(), status(head).num_queued == 0)[1])
        assert waiting.result() == (
            grpc.StatusCode.DEADLINE_EXCEEDED,
            "the request waited 0.05 s for its turn, which is what api.queue_timeout_s allows: "
            "1 requests run and 1 wait; try again later",
        )
    assert {error.kind: error.count for error in status(head).errors if error.count} == {"late": 1}
    running.cancel()


def test_the_one_of_lower_priority_number_starts_first(
    ring: ScriptedRing, head: head_pb2_grpc.HeadStub
) -> None:
    ring.delay_s = 0.02
    running = head.Generate(request(60), timeout=20.0)
    next(running)
    waiting = []
    for name, priority in (("late", 3), ("soon", -3)):
        one = request(3, name)
        one.priority = priority
        waiting.append(head.Generate(one, timeout=20.0))
        wait_for(lambda: status(head).num_queued == len(waiting))
    assert [r.id for r in status(head).requests[1:]] == ["late", "soon"]
    running.cancel()
    assert [len(list(call)) for call in waiting] == [3, 3]
    assert [spec.request_id for spec in ring.opened[1:]] == ["soon", "late"]


def test_a_failing_stage_fails_its_request_alone(ring: ScriptedRing, head: head_pb2_grpc.HeadStub) -> None:
    ring.error, ring.error_at = "layers 2:4 failed: boom", 1
    assert failure(head.Generate(request(3), timeout=20.0)) == (
        grpc.StatusCode.INTERNAL,
        "layers 2:4 failed: boom",
    )
    ring.error = ""
    assert len(list(head.Generate(request(3), timeout=20.0))) == 3
    assert status(head).num_failed == 1


def test_a_broken_ring_ends_what_runs_and_what_waits(
    ring: ScriptedRing, head: head_pb2_grpc.HeadStub
) -> None:
    ring.delay_s = 0.02
    calls = [head.Generate(request(400), timeout=20.0) for _ in range(2)]
    wait_for(lambda: (status(head).num_active, status(head).num_queued) == (1, 1), 5.0)
    ring.head.ring_down("the ring broke: rank 1 is gone")
    with ThreadPoolExecutor(2) as pool:
        ends = list(pool.map(failure, calls))
    assert ends == [(grpc.StatusCode.UNAVAILABLE, "the ring broke: rank 1 is gone")] * 2
    code, _ = failure(head.Generate(request(3), timeout=20.0))
    assert code is grpc.StatusCode.UNAVAILABLE


def test_a_watcher_hears_of_changes_and_of_the_end(ring: ScriptedRing, head: head_pb2_grpc.HeadStub) -> None:
    watch = head.WatchCluster(head_pb2.ClusterRequest(), timeout=20.0)
    assert next(watch).status == "ok"
    ring.set_state("degraded", "rank 1 is gone")
    assert next(s for s in watch if s.status != "ok").reason == "rank 1 is gone"
    ring.head.close()
    list(watch)  # ends by itself


def test_watchers_leave_workers_to_requests(head: head_pb2_grpc.HeadStub) -> None:
    watches = [head.WatchCluster(head_pb2.ClusterRequest()) for _ in range(MAX_WATCHERS)]
    for watch in watches:
        assert next(watch).status == "ok"
    code, details = failure(head.WatchCluster(head_pb2.ClusterRequest(), timeout=20.0))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert details == "16 streams watch this cluster already; close one, or ask with GetCluster"
    assert len(list(head.Generate(request(3), timeout=20.0))) == 3
    for watch in watches:
        watch.cancel()


def test_a_hold_refuses_new_requests_and_in_time_those_that_wait(
    ring: ScriptedRing, head: head_pb2_grpc.HeadStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    ring.delay_s = 0.05
    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(lambda: list(head.Generate(request(40), timeout=20.0)))
        wait_for(lambda: status(head).num_active == 1)
        waiting = pool.submit(failure, head.Generate(request(3), timeout=20.0))
        wait_for(lambda: status(head).num_queued == 1)
        ring.head.hold("n1 is short of memory")
        assert failure(head.Generate(request(3), timeout=20.0)) == (
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "n1 is short of memory",
        )
        assert status(head).num_queued == 1
        monkeypatch.setattr("cluster.head.HOLD_LIMIT_S", 0.0)
        ring.head.hold("n1 is still short of memory")
        code, sentence = waiting.result()
        assert (code, sentence) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "n1 is still short of memory")
        assert running.result()[-1].finish_reason == "length"
    ring.head.hold("")
    assert list(head.Generate(request(3), timeout=20.0))[-1].finish_reason == "length"
