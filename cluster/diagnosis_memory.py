"""Doctor's check of memory: what the config counts on, what a GPU may have, what is free. Any thread."""

from __future__ import annotations

from collections.abc import Iterable

from cluster.diagnosis import Finding, Subject, fine, skipped
from cluster.memory_pressure import STOP_SHARE, WARN_SHARE
from cluster.probe import available_bytes, seen_machine
from planner.node_profile import GB, NodeProfile
from planner.sizes import gb

SLACK = 1.05  # "64 GB" of a shop and of a system differ by so much
MAX_WIRED_SHARE = 0.9  # beyond it macOS itself has too little


def memory(subject: Subject) -> Iterable[Finding]:
    """All of it."""
    machine = seen_machine()
    wrong = [*_configured(subject, machine), *_free(subject, machine)]
    if subject.is_mac:
        wrong += _wired(subject, machine)
    yield from wrong
    if not any(finding.is_wrong for finding in wrong):
        guess = "" if machine.ceiling_source == "measured" else ", a guess"
        yield fine(
            "memory",
            f"{gb(machine.memory_bytes)}, of which the {machine.device} device may have "
            f"{gb(machine.ceiling_bytes)}{guess}",
        )


def _configured(subject: Subject, machine: NodeProfile) -> Iterable[Finding]:
    """What the cluster file counts on for nodes here, against what is here."""
    for node in subject.nodes:
        if node.memory_gb is not None and node.memory_gb * GB > machine.memory_bytes * SLACK:
            yield Finding(
                "memory",
                "warning",
                f"nodes[{node.rank}].memory_gb = {node.memory_gb:g}, but this machine has "
                f"{gb(machine.memory_bytes)}",
                "plans count on memory that is not there: layers that do not fit swap, or end the node",
                f'"memory_gb": {machine.memory_bytes / GB:.0f}    # in nodes[{node.rank}] of the file, on '
                "all nodes; or leave it out, then it is measured",
            )
    for node in subject.nodes:
        ceiling = machine.ceiling_bytes
        if node.max_memory_gb is not None and node.max_memory_gb * GB > ceiling * SLACK:
            yield Finding(
                "memory",
                "warning",
                f"nodes[{node.rank}].max_memory_gb = {node.max_memory_gb:g} of {node.name} is more than the "
                f"{gb(ceiling)} that its device lets a program have",
                "the cap has no effect: plans go up to the device's own limit",
                f'"max_memory_gb": {ceiling / GB:.0f}    # or less, in nodes[{node.rank}] of the file',
            )


def _free(subject: Subject, machine: NodeProfile) -> Iterable[Finding]:
    """What other programs leave."""
    if subject.running is not None:
        yield skipped("free memory", "a running node watches it all the time: see macrame status")
        return
    free_bytes = available_bytes(machine.memory_bytes)
    share = free_bytes / machine.memory_bytes
    if share >= WARN_SHARE:
        return
    is_error = share < STOP_SHARE
    yield Finding(
        "memory",
        "error" if is_error else "warning",
        f"{gb(free_bytes)} of {gb(machine.memory_bytes)} are available now",
        "below 4 % a node starts no new request" if is_error else "below 8 % a node gives up its caches",
        "end programs that you do not need: "
        + ("top -o mem" if subject.is_mac else "ps -eo pid,rss,comm --sort=-rss | head"),
    )


def _wired(subject: Subject, machine: NodeProfile) -> Iterable[Finding]:
    """The limit that somebody set with sysctl, if any."""
    told = subject.output(["sysctl", "-n", "iogpu.wired_limit_mb"])
    if told is None or not told.isdecimal():
        yield skipped("wired limit", "this macOS does not tell iogpu.wired_limit_mb")
        return
    limit_bytes = int(told) << 20
    if limit_bytes == 0:
        share = machine.ceiling_bytes / machine.memory_bytes
        yield fine("wired limit", f"macOS's own: {gb(machine.ceiling_bytes)} ({share:.0%} of memory)")
    elif limit_bytes > machine.memory_bytes * MAX_WIRED_SHARE:
        safe_mb = int(machine.memory_bytes * MAX_WIRED_SHARE) >> 20
        yield Finding(
            "memory",
            "warning",
            f"iogpu.wired_limit_mb = {told} lets the GPU wire "
            f"{limit_bytes / machine.memory_bytes:.0%} of memory",
            "macOS needs the rest for itself: Macs with such limits froze and had to be switched off",
            f"sudo sysctl iogpu.wired_limit_mb={safe_mb}",
        )
    else:
        yield fine("wired limit", f"raised to {gb(limit_bytes)} until the next start of this Mac")
