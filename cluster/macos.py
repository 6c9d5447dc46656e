"""What macOS tells of a Mac through its own commands. Parsers are pure; the rest runs a command and waits.

vm_stat(1), sysctl(8), system_profiler(8) and ioreg(8) are in every macOS. Any thread may call them.
"""

from __future__ import annotations

import json
import re
import subprocess
from typing import Any

COMMAND_TIMEOUT_S = 15.0


def gpu_cores() -> int | None:
    """Of the built-in GPU; None where the system does not say, as in a virtual machine."""
    return parse_gpu_cores(output(["system_profiler", "SPDisplaysDataType", "-json"]) or "")


def sysctl(key: str) -> str | None:
    """One value of the kernel, such as machdep.cpu.brand_string."""
    return output(["sysctl", "-n", key])


def available_bytes() -> int | None:
    """Memory that a program can have without anything being compressed or swapped."""
    return parse_vm_stat(output(["vm_stat"]) or "")


def platform_uuid() -> str | None:
    """What tells this Mac from every other."""
    return parse_platform_uuid(output(["ioreg", "-rd1", "-c", "IOPlatformExpertDevice"]) or "")


def parse_platform_uuid(text: str) -> str | None:
    """The line `"IOPlatformUUID" = "..."` of ioreg(8)."""
    match = re.search(r'"IOPlatformUUID" = "([0-9A-Fa-f-]+)"', text)
    return match[1] if match else None


def parse_gpu_cores(text: str) -> int | None:
    """The largest `sppci_cores` in `system_profiler SPDisplaysDataType -json`.

    Only Apple's own GPUs have that key: an Intel Mac's Radeon and a virtual Mac's display do not.
    """
    try:
        displays = json.loads(text or "{}").get("SPDisplaysDataType", [])
        found = [_cores(display) for display in displays if isinstance(display, dict)]
    except (ValueError, TypeError, AttributeError):
        return None
    return max((cores for cores in found if cores), default=None)


def _cores(display: dict[str, Any]) -> int:
    text = str(display.get("sppci_cores", ""))
    return int(text) if text.isdecimal() and 0 < int(text) <= 4096 else 0


def parse_vm_stat(text: str) -> int | None:
    """Free bytes, with the file cache and purgeable memory counted as free. None: no output of vm_stat.

    Active, inactive and speculative pages together are the file-backed and the anonymous ones, so the lines
    must not all be added up. File-backed pages can be dropped, purgeable ones are given up by their owner on
    demand; what is inactive and anonymous can only be compressed, and does not count. Activity Monitor
    calls the same two "Cached Files". Before OS X 10.9 vm_stat had no line for files: there, inactive and
    speculative pages stand in for them. psutil adds free and inactive pages, which counts idle programs as
    free and leaves out files that are in use.
    """
    header = re.search(r"page size of (\d+) bytes", text)
    if header is None:
        return None
    lines = re.findall(r'^"?([A-Z][^":\n]*)"?:\s+(\d+)\.?\s*$', text, re.MULTILINE)
    pages = {name.lower(): int(value) for name, value in lines}
    if "pages free" not in pages:
        return None
    files = pages.get("file-backed pages")
    if files is None:
        files = pages.get("pages inactive", 0) + pages.get("pages speculative", 0)
    return int(header[1]) * (pages["pages free"] + files + pages.get("pages purgeable", 0))


def output(command: list[str]) -> str | None:
    """What a command printed, or None where it is missing, fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return done.stdout.strip() or None
