"""Nodes tell the local network that they are there, and hear of each other: Bonjour, by zeroconf.

What is heard is a hint and never trust: anybody in the network can announce anything, so nothing here
connects to anybody, and each text is cut and made printable. Own threads of zeroconf; any thread may call.
https://www.rfc-editor.org/rfc/rfc6763 (DNS-SD), https://www.rfc-editor.org/rfc/rfc6762 (mDNS)
"""

from __future__ import annotations

import hashlib
import ipaddress
import logging
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from zeroconf import Error as ZeroconfError
from zeroconf import InterfaceChoice, IPVersion, ServiceBrowser, ServiceInfo, ServiceStateChange, Zeroconf

from cluster.config_nodes import NodeConfig
from cluster.versions import macrame_version
from planner.node_profile import NodeProfile

log = logging.getLogger(__name__)

NODE_TYPE = "_macrame._tcp.local."
SSH_TYPE = "_ssh._tcp.local."  # what a Mac announces while its Remote Login is on
ANSWER_MS = 1500
MAX_HEARD = 256  # announcements; a flood of more is cut
MAX_CHARS = 80
MAX_INSTANCE_BYTES = 50  # a DNS label has 63
MAX_MEMORY_BYTES = 1 << 50


@dataclass(frozen=True, slots=True)
class Heard:
    """What one announcement says, as it says it. Empty or 0: it does not."""

    kind: str  # node, or ssh: a machine that offers a login
    name: str
    host: str  # as mini1.local
    addresses: tuple[str, ...]
    port: int
    chip: str = ""
    gpu_cores: int = 0
    memory_bytes: int = 0
    version: str = ""
    cluster: str = ""  # the config's digest: nodes of one cluster say the same
    rank: int | None = None


class Announcement:
    """One node's announcement, made in a thread of its own: it takes a second, and it may fail."""

    def __init__(
        self, node: NodeConfig, machine: NodeProfile, addresses: Sequence[str], cluster: str
    ) -> None:
        self._addresses = list(addresses)
        self._info = _service(node, machine, self._addresses, cluster)
        self._zeroconf: Zeroconf | None = None
        self._lock = threading.Lock()
        self._is_closed = False
        self._thread = threading.Thread(target=self._announce, name="announce", daemon=True)

    def start(self) -> None:
        """Returns at once. A network that does not take it is a line in the log, and no failure."""
        self._thread.start()

    def close(self, timeout_s: float) -> None:
        """Take it back, for at most about `timeout_s`; who does not hear of that forgets it after a while."""
        with self._lock:
            self._is_closed = True
            zeroconf, self._zeroconf = self._zeroconf, None
        if zeroconf is None:
            return
        ending = threading.Thread(target=_end, args=(zeroconf,), name="announce-end", daemon=True)
        ending.start()
        ending.join(timeout_s)

    def _announce(self) -> None:
        try:
            zeroconf = open_zeroconf(self._addresses)
        except (OSError, ZeroconfError) as error:
            log.info("this node is not announced in the local network: %s", str(error))
            return
        with self._lock:
            if not self._is_closed:
                self._zeroconf = zeroconf
        if self._zeroconf is None:
            _end(zeroconf)
            return
        try:
            zeroconf.register_service(self._info, allow_name_change=True)
        except (OSError, ZeroconfError, RuntimeError) as error:
            if not self._is_closed:
                log.info("this node is not announced in the local network: %s", str(error))


def listen(
    seconds: float,
    *,
    with_ssh: bool = False,
    addresses: Sequence[str] = (),
    is_enough: Callable[[Heard], bool] = lambda _heard: False,
) -> list[Heard]:
    """What is announced now, heard for so many seconds or until it is enough; nodes first, by name.

    addresses: of own interfaces to listen at (empty: all). Raises OSError where the network cannot be heard.
    """
    try:
        zeroconf = open_zeroconf(addresses)
    except ZeroconfError as error:
        raise OSError(str(error)) from None
    ear = _Ear()
    types = [NODE_TYPE, SSH_TYPE] if with_ssh else [NODE_TYPE]
    browser = ServiceBrowser(zeroconf, types, handlers=[ear.on_change])
    try:
        until = time.monotonic() + seconds
        while (name := ear.next_name(until - time.monotonic())) is not None:
            info = zeroconf.get_service_info(*name, timeout=ANSWER_MS)
            if info is not None and (heard := read(info)) is not None:
                ear.heard[name] = heard
                if is_enough(heard):
                    break
    finally:
        browser.cancel()
        zeroconf.close()
    return sorted(ear.heard.values(), key=lambda one: (one.kind, one.name, one.host, one.port))


