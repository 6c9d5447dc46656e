"""Announcements on the loopback interface, between real zeroconf instances."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace

import pytest
from zeroconf import ServiceInfo, Zeroconf

from cluster.announce import MAX_CHARS, NODE_TYPE, SSH_TYPE, Announcement, Heard, listen, open_zeroconf, read
from cluster.config_nodes import NodeConfig
from cluster.versions import macrame_version
from deploy.nodes import main, render
from planner.node_profile import make_node

HERE = ["127.0.0.1"]
LIMIT_S = 20.0
MACHINE = make_node(
    rank=0, name="x", host="x", chip="Apple M2 Max", gpu_cores=38, memory_bytes=64_000_000_000
)
NODE = NodeConfig(rank=2, name="Anna's studio", host="studio.local", port=50077)


@pytest.fixture(scope="module")
def zeroconf() -> Iterator[Zeroconf]:
    opened = open_zeroconf(HERE)
    yield opened
    opened.close()


def heard_until(wanted: str, *, with_ssh: bool = False) -> Heard | None:
    """The announcement of that name, as soon as it is heard."""
    heard = listen(LIMIT_S, with_ssh=with_ssh, addresses=HERE, is_enough=lambda one: one.name == wanted)
    return next((one for one in heard if one.name == wanted), None)


def service(label: str, kind: str = NODE_TYPE, port: int = 5, **told: str) -> ServiceInfo:
    return ServiceInfo(
        kind,
        f"{label}.{kind}",
        port=port,
        properties=told,
        server="somebody.local.",
        parsed_addresses=["10.0.0.7", "fe80::1"],
    )


def test_a_node_is_heard_and_takes_its_word_back() -> None:
    announcement = Announcement(NODE, MACHINE, HERE, "c0ffee")
    announcement.start()
    assert heard_until(NODE.name) == Heard(
        kind="node",
        name="Anna's studio",
        host="studio.local",
        addresses=("127.0.0.1",),
        port=50077,
        chip="Apple M2 Max",
        gpu_cores=38,
        memory_bytes=64_000_000_000,
        version=macrame_version(),
        cluster="c0ffee",
        rank=2,
    )
    announcement.close(LIMIT_S)
    assert NODE.name not in [one.name for one in listen(0.5, addresses=HERE)]


def test_two_clusters_may_have_a_node_of_one_name() -> None:
    both = [Announcement(NODE, MACHINE, HERE, cluster) for cluster in ("one", "two")]
    found: set[str] = set()
    for announcement in both:
        announcement.start()
    try:
        listen(LIMIT_S, addresses=HERE, is_enough=lambda one: bool(found.add(one.cluster)) or len(found) == 2)
    finally:
        for announcement in both:
            announcement.close(LIMIT_S)
    assert found == {"one", "two"}


def test_an_announcement_that_ends_before_it_is_made() -> None:
    announcement = Announcement(NODE, MACHINE, HERE, "c0ffee")
    announcement.close(LIMIT_S)
    announcement.start()
    announcement._thread.join(LIMIT_S)
    assert announcement._zeroconf is None


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # zeroconf leaves a socket
def test_an_address_that_is_not_here_is_a_line_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    announcement = Announcement(NODE, MACHINE, ["192.0.2.1"], "c0ffee")
    announcement.start()
    announcement._thread.join(LIMIT_S)
    assert "this node is not announced in the local network" in caplog.text
    announcement.close(LIMIT_S)
    gc.collect()


def test_machines_that_offer_a_login_are_heard_when_asked_for(zeroconf: Zeroconf) -> None:
    info = service("Mac mini", SSH_TYPE, port=22)
    zeroconf.register_service(info)
    try:
        found = heard_until("Mac mini", with_ssh=True)
    finally:
        zeroconf.unregister_service(info)
    assert found == Heard("ssh", "Mac mini", "somebody.local", ("10.0.0.7", "fe80::1"), 22)


def test_what_a_stranger_writes_is_cut_and_printable() -> None:
    told = read(
        service(
            "n",
            name="\x1b[2J" + "x" * 200,
            host="a\nb",
            chip="M4\u202e\x07",
            gpu_cores="-4",
            memory_bytes="9" * 40,
            rank="99999999999",
            version="1.0\r",
            colour="red",
        )
    )
    assert told is not None
    assert told.name == "?[2J" + "x" * (MAX_CHARS - 4)
    assert (told.host, told.chip, told.version) == ("a?b", "M4??", "1.0?")
    assert (told.gpu_cores, told.memory_bytes, told.rank) == (0, 0, 10**6)


def test_without_an_address_or_a_port_there_is_nothing_to_hear() -> None:
    assert read(service("n", port=0)) is None
    assert read(ServiceInfo(NODE_TYPE, f"n.{NODE_TYPE}", port=5, server="a.local.")) is None


def test_the_table_and_what_it_says_of_versions() -> None:
    one = Heard(
        "node", "mini1", "mini1.local", ("10.0.0.1",), 50051, "Apple M4", 10, 16 * 10**9, "0.1.0", "c", 0
    )
    two = replace(one, name="mini2", host="mini2.local", version="0.2.0", rank=1)
    lines = render([one, two])
    assert "rank 0 of c" in lines[1] or "rank 0 of c" in lines[2]
    assert "Apple M4, 10 GPU cores" in "\n".join(lines)
    assert lines[-1] == "They run different versions of macrame (0.1.0, 0.2.0): install one on all."
    assert "different" not in "\n".join(render([one, replace(two, version="0.1.0")]))


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "601", "x"])
def test_seconds_that_are_none(seconds: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--seconds", seconds])
    assert ended.value.code == 3
    assert "--seconds" in capsys.readouterr().err
