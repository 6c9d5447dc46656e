"""Network namespaces that are like machines: own addresses, names, processes and mounts. Needs root.

Needs unshare and nsenter (util-linux) and ip (iproute2); a test is skipped where the system does not permit
it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

LIMIT_S = 10.0


def need_tools(*tools: str) -> None:
    """Skips the test where one is missing."""
    missing = [tool for tool in tools if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} is not installed")


class Machine:
    """A machine of its own in all but disk and clock; everything on it ends with `close`.

    hidden: folders that are empty there, such as the checkout.
    """

    def __init__(self, name: str, hosts: Path, hidden: Sequence[Path] = ()) -> None:
        need_tools("unshare", "nsenter", "ip")
        self.name = name
        mounts = [f"mount -t tmpfs none '{folder}'" for folder in hidden]
        steps = ['mount --bind "$0" /etc/hosts', "mount -t sysfs none /sys", "ip link set lo up"]
        script = " && ".join([*steps, 'hostname "$1"', *mounts, "echo up", "cat"])
        command = ["unshare", "-n", "-m", "-u", "-p", "--fork", "--kill-child", "--mount-proc"]
        self._holder = subprocess.Popen(
            [*command, "sh", "-c", script, str(hosts), name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd="/",
        )
        assert self._holder.stdout is not None
        if self._holder.stdout.readline() != "up\n":
            pytest.skip(f"no network namespaces here: {self._holder.communicate()[1].strip()}")
        (first,) = psutil.Process(self._holder.pid).children()
        self.pid = first.pid  # its process 1

    def command(self, *arguments: object) -> list[str]:
        """As a process on this machine would be started there."""
        return ["nsenter", "-t", str(self.pid), "-n", "-m", "-u", "-p", "--wd=/", *map(str, arguments)]

    def run(self, *arguments: object, env: Mapping[str, str] | None = None) -> str:
        """What a command there writes; fails where it does."""
        done = subprocess.run(
            self.command(*arguments),
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
            env={**os.environ, **(env or {})},
        )
        assert done.returncode == 0, done.stderr + done.stdout
        return done.stdout

    def processes(self, word: str) -> list[psutil.Process]:
        """Those there of which an argument is or ends with `word`, seen from here."""
        space = os.readlink(f"/proc/{self.pid}/ns/pid")
        found = []
        for process in psutil.process_iter(["cmdline"]):
            with contextlib.suppress(OSError, psutil.Error):
                is_there = os.readlink(f"/proc/{process.pid}/ns/pid") == space
                if is_there and any(part.endswith(word) for part in process.info["cmdline"] or []):
                    found.append(process)
        return found

    def close(self) -> None:
        """Ends its process 1, and with it all others."""
        self._holder.communicate(timeout=LIMIT_S)


@dataclass(frozen=True, slots=True)
class Network:
    """Machines on one switch; their addresses by name."""

    machines: tuple[Machine, ...]
    addresses: dict[str, str]


@contextlib.contextmanager
def network(
    folder: Path, names: Sequence[str], *, net: str = "10.88.0", hidden: Mapping[str, Sequence[Path]] = {}
) -> Iterator[Network]:
    """Machines that know each other by name, with no route to anywhere else."""
    addresses = {name: f"{net}.{number}" for number, name in enumerate(names, 1)}
    hosts = folder / "hosts"
    lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in addresses.items())]
    hosts.write_text("\n".join(lines) + "\n")
    with contextlib.ExitStack() as stack:

        def started(name: str) -> Machine:
            machine = Machine(name, hosts, hidden.get(name, ()))
            stack.callback(machine.close)
            return machine

        switch = started("switch")
        switch.run("ip", "link", "add", "bridge", "type", "bridge")
        switch.run("ip", "link", "set", "bridge", "up")
        machines = tuple(started(name) for name in names)
        for machine in machines:
            port = f"to-{machine.name}"
            # From outside, where the number of the machine's process means it
            plug = ["type", "veth", "peer", "name", "cable", "netns", str(machine.pid)]
            here = ["nsenter", "-t", str(switch.pid), "-n"]
            subprocess.run([*here, "ip", "link", "add", port, *plug], check=True)
            switch.run("ip", "link", "set", port, "master", "bridge", "up")
            machine.run("ip", "address", "add", f"{addresses[machine.name]}/24", "dev", "cable")
            machine.run("ip", "link", "set", "cable", "up")
        yield Network(machines, addresses)


def base_python() -> Path:
    """The interpreter below this environment, which no checkout and no environment hides."""
    return Path(sys.base_prefix) / "bin" / f"python3.{sys.version_info.minor}"
