"""Doctor's check of what puts a machine to sleep, or slows it down. Any thread; on macOS it runs pmset(1)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import psutil

from cluster.diagnosis import Finding, Subject, fine, skipped

LOGIND = (Path("/etc/systemd/logind.conf"), Path("/etc/systemd/logind.conf.d"))
WHY = "a sleeping machine answers nobody: its ring stops until it wakes"


def sleep(subject: Subject) -> Iterable[Finding]:
    """Sleep settings and the source of power."""
    found = [*(_mac(subject) if subject.is_mac else _linux()), *_battery(subject)]
    yield from found
    if not found:
        yield fine("sleep", "nothing puts this machine to sleep when it is idle")


def _mac(subject: Subject) -> Iterable[Finding]:
    now = subject.output(["pmset", "-g"])
    if now is None:
        yield skipped("sleep", "pmset -g does not answer")
        return
    settings, blockers = parse_pmset(now)
    if "sleep" not in settings:
        yield skipped("sleep", "pmset -g names no sleep setting")
        return
    if settings["sleep"] and not blockers:
        yield Finding(
            "sleep",
            "warning",
            f"this Mac goes to sleep after {settings['sleep']} idle minutes",
            WHY,
            "sudo pmset -c sleep 0    # on mains power; or for as long as it serves: caffeinate -i -s",
        )
    elif settings["sleep"]:
        yield fine("sleep", f"held off by {blockers}, else after {settings['sleep']} idle minutes")
    if settings.get("lowpowermode"):
        yield Finding(
            "sleep",
            "warning",
            "Low Power Mode is on",
            "it slows CPU and GPU down, and every token of the ring waits for its slowest stage",
            "sudo pmset -a lowpowermode 0",
        )


def parse_pmset(text: str) -> tuple[Mapping[str, int], str]:
    """The settings in use by name, and which processes hold sleep off, from `pmset -g`.

    A line is ` sleep                1 (sleep prevented by caffeinate, powerd)`, as pmset(1) has it.
    """
    settings = {name: int(value) for name, value in re.findall(r"^ (\w+) +(\d+)(?: |$)", text, re.MULTILINE)}
    held = re.search(r"^ sleep +\d+ \(sleep prevented by ([^)]*)\)", text, re.MULTILINE)
    # powerd alone holds it off only while the display is on
    names = [name.strip() for name in held[1].split(",")] if held else []
    return settings, ", ".join(name for name in names if name != "powerd")


def _linux() -> Iterable[Finding]:
    """systemd-logind's own action on idleness; desktops have settings of their own."""
    texts = []
    main, folder = LOGIND
    for path in (main, *sorted(folder.glob("*.conf"))):
        try:
            texts.append(path.read_text(errors="replace"))
        except OSError:
            continue
    if not texts:
        yield skipped("sleep", "no systemd-logind here; a desktop's own settings are not looked at")
        return
    actions = re.findall(r"^\s*IdleAction\s*=\s*(\S+)", "\n".join(texts), re.MULTILINE)
    action = actions[-1] if actions else "ignore"
    if action in ("suspend", "hibernate", "hybrid-sleep", "suspend-then-hibernate", "poweroff", "halt"):
        yield Finding(
            "sleep",
            "warning",
            f"systemd-logind does {action!r} when this machine is idle (IdleAction)",
            WHY,
            "sudo systemctl mask sleep.target suspend.target hibernate.target hybrid-sleep.target",
        )
    else:
        yield fine("sleep", "systemd-logind does nothing on idleness; a desktop's settings are not looked at")


def _battery(subject: Subject) -> Iterable[Finding]:
    if subject.is_mac:
        told = subject.output(["pmset", "-g", "batt"]) or ""
        is_on_battery = "'Battery Power'" in told
    else:
        battery = psutil.sensors_battery()
        is_on_battery = battery is not None and battery.power_plugged is False
    if is_on_battery:
        yield Finding(
            "sleep",
            "warning",
            "this machine runs on battery",
            "it is slower so, and caffeinate -s holds off sleep only on mains power",
            "connect its power supply",
        )
