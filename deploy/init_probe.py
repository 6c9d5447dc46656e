"""What a machine is, asked over ssh: a small script for `sh` there, and the reading of what it prints.

`read_probe` is pure; `probe` has one connection, one thread.
"""

from __future__ import annotations

import ipaddress
import re
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from cluster import macos
from cluster.config_nodes import is_loopback
from cluster.errors import EXIT_ERROR, UserError
from cluster.probe import is_this_machine, seen_machine
from deploy.ssh import Ssh

PROBE_S = 40.0  # system_profiler alone takes seconds on some Macs
RESOLVE_S = 10.0
MIB = 1 << 20
LEAST_PYTHON = (3, 11)

# POSIX sh; each line of output is KEY=VALUE, line ends within a value become blanks
SCRIPT = r"""
PATH="$PATH:/usr/sbin:/sbin"
tell() { printf '%s=%s\n' "$1" "$(printf %s "$2" | tr '\r\n' '  ')"; }
tell system "$(uname -s)"
tell name "$(uname -n)"
tell connection "$SSH_CONNECTION"
if [ "$(uname -s)" = Darwin ]; then
    tell release "$(sw_vers -productVersion)"
    tell memory_bytes "$(sysctl -n hw.memsize)"
    tell chip "$(sysctl -n machdep.cpu.brand_string)"
    tell displays "$(system_profiler SPDisplaysDataType -json)"
    tell identity "$(ioreg -rd1 -c IOPlatformExpertDevice | grep IOPlatformUUID)"
else
    tell memory_kib "$(sed -n 's/^MemTotal: *\([0-9]*\) kB$/\1/p' /proc/meminfo)"
    tell limit_bytes "$(cat /sys/fs/cgroup/memory.max 2>/dev/null)"
    tell chip "$(sed -n 's/^model name[^:]*: *//p' /proc/cpuinfo | head -n 1)"
    tell machine "$(uname -m)"
    ask='--query-gpu=name,memory.total --format=csv,noheader,nounits'
    tell gpus "$(nvidia-smi $ask 2>/dev/null | head -n 1)"
    tell identity "$(cat /etc/machine-id 2>/dev/null)"
fi
for python in python3.14 python3.13 python3.12 python3.11 python3; do
    tell python "$($python -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)"
done
tell uv "$(command -v uv)"
exit 0
"""


@dataclass(frozen=True, slots=True)
class Machine:
    """One machine that may become a node. destination: what ssh takes; None: this machine."""

    destination: str | None
    host: str  # by which other nodes find it
    name: str
    system: str
    chip: str
    gpu_cores: int | None
    memory_bytes: int
    identity: str = ""  # what tells it from every other, where it says
    seen_us_as: str = ""  # the address from which our connection came, as that machine saw it
    can_install: bool = True  # it has a Python that does, or uv


def this_machine() -> Machine:
    """The one this runs on; its host is loopback until others come in (`reachable_host`)."""
    own = seen_machine()
    return Machine(
        destination=None,
        host="127.0.0.1",
        name=_plain_name(socket.gethostname()),
        system="macOS" if sys.platform == "darwin" else sys.platform.capitalize(),
        chip=own.chip or "",
        gpu_cores=own.gpu_cores or None,
        memory_bytes=own.memory_bytes,
    )


def probe(destination: str, options: Sequence[str], *, is_interactive: bool) -> Machine:
    """What the machine behind an ssh destination is. Raises UserError: ssh's sentences, or that it is odd."""
    host = host_of(destination, options)
    with Ssh(destination, options=options, is_interactive=is_interactive) as ssh:
        text = ssh.check(SCRIPT, timeout_s=PROBE_S)
    return read_probe(destination, host, text)


