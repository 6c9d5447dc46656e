"""Doctor's check of the way to the other nodes: a TCP connection to each. Any thread; a pool asks at once."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from cluster.config import NodeConfig
from cluster.diagnosis import Finding, Subject, fine, skipped

LIMIT_S = 3.0
MAX_ASKED = 16  # at once
MAC_UNREACHABLE = 65  # EHOSTUNREACH of macOS; 113 on Linux
LOCAL_NETWORK = (
    "open 'x-apple.systempreferences:com.apple.preference.security?Privacy_LocalNetwork'    # allow your "
    "terminal there; or start the node from Terminal or over ssh, or as a LaunchDaemon: macrame "
    "service install"
)
WHY = "without it the ring never becomes complete, and every request is refused"
WHY_65 = (
    "macOS gives 'No route to host' (errno 65) to a program that may not use the local network, though the "
    "machine is there: LaunchAgents and terminals of other makers are refused until you allow them; "
    "Terminal, "
    "ssh, root and LaunchDaemons are not"
)


def reach(subject: Subject) -> Iterable[Finding]:
    """One finding for each other node that cannot be reached, and one line for those that can."""
    if subject.config is None:
        yield skipped("reach", subject.why_no_nodes)
        return
    others = subject.others
    if not others:
        yield fine("reach", "there is no other machine in the config")
        return
    with ThreadPoolExecutor(MAX_ASKED, thread_name_prefix="ThreadPoolExecutor-reach") as pool:
        found = list(pool.map(try_connect, others))
    listening, resting = [], []
    for node, error in zip(others, found, strict=True):
        if error is None:
            listening.append(node.name)
        elif isinstance(error, ConnectionRefusedError):
            resting.append(node.name)
        else:
            yield why_not(node, error, is_mac=subject.is_mac)
    if listening:
        yield fine("reach", f"connections to {', '.join(listening)} are accepted")
    if resting:
        yield fine("reach", f"the machine of {', '.join(resting)} answers; no node listens there now")


def try_connect(node: NodeConfig) -> OSError | None:
    """None where somebody listens at the node's address, else why not; takes LIMIT_S at most."""
    try:
        socket.create_connection((node.host, node.port), timeout=LIMIT_S).close()
    except OSError as error:
        return error
    except UnicodeError:
        return socket.gaierror(socket.EAI_NONAME, "no host name")
    return None


def why_not(node: NodeConfig, error: OSError, *, is_mac: bool) -> Finding:
    """What an error of connecting to a node means on this system."""
    where = f"{node.name} at {node.address}"
    if is_mac and error.errno == MAC_UNREACHABLE:
        what = f"{where} cannot be reached: No route to host (errno 65)"
        return Finding("reach", "error", what, WHY_65, LOCAL_NETWORK)
    if isinstance(error, socket.gaierror):
        mend = (
            "scutil --get LocalHostName    # there: the name before .local; or put its address into "
            "the config"
            if is_mac
            else "sudo apt install avahi-daemon libnss-mdns    # for names in .local; or put its address "
            "into the config"
        )
        what = f"the host name of {where} means nothing here: {error.strerror}"
        return Finding("reach", "error", what, WHY, mend)
    if isinstance(error, TimeoutError):
        what = f"{where} does not answer within {LIMIT_S:g} s"
        return Finding(
            "reach",
            "error",
            what,
            WHY,
            f"ping -c 3 {node.host}    # is it on, awake and in this network? then run macrame doctor there: "
            "its firewall may drop what comes in",
        )
    reason = error.strerror or str(error)
    if error.errno in (errno.EHOSTUNREACH, errno.ENETUNREACH):
        mend = (
            f"{'route -n get' if is_mac else 'ip route get'} {node.host}    # which way it takes; "
            "connect both"
        )
        what = f"{where} cannot be reached: {reason}"
        return Finding("reach", "error", what, f"this machine knows no way there; {WHY}", mend)
    return Finding("reach", "error", f"{where} cannot be reached: {reason}", WHY, f"ping -c 3 {node.host}")
