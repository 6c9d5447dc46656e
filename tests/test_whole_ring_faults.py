"""Real processes killed, frozen, restarted or slowed: requests end in time, and service comes back."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from cluster.config import load_config
from planner.digests import model_digest
from planner.plan import Plan
from proto import control_pb2, control_pb2_grpc, head_pb2, head_pb2_grpc, ring_pb2
from tests.reference import greedy
from tests.ring_processes import RingProcesses
from tests.tiny_models import write_checkpoint
from tests.waiting import is_in_time

LAYERS = [(0, 2), (2, 4), (4, 5)]
PROMPT = [72, 101, 108, 108, 111]
SLOW = "step_delay_ms=30"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_checkpoint("llama", tmp_path / "model", num_layers=5)


class Client(threading.Thread):
    """Streams one long answer and notes when and how it ended."""

    def __init__(self, ring: RingProcesses, max_tokens: int = 400) -> None:
        super().__init__(name="client")
        self.ring, self.max_tokens = ring, max_tokens
        self.running = threading.Event()
        self.tokens: list[int] = []
        self.error: grpc.RpcError | None = None
        self.ended_at = 0.0
        self.start()

    def run(self) -> None:
        with self.ring.channel() as channel:
            request = head_pb2.GenerateRequest(
                prompt=PROMPT, max_tokens=self.max_tokens, sampling=ring_pb2.Sampling()
            )
            try:
                for reply in head_pb2_grpc.HeadStub(channel).Generate(request, timeout=60.0):
                    self.tokens += [t.id for t in reply.tokens]
                    if len(self.tokens) >= 3:
                        self.running.set()
            except grpc.RpcError as error:
                self.error = error
            self.ended_at = time.monotonic()
            self.running.set()

    def failed_within(self, since: float, limit_s: float) -> str:
        self.join(30.0)
        assert not self.is_alive()
        assert self.error is not None, "the request ended without an error"
        assert self.error.code() is grpc.StatusCode.UNAVAILABLE
        assert is_in_time(self.ended_at - since, limit_s), f"{self.ended_at - since:.2f} s until the error"
        return str(self.error.details())


@pytest.mark.parametrize("rank", [1, pytest.param(2, marks=pytest.mark.long)])
def test_a_killed_node_ends_requests_in_time_and_comes_back(rank: int, tmp_path: Path, model: Path) -> None:
    with RingProcesses(tmp_path, model, LAYERS, faults={1: SLOW}) as ring:
        ring.wait_ok()
        clients = [Client(ring), Client(ring)]
        assert all(client.running.wait(30.0) for client in clients)
        killed_at = time.monotonic()
        ring.kill(rank)
        for client in clients:
            assert f"rank {rank}" in client.failed_within(killed_at, 2.0)
        status = ring.wait_status(lambda s: s.status == "degraded")
        assert f"rank {rank}" in status.reason
        survivors = [0, 3 - rank]
        for survivor in survivors:
            ring.wait_status(lambda s, r=survivor: s.ranks[r].node.num_sessions == 0)
            assert ring.node_status(survivor).kv_bytes == 0
        refused = Client(ring)
        refused.failed_within(time.monotonic(), 2.0)
        ring.start(rank)
        ring.wait_ok()
        assert ring.tokens(PROMPT, 10) == greedy(model, PROMPT, 10)[0]


def test_a_frozen_node_ends_requests_in_time_and_thaws(tmp_path: Path, model: Path) -> None:
    with RingProcesses(tmp_path, model, LAYERS, faults={1: SLOW}, silence_timeout_s=1) as ring:
        epoch = ring.wait_ok().epoch
        client = Client(ring)
        assert client.running.wait(30.0)
        frozen_at = time.monotonic()
        ring.pause(2)
        assert "silent" in client.failed_within(frozen_at, 2.0)
        ring.resume(2)
        assert ring.wait_ok().epoch > epoch
        assert ring.tokens(PROMPT, 10) == greedy(model, PROMPT, 10)[0]
        ring.wait_status(lambda s: s.ranks[2].node.num_sessions == 0, 2.0)  # the close is a frame behind


def test_a_node_that_halts_within_the_limit_breaks_nothing(tmp_path: Path, model: Path) -> None:
    with RingProcesses(tmp_path, model, LAYERS, faults={1: SLOW}, silence_timeout_s=8) as ring:
        epoch = ring.wait_ok().epoch
        client = Client(ring, 30)
        assert client.running.wait(30.0)
        ring.pause(2)
        ring.wait_status(lambda s: s.ranks[2].age_s > 4.5)  # well over the default
        ring.resume(2)
        client.join(30.0)
        assert (client.error, client.tokens) == (None, greedy(model, PROMPT, 30)[0])
        assert ring.wait_ok().epoch == epoch


@pytest.mark.long
def test_an_idle_node_that_is_frozen_and_then_killed_is_gone(tmp_path: Path, model: Path) -> None:
    with RingProcesses(tmp_path, model, [(0, 2), (2, 5), None], silence_timeout_s=1) as ring:
        ring.wait_ok()
        ring.pause(2)
        ring.wait_status(lambda s: s.ranks[2].state == "frozen", 5.0)
        ring.kill(2)
        status = ring.wait_status(lambda s: s.ranks[2].state == "unreachable", 3.0)
        assert status.ranks[2].reason.endswith("is gone")


def test_a_restarted_head_finds_its_nodes_again(tmp_path: Path, model: Path) -> None:
    with RingProcesses(tmp_path, model, LAYERS) as ring:
        ring.wait_ok()
        ring.kill(0)
        ring.start(0)
        ring.wait_ok()
        assert ring.tokens(PROMPT, 10) == greedy(model, PROMPT, 10)[0]


def test_a_stranger_who_assigns_a_far_epoch_cannot_keep_the_ring_down(tmp_path: Path, model: Path) -> None:
    with RingProcesses(tmp_path, model, LAYERS) as ring:
        status = ring.wait_ok()
        plan = Plan.from_json(status.plan_json)
        forged = control_pb2.AssignRequest(
            epoch=2**63,
            config_digest=load_config(ring.config_path).digest,
            plan_json=status.plan_json,
            plan_digest=plan.digest,
            model_digest=model_digest(model),
            head_incarnation=status.incarnation,
        )
        for rank in (1, 2):
            with ring.channel(rank) as channel:
                assert control_pb2_grpc.ControlStub(channel).Assign(forged, timeout=20.0).accepted
        ring.wait_status(lambda s: s.status == "ok" and s.epoch > status.epoch)
        assert ring.tokens(PROMPT, 10) == greedy(model, PROMPT, 10)[0]


def test_a_log_that_nobody_reads_harms_no_ring(tmp_path: Path, model: Path) -> None:
    with RingProcesses(tmp_path, model, LAYERS, log_is_closed=True) as ring:
        ring.wait_ok()
        ring.kill(1)
        ring.wait_status(lambda s: s.status == "degraded")
        ring.start(1)
        ring.wait_ok()
        assert ring.tokens(PROMPT, 10) == greedy(model, PROMPT, 10)[0]


def test_a_slow_load_is_not_death(tmp_path: Path, model: Path) -> None:
    with RingProcesses(tmp_path, model, LAYERS, faults={1: "load_delay_s=4"}) as ring:
        epoch = ring.wait_status(lambda s: s.status == "loading").epoch
        assert ring.wait_ok().epoch == epoch


@pytest.mark.long
@pytest.mark.timeout(200)
def test_a_load_of_a_minute_is_not_death(tmp_path: Path, model: Path) -> None:
    with RingProcesses(tmp_path, model, LAYERS, faults={1: "load_delay_s=60"}) as ring:
        epoch = ring.wait_status(lambda s: s.status == "loading").epoch
        assert ring.wait_ok(120.0).epoch == epoch
        assert ring.tokens(PROMPT, 5) == greedy(model, PROMPT, 5)[0]


def test_a_stalled_compute_thread_is_found(tmp_path: Path, model: Path) -> None:
    with RingProcesses(tmp_path, model, LAYERS, faults={1: "load_delay_s=60"}, stall_timeout_s=2) as ring:
        status = ring.wait_status(lambda s: "without progress" in s.reason)
        assert "rank 1" in status.reason


def test_one_failing_request_harms_no_other(tmp_path: Path, model: Path) -> None:
    with (
        RingProcesses(tmp_path, model, LAYERS, faults={1: "step_error_at=30"}) as ring,
        ThreadPoolExecutor(2) as pool,
    ):
        ring.wait_ok()
        short = pool.submit(ring.tokens, PROMPT, 20)
        with pytest.raises(grpc.RpcError) as failure:
            ring.tokens(PROMPT, 60)
        assert failure.value.code() is grpc.StatusCode.INTERNAL
        assert "layers 2:4 failed" in failure.value.details()
        assert short.result() == greedy(model, PROMPT, 20)[0]
        assert ring.tokens(PROMPT, 20) == greedy(model, PROMPT, 20)[0]
        ring.wait_status(lambda s: all(r.node.num_sessions == 0 for r in s.ranks))


def test_a_client_that_leaves_frees_every_stage(tmp_path: Path, model: Path) -> None:
    with RingProcesses(tmp_path, model, LAYERS, faults={1: SLOW}) as ring:
        ring.wait_ok()
        with ring.channel() as channel:
            call = head_pb2_grpc.HeadStub(channel).Generate(
                head_pb2.GenerateRequest(prompt=PROMPT, max_tokens=400, sampling=ring_pb2.Sampling())
            )
            next(call)
            ring.wait_status(lambda s: all(r.node.num_sessions == 1 for r in s.ranks))
            call.cancel()
            status = ring.wait_status(lambda s: all(r.node.num_sessions == 0 for r in s.ranks))
        assert status.num_active == 0
        assert all(r.node.kv_bytes == 0 for r in status.ranks)


def test_nodes_start_in_any_order_and_stop_within_two_seconds(tmp_path: Path, model: Path) -> None:
    ring = RingProcesses(tmp_path, model, LAYERS)
    try:
        ring.start(2)
        ring.start(0)
        ring.wait_listening(2)
        waiting = ring.wait_status(lambda s: s.status in ("starting", "loading"))
        assert "rank 1" in waiting.reason or waiting.reason
        ring.start(1)
        ring.wait_ok()
        started = time.monotonic()
        codes = ring.stop()
        assert is_in_time(time.monotonic() - started, 4.0)
        assert set(codes.values()) == {0}
    finally:
        ring.stop()


def test_another_config_is_refused_with_a_sentence(tmp_path: Path, model: Path) -> None:
    ring = RingProcesses(tmp_path, model, LAYERS)
    text = ring.config_path.read_text()
    try:
        for rank in (0, 1):
            ring.start(rank)
            ring.wait_listening(rank)
        ring.config_path.write_text(text.replace('"context": 512', '"context": 256'))
        ring.start(2)
        status = ring.wait_status(lambda s: "another config" in s.reason)
        assert "rank 2" in status.reason
        assert {r.rank: r.state for r in status.ranks}[2] == "failed"
    finally:
        ring.stop()
