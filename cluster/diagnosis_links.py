"""Doctor's check of the interface to each other node: Wi-Fi where there is a cable. Any thread."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from cluster.config import is_loopback
from cluster.console import as_word
from cluster.diagnosis import Finding, Subject, fine, skipped
from cluster.interfaces import KIND_WORDS, Interface, interface_to, read_interfaces
from cluster.peer_links import resolve

WHY_WIFI = (
    "Wi-Fi takes 5 to 54 ms one way where a cable takes less than 1 ms, and each token goes "
    "once round the ring"
)


def links(subject: Subject) -> Iterable[Finding]:
    """By which kind of interface this machine would send to each other node."""
    if subject.config is None:
        yield skipped("links", subject.why_no_nodes)
        return
    if subject.running is not None:
        return  # the ring tells which interface each edge uses
    others = [node for node in subject.others if not is_loopback(node.host)]
    if not others:
        yield fine("links", "no node of the config is on another machine")
        return
    interfaces = read_interfaces()
    for node in others:
        try:
            here, _ = interface_to(resolve(node.host)[0], node.port)
        except OSError:
            yield skipped("links", f"the host name of {node.name} means nothing here")
            continue
        if here is None:
            yield skipped("links", f"the system does not tell by which interface {node.name} is reached")
        else:
            yield way(node.name, here, interfaces, subject.config.path)


def way(peer: str, used: Interface, interfaces: Sequence[Interface], config: Path) -> Finding:
    """The finding for one node that is reached by `used`."""
    words = f"{KIND_WORDS[used.kind]} ({used.name})"
    if used.kind != "wifi":
        return fine("links", f"{peer} is reached by {words}")
    cables = [i for i in interfaces if i.kind in ("ethernet", "thunderbolt") and i.addresses]
    if not cables:
        return fine("links", f"{peer} is reached by {words}; a cable would make tokens come sooner")
    names = " and ".join(f"{KIND_WORDS[i.kind]} ({i.name})" for i in cables)
    return Finding(
        "links",
        "warning",
        f"{peer} is reached by {words}, though {names} is connected",
        f"{WHY_WIFI}; a cable is used only where {peer} has an address in its network too",
        f"macrame links --config {as_word(config)}    # shows every way to it; then give {peer} the cable's "
        "address as "
        '"host", or connect that cable to it',
    )
