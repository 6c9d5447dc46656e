"""Measuring links through a relay whose delay and rate are known, and links that break meanwhile.

On idle processors the median is less than 1.5 ms above the delay, and the rate within 5 %. With two other
programs that use all of two processors it was up to 45 ms above, and the rate within 26 %: a measurement may
be made anew.
"""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Iterator

import grpc
import pytest

from cluster import link_probe
from cluster.link_probe import LinkError, LinkSpeed, explain, measure
from cluster.link_service import ProbeService
from cluster.rpc import make_server
from proto import ring_pb2
from tests.edges import TOKEN, free_port
from tests.relay import Relay, Shape
from tests.waiting import is_in_time, wait_for

HELLO = ring_pb2.Hello(from_rank=0, to_rank=1)

LATE_MS = 25.0
RATE_SHARE = 0.25
NUM_TRIES = 5


@pytest.fixture(autouse=True)
def in_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer round trips and bytes than for people."""
    monkeypatch.setattr(link_probe, "ROUND_TRIPS_S", 0.3)
    monkeypatch.setattr(link_probe, "BULK_S", 0.4)


@pytest.fixture
def port() -> Iterator[int]:
    server, port = make_server(
        "127.0.0.1:0", [ProbeService(lambda _hello: None, 5).add_to], TOKEN, max_workers=8
    )
    server.start()
    yield port
    server.stop(0).wait()


def reason(address: str, token: str | None = TOKEN) -> str:
    with pytest.raises(LinkError) as caught:
        measure(address, token, HELLO)
    return str(caught.value)


def undisturbed(relay: Relay, delay_ms: float, mbit_s: float) -> LinkSpeed:
    """The first measurement that is right, or the last one."""
    for _ in range(NUM_TRIES):
        speed = measure(relay.address, TOKEN, HELLO)
        is_late = speed.round_trip_p50_ms >= delay_ms + LATE_MS
        if not is_late and abs(speed.bandwidth_gbit_s * 1e3 / mbit_s - 1) < RATE_SHARE:
            break
    return speed


def test_loopback_is_fast(port: int) -> None:
    speed = measure(f"127.0.0.1:{port}", TOKEN, HELLO)
    assert 50 < speed.num_round_trips <= link_probe.NUM_ROUND_TRIPS
    assert 0 < speed.round_trip_p50_ms <= speed.round_trip_p99_ms
    assert speed.round_trip_p50_ms < LATE_MS
    assert speed.bandwidth_gbit_s > 0.5
    assert speed.num_bytes <= link_probe.MAX_BULK_BYTES + 2 * link_probe.MAX_WINDOW_BYTES


@pytest.mark.parametrize(
    ("there_ms", "back_ms", "mbit_s"), [(20.0, 20.0, 80.0), (5.0, 35.0, 200.0), (0.0, 0.0, 20.0)]
)
def test_a_known_delay_and_rate_are_found(port: int, there_ms: float, back_ms: float, mbit_s: float) -> None:
    shape = Shape(there_ms, mbit_s * 1e6 / 8)
    with Relay(("127.0.0.1", port), to_target=shape, to_client=Shape(back_ms)) as relay:
        speed = undisturbed(relay, there_ms + back_ms, mbit_s)
    assert there_ms + back_ms <= speed.round_trip_p50_ms < there_ms + back_ms + LATE_MS
    assert speed.bandwidth_gbit_s * 1e3 == pytest.approx(mbit_s, rel=RATE_SHARE)


def test_the_way_back_does_not_slow_the_way_there(port: int) -> None:
    """It carries credits only."""
    with Relay(("127.0.0.1", port), to_target=Shape(1, 12.5e6), to_client=Shape(1, 0.5e6)) as relay:
        speed = undisturbed(relay, 2, 100)
    assert speed.bandwidth_gbit_s * 1e3 == pytest.approx(100, rel=RATE_SHARE)


def test_a_long_way_takes_few_round_trips_and_bounded_time(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_probe, "MAX_BULK_S", 0.5)
    with Relay(("127.0.0.1", port), to_target=Shape(40), to_client=Shape(40)) as relay:
        speed = measure(relay.address, TOKEN, HELLO)
    assert speed.num_round_trips == link_probe.MIN_ROUND_TRIPS
    assert 80 <= speed.round_trip_p50_ms < 80 + 4 * LATE_MS


# -- links that fail --------------------------------------------------------------------------------------
def test_a_link_that_stalls_ends_with_a_sentence(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_probe, "SILENCE_LIMIT_S", 0.5)
    with Relay(("127.0.0.1", port), to_target=Shape(0, 2e6)) as relay:
        stopper = threading.Thread(target=_when_busy, args=(relay, relay.stall))
        stopper.start()
        begin = time.monotonic()
        assert reason(relay.address) == f"{relay.address} has been silent for 0.5 s"
        assert is_in_time(time.monotonic() - begin, 8)
        stopper.join()


def test_a_link_that_is_cut_ends_with_a_sentence(port: int) -> None:
    with Relay(("127.0.0.1", port), to_target=Shape(0, 2e6)) as relay:
        cutter = threading.Thread(target=_when_busy, args=(relay, relay.cut))
        cutter.start()
        begin = time.monotonic()
        assert reason(relay.address) == f"the connection to {relay.address} broke while it was measured"
        assert is_in_time(time.monotonic() - begin, 8)
        cutter.join()


def _when_busy(relay: Relay, action: object) -> None:
    wait_for(lambda: relay.bytes_to_target > 400_000, 10.0)
    assert callable(action)
    action()


def test_a_peer_that_takes_the_connection_and_says_nothing(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_probe, "GREETING_LIMIT_S", 0.4)
    with Relay(("127.0.0.1", port)) as relay:
        relay.stall()
        assert reason(relay.address) == f"{relay.address} has been silent for 0.4 s"


def test_a_link_without_end_is_given_up(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_probe, "LIMIT_S", 0.5)
    with Relay(("127.0.0.1", port), to_target=Shape(60), to_client=Shape(60)) as relay:
        assert reason(relay.address) == f"{relay.address} is too slow to be measured in 0.5 s"


def test_nobody_there() -> None:
    address = f"127.0.0.1:{free_port()}"
    assert reason(address) == f"nobody listens at {address}; is the node running there?"


def test_another_token(port: int) -> None:
    assert "the cluster token is missing or wrong" in reason(f"127.0.0.1:{port}", "another")


def test_a_refusal_is_told(port: int) -> None:
    server, other = make_server(
        "127.0.0.1:0",
        [ProbeService(lambda _hello: "rank 3 answers there, not rank 1", 5).add_to],
        None,
        max_workers=2,
    )
    server.start()
    assert (
        reason(f"127.0.0.1:{other}", None) == f"127.0.0.1:{other} refused: rank 3 answers there, not rank 1"
    )
    server.stop(0).wait()


def test_a_server_of_an_older_version() -> None:
    server, other = make_server("127.0.0.1:0", [], None, max_workers=2)
    server.start()
    assert reason(f"127.0.0.1:{other}", None).endswith(
        "cannot be measured: install the same macrame on every node"
    )
    server.stop(0).wait()


@pytest.mark.parametrize(
    ("answers", "sentence"),
    [
        ([b"\xff"], "answered HELLO with something else than WELCOME"),
        (
            [
                ring_pb2.EdgeReply(welcome=ring_pb2.Welcome(window_bytes=1 << 20)),
                ring_pb2.EdgeReply(credit=ring_pb2.Credit(bytes=1 << 40)),
            ],
            "with something else than its credit",
        ),
    ],
    ids=["no welcome", "too much credit"],
)
def test_a_server_that_answers_nonsense(answers: list[ring_pb2.EdgeReply | bytes], sentence: str) -> None:
    class Handler(grpc.GenericRpcHandler):
        def service(self, handler_call_details: grpc.HandlerCallDetails) -> object:
            def answer(requests: Iterator[bytes], _context: object) -> Iterator[bytes]:
                for _, reply in zip(requests, answers, strict=False):
                    yield reply if isinstance(reply, bytes) else reply.SerializeToString()
                next(requests, None)

            return grpc.stream_stream_rpc_method_handler(answer)

    server, port = make_server(
        "127.0.0.1:0", [lambda s: s.add_generic_rpc_handlers((Handler(),))], None, max_workers=2
    )
    server.start()
    assert sentence in reason(f"127.0.0.1:{port}", None)
    server.stop(0).wait()


def test_errno_65_is_explained_on_macos() -> None:
    error = OSError(65, "No route to host")
    sentence = explain("mini2.local:50051", error, "darwin")
    assert sentence.startswith("mini2.local:50051 cannot be reached: No route to host (errno 65): macOS")
    assert "Privacy & Security > Local Network" in sentence
    here = explain("mini2.local:50051", OSError(errno.EHOSTUNREACH, "No route to host"), "linux")
    assert here == "mini2.local:50051 cannot be reached: No route to host"
    assert "Local Network" not in explain("x:1", OSError(61, "Connection refused"), "darwin")


def test_a_name_that_means_nothing() -> None:
    assert reason("no-such-host.invalid:1").startswith("no-such-host.invalid:1 cannot be reached: ")
