"""All checks of one machine, one after another. Any thread; takes seconds, and disturbs no running ring."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Collection

from cluster.diagnosis import Check, Finding, Subject, skipped
from cluster.diagnosis_clock import clock
from cluster.diagnosis_disk import disk
from cluster.diagnosis_firewall import firewall
from cluster.diagnosis_links import links
from cluster.diagnosis_memory import memory
from cluster.diagnosis_model import model
from cluster.diagnosis_plan import plan
from cluster.diagnosis_ports import ports
from cluster.diagnosis_reach import reach
from cluster.diagnosis_security import security
from cluster.diagnosis_sleep import sleep
from cluster.diagnosis_software import device, environment, packages, python

CHECKS: tuple[Check, ...] = (
    *(python, packages, environment, device, memory, disk, sleep, clock),
    *(security, ports, firewall, reach, links, model, plan),
)


def diagnose(
    subject: Subject,
    on_check: Callable[[str], object] = lambda _name: None,
    *,
    without: Collection[str] = (),
) -> list[Finding]:
    """What every check finds, in order; `on_check` gets the name of each before it runs.

    without: names of checks that somebody else does.
    """
    findings: list[Finding] = []
    for check in CHECKS:
        name = check.__name__
        if name in without:
            continue
        on_check(name)
        try:
            findings += check(subject)
        except (OSError, ValueError, RuntimeError, subprocess.SubprocessError) as error:
            # A system that is like none we know; the other checks go on.
            findings.append(skipped(name, f"the check itself failed: {type(error).__name__}: {error}"))
    return findings