def read(info: ServiceInfo) -> Heard | None:
    """An announcement as a value; None for one without an address or a port."""
    told = {_plain(_text(key)): _text(value) for key, value in info.properties.items()}
    addresses = tuple(str(_without_scope(ip)) for ip in info.parsed_scoped_addresses()[:MAX_HEARD])
    if not addresses or not info.port or not 0 < info.port < 65536:
        return None
    name = info.name.removesuffix("." + info.type)
    is_node = info.type == NODE_TYPE
    return Heard(
        kind="node" if is_node else "ssh",
        name=_plain(told.get("name", name) if is_node else name),
        host=_plain(told.get("host", "") or (info.server or "").removesuffix(".")),
        addresses=addresses,
        port=info.port,
        chip=_plain(told.get("chip", "")),
        gpu_cores=_number(told, "gpu_cores", 4096),
        memory_bytes=_number(told, "memory_bytes", MAX_MEMORY_BYTES),
        version=_plain(told.get("version", "")),
        cluster=_plain(told.get("cluster", "")),
        rank=_number(told, "rank", 10**6) if "rank" in told else None,
    )


def open_zeroconf(addresses: Sequence[str]) -> Zeroconf:
    """At the interfaces with these addresses; none given: at all. Raises OSError or zeroconf's Error."""
    chosen = [ip for ip in addresses if not ipaddress.ip_address(ip).is_unspecified]
    versions = {ipaddress.ip_address(ip).version for ip in chosen}
    if not chosen:
        return Zeroconf(interfaces=InterfaceChoice.All, ip_version=IPVersion.V4Only)
    version = IPVersion.All if len(versions) == 2 else IPVersion.V6Only if 6 in versions else IPVersion.V4Only
    return Zeroconf(interfaces=chosen, ip_version=version)


@dataclass(slots=True)
class _Ear:
    """Names as zeroconf's thread hears them, taken up one by one."""

    heard: dict[tuple[str, str], Heard] = field(default_factory=dict)
    _names: list[tuple[str, str]] = field(default_factory=list)
    _taken: int = 0
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def on_change(
        self, zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange
    ) -> None:
        key = (service_type, name)
        with self._changed:
            if state_change is not ServiceStateChange.Removed and key not in self._names:
                if len(self._names) < MAX_HEARD:
                    self._names.append(key)
                self._changed.notify_all()

    def next_name(self, timeout_s: float) -> tuple[str, str] | None:
        """The next name that was not taken yet; None after `timeout_s`."""
        with self._changed:
            if not self._changed.wait_for(lambda: len(self._names) > self._taken, max(0.0, timeout_s)):
                return None
            self._taken += 1
            return self._names[self._taken - 1]


def _service(node: NodeConfig, machine: NodeProfile, addresses: Sequence[str], cluster: str) -> ServiceInfo:
    told = {
        "name": node.name,
        "host": node.host,
        "rank": str(node.rank),
        "cluster": cluster,
        "chip": machine.chip or "",
        "gpu_cores": str(machine.gpu_cores or 0),
        "memory_bytes": str(machine.memory_bytes),
        "version": macrame_version(),
    }
    digest = hashlib.sha256(f"{cluster} {node.name}".encode()).hexdigest()[:6]  # others have a mini1 too
    plain = re.sub(r"[^A-Za-z0-9 _-]", "-", node.name).strip(" -")[:MAX_INSTANCE_BYTES] or "node"
    return ServiceInfo(
        NODE_TYPE,
        f"{plain}-{digest}.{NODE_TYPE}",
        port=node.port,
        properties={key: value[:MAX_CHARS] for key, value in told.items()},
        server=f"macrame-{digest}.local.",  # the machine's own name belongs to its own responder
        parsed_addresses=list(addresses),
    )


def _end(zeroconf: Zeroconf) -> None:
    try:
        zeroconf.unregister_all_services()
        zeroconf.close()
    except (OSError, ZeroconfError, RuntimeError) as error:
        log.info("the announcement was not taken back: %s", str(error))


def _text(value: bytes | str | None) -> str:
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="replace")
    return value or ""


def _plain(text: str) -> str:
    """Printable and short: it is shown on terminals and may be written by anybody."""
    return "".join(char if char.isprintable() else "?" for char in text[:MAX_CHARS]).strip()


def _number(told: Mapping[str, str], key: str, high: int) -> int:
    text = told.get(key, "")
    is_number = text.isascii() and text.isdigit() and len(text) < 20
    return min(int(text), high) if is_number else 0


def _without_scope(ip: str) -> str:
    return ip.partition("%")[0]
