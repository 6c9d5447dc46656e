"""Doctor's check of this machine's own firewall, where nodes listen beyond it. Any thread.

macOS: socketfilterfw, which `man` does not have; the forms of its answers are in tests/mac_doctor_samples.py.
Linux: ufw's and firewalld's own words, and as root the tables that nft lists.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from cluster.config import is_loopback
from cluster.diagnosis import Finding, Subject, fine, skipped

SOCKETFILTERFW = "/usr/libexec/ApplicationFirewall/socketfilterfw"
UFW_CONF = Path("/etc/ufw/ufw.conf")
WHY = "other nodes cannot open connections to this one, so the ring never becomes complete"


def firewall(subject: Subject) -> Iterable[Finding]:
    """Whether it lets others in to the nodes here."""
    if reason := subject.why_no_nodes:
        yield skipped("firewall", reason)
        return
    ports = [node.port for node in subject.nodes if not is_loopback(node.host)]
    if not ports:
        yield fine("firewall", "the nodes here listen on this machine alone; no firewall is in their way")
        return
    yield from _mac(subject) if subject.is_mac else _linux(subject, ports)


def _mac(subject: Subject) -> Iterable[Finding]:
    told = subject.output([SOCKETFILTERFW, "--getglobalstate"])
    state = re.search(r"State = (\d)", told or "")
    if state is None:
        yield skipped("firewall", f"{SOCKETFILTERFW} does not tell its state")
        return
    if state[1] == "0":
        yield fine("firewall", "macOS's firewall is off")
        return
    program = os.path.realpath(sys.executable)
    if state[1] == "2" or blocks_all(subject.output([SOCKETFILTERFW, "--getblockall"]) or ""):
        yield Finding(
            "firewall",
            "error",
            "macOS's firewall blocks all incoming connections",
            WHY,
            f"sudo {SOCKETFILTERFW} --setblockall off",
        )
        return
    told = subject.output([SOCKETFILTERFW, "--getappblocked", program])
    if told is None:
        yield skipped("firewall", f"it is on, and {SOCKETFILTERFW} does not tell whether it blocks {program}")
        return
    if blocks_app(told):
        yield Finding(
            "firewall",
            "error",
            f"macOS's firewall blocks incoming connections to {program}",
            WHY,
            f"sudo {SOCKETFILTERFW} --add {program} && sudo {SOCKETFILTERFW} --unblockapp {program}",
        )
        return
    yield fine("firewall", f"macOS's firewall is on, and does not block {program}")


def blocks_all(text: str) -> bool:
    """The answer to --getblockall: "Block all DISABLED!", "Firewall has block all state set to enabled."."""
    return re.search(r"block all (?:INCOMING|ENABLED|state set to enabled)", text, re.IGNORECASE) is not None


def blocks_app(text: str) -> bool:
    """The answer to --getappblocked: "Incoming connection to the application is blocked"."""
    return re.search(r"\b(?:is blocked|are blocked|block incoming)", text, re.IGNORECASE) is not None


def _linux(subject: Subject, ports: list[int]) -> Iterable[Finding]:
    wanted = ", ".join(map(str, ports))
    try:
        has_ufw = re.search(r"^ENABLED=yes", UFW_CONF.read_text(), re.MULTILINE) is not None
    except OSError:
        has_ufw = False
    if has_ufw:
        status = subject.output(["ufw", "status"])
        if status is None:
            yield skipped(
                "firewall", f"ufw is on, and only root may read its rules: sudo ufw status | grep {ports[0]}"
            )
        elif closed := [
            port for port in ports if not re.search(rf"^{port}(/tcp)?\s+ALLOW", status, re.MULTILINE)
        ]:
            yield _closed("ufw", closed, " && ".join(f"sudo ufw allow {port}/tcp" for port in closed))
        else:
            yield fine("firewall", f"ufw lets others in to {wanted}")
        return
    if subject.output(["firewall-cmd", "--state"]) == "running":
        told = (subject.output(["firewall-cmd", "--list-ports"]) or "").split()
        closed = [port for port in ports if not any(_covers(entry, port) for entry in told)]
        if closed:
            adds = " ".join(f"--add-port={port}/tcp" for port in closed)
            command = f"sudo firewall-cmd --permanent {adds} && sudo firewall-cmd --reload"
            yield _closed("firewalld", closed, command)
        else:
            yield fine("firewall", f"firewalld lets others in to {wanted}")
        return
    yield from _nft(subject, ports)


def _covers(entry: str, port: int) -> bool:
    """firewalld's "50051/tcp" or "50000-50100/tcp"."""
    match = re.fullmatch(r"(\d+)(?:-(\d+))?/tcp", entry)
    return match is not None and int(match[1]) <= port <= int(match[2] or match[1])


def _closed(program: str, ports: list[int], command: str) -> Finding:
    what = f"{program} is on and has no rule that lets others in to port {', '.join(map(str, ports))}"
    return Finding("firewall", "error", what, WHY, command)


def _nft(subject: Subject, ports: list[int]) -> Iterable[Finding]:
    rules = subject.output(["nft", "list", "ruleset"])
    if rules is None:
        yield skipped(
            "firewall",
            "no ufw and no firewalld here, and nft does not tell its rules (not installed, or not root)",
        )
        return
    chains = re.findall(r"chain \w+ \{[^}]*hook input[^}]*policy drop;[^}]*\}", rules)
    closed = [port for port in ports if any(str(port) not in chain for chain in chains)]
    if closed:
        rule = f"sudo nft insert rule inet filter input tcp dport {{ {', '.join(map(str, closed))} }} accept"
        yield _closed(
            "nftables drops what comes in,", closed, f"{rule}    # in the table and chain that drop"
        )
    else:
        yield fine("firewall", "nftables drops nothing that comes in to the nodes here")