def host_of(destination: str, options: Sequence[str]) -> str:
    """The host name or address that ssh's config has for it (`ssh -G`). Raises UserError."""
    try:
        done = subprocess.run(
            ["ssh", *options, "-G", "--", destination],
            capture_output=True,
            stdin=subprocess.DEVNULL,
            text=True,
            errors="replace",
            timeout=RESOLVE_S,
            check=False,
        )
    except FileNotFoundError:
        raise UserError("there is no ssh on this machine: install OpenSSH", EXIT_ERROR) from None
    except subprocess.TimeoutExpired:
        raise UserError(f"ssh -G {destination} did not end within {RESOLVE_S:.0f} s", EXIT_ERROR) from None
    found = re.search(r"^hostname (\S+)$", done.stdout, re.MULTILINE)
    return found[1] if found else destination.rpartition("@")[2]


def read_probe(destination: str, host: str, text: str) -> Machine:
    """From the script's output. Raises UserError where it is no machine that can be a node."""
    told: dict[str, str] = {}
    pythons = []
    for line in text.splitlines():
        key, _, value = line.partition("=")
        told[key] = value.strip()
        if key == "python":
            pythons.append(value.strip())
    system = told.get("system", "")
    if system not in ("Darwin", "Linux"):
        raise UserError(
            f"{destination} runs {system or 'no system that it names'}: a node needs macOS or Linux",
            EXIT_ERROR,
        )
    memory_bytes, chip = _memory_and_chip(told)
    if not memory_bytes:
        raise UserError(f"{destination} does not say how much memory it has", EXIT_ERROR)
    return Machine(
        destination=destination,
        host="127.0.0.1" if is_loopback(host) else host,
        name=_plain_name(told.get("name", "") or host),
        system=f"macOS {told.get('release', '')}".strip() if system == "Darwin" else "Linux",
        chip=chip,
        gpu_cores=macos.parse_gpu_cores(told.get("displays", "")),
        memory_bytes=memory_bytes,
        identity=macos.parse_platform_uuid(told.get("identity", "")) or told.get("identity", ""),
        seen_us_as=told.get("connection", "").partition(" ")[0],
        can_install=bool(told.get("uv")) or any(map(_is_new, pythons)),
    )


def reachable_host(others: Sequence[Machine]) -> str:
    """How the others find this machine: its name if that is announced, else where they saw us come from."""
    own = socket.gethostname()
    if own.endswith(".local"):  # macOS, which announces it by Bonjour
        return own
    for other in others:
        if other.seen_us_as and not _is_of_one_link(other.seen_us_as):
            return "127.0.0.1" if is_loopback(other.seen_us_as) else other.seen_us_as
    return own


def is_here(destination: str) -> bool:
    """True for a bare name or address of this machine; ssh is not needed."""
    return "@" not in destination and is_this_machine(destination)


def _memory_and_chip(told: dict[str, str]) -> tuple[int, str]:
    """Bytes, and what the planner takes the speed from; of the GPU where there is one of NVIDIA."""
    name, comma, mib = told.get("gpus", "").rpartition(",")
    if comma and mib.strip().isdecimal():
        return int(mib) * MIB, f"NVIDIA {name.strip().removeprefix('NVIDIA ')}"
    chip = told.get("chip") or told.get("machine", "")
    if told.get("memory_bytes", "").isdecimal():
        return int(told["memory_bytes"]), chip
    kib, limit = told.get("memory_kib", ""), told.get("limit_bytes", "")
    memory_bytes = int(kib) * 1024 if kib.isdecimal() else 0
    return (min(memory_bytes, int(limit)) if limit.isdecimal() else memory_bytes), chip


def _plain_name(host: str) -> str:
    """The first label of a host name; an address as it is."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return "".join(c for c in host.partition(".")[0] if c.isprintable()).strip() or "node"
    return host


def _is_of_one_link(address: str) -> bool:
    """A link-local address of IPv6 means something on one machine's link only."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return True
    return ip.version == 6 and ip.is_link_local


def _is_new(version: str) -> bool:
    parts = version.split(".")
    is_version = len(parts) == 2 and all(part.isdecimal() for part in parts)
    return is_version and (int(parts[0]), int(parts[1])) >= LEAST_PYTHON
