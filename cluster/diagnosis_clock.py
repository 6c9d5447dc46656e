"""Doctor's check of this machine's clock, as far as one machine can tell. Any thread."""

from __future__ import annotations

import time
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

from cluster.diagnosis import Finding, Subject, fine, skipped

WHY = (
    "certificates count by the clock of each machine, and log lines of several nodes can only be put "
    "in order "
    "where their clocks agree"
)
SET_MAC = "sudo sntp -sS time.apple.com"
SET_LINUX = "sudo timedatectl set-ntp true"
ALONE = "one machine cannot tell whether its clock is right; --all compares those of the nodes"


def set_clock(subject_is_mac: bool) -> str:
    """The command that sets a machine's clock by the network."""
    return SET_MAC if subject_is_mac else SET_LINUX


def clock(subject: Subject) -> Iterable[Finding]:
    """That it does not lie before this program was installed, and whether the system keeps it."""
    if subject.running is not None:
        return  # whoever asks a running node compares its clock with others
    installed_s = Path(__file__).stat().st_mtime
    now_s = time.time()
    if now_s < installed_s:
        yield Finding(
            "clock",
            "error",
            f"the clock says {_text(now_s)}, but macrame was installed here on {_text(installed_s)}",
            WHY,
            set_clock(subject.is_mac),
        )
    elif subject.is_mac:
        yield from _by_network(
            subject.output(["systemsetup", "-getusingnetworktime"]), "Network Time: Off", "On"
        )
    else:
        told = subject.output(["timedatectl", "show", "--property=NTPSynchronized", "--value"])
        yield from _by_network(told, "no", "yes", SET_LINUX)


def _by_network(told: str | None, off: str, on: str, mend: str = SET_MAC) -> Iterable[Finding]:
    """What the system says of setting the clock by the network."""
    if told == off:
        what = "this machine does not set its clock by the network (now)"
        yield Finding("clock", "warning", what, WHY, mend)
    elif told is not None and told.endswith(on):
        yield fine("clock", "the system sets it by the network")
    else:
        yield skipped("clock", ALONE)


def _text(moment_s: float) -> str:
    return datetime.fromtimestamp(moment_s, UTC).strftime("%Y-%m-%d %H:%M UTC")
