"""Machines with an sshd, a HOME and a Python each, and one from which a user runs the macrame of a wheel.

switch ---- alpha   the user's machine: macrame is installed there from a wheel, with a key for the others
       ---- beta    sshd and Python, nothing of macrame, no route to any package index
       ---- gamma   the same
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from deploy.wheel import own_wheel
from tests.namespaces import Machine, base_python, network
from tests.ssh_host import find_sshd, make_key, server_config

ROOT = Path(__file__).resolve().parent.parent
LIMIT_S = 10.0


@dataclass(frozen=True, slots=True)
class Carried:
    """What a user brings: macrame installed from its wheel, and the wheels of all that it needs."""

    wheel: Path
    python: Path  # of the environment in which macrame is
    links: Path

    @property
    def macrame(self) -> Path:
        return self.python.parent / "macrame"


def fetched(wheel: Path, links: Path) -> Path:
    """The wheels of all that `wheel` needs, for machines like this one."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--only-binary", ":all:"]
    subprocess.run([*pip, "--dest", str(links), str(wheel)], check=True)
    (links / wheel.name).unlink()
    return links


def carried(folder: Path) -> Carried:
    """Fetches the wheels from the index, once, and installs from them as a user does."""
    wheel = own_wheel(folder / "wheel")
    links = fetched(wheel, folder / "links")
    environment = folder / "environment"
    subprocess.run([str(base_python()), "-m", "venv", str(environment)], check=True)
    python = environment / "bin" / "python"
    install = [str(python), "-m", "pip", "install", "--quiet", "--no-index", "--find-links", str(links)]
    subprocess.run([*install, str(wheel)], check=True)
    return Carried(wheel, python, links)


class SshMachines:
    """The network; `alpha` is the user's, the others have sshd. Use `ssh_machines`."""

    def __init__(self, folder: Path, machines: Sequence[Machine], what: Carried) -> None:
        self.folder, self.what = folder, what
        self.machines = {machine.name: machine for machine in machines}
        self.alpha = machines[0]
        self.others = list(machines[1:])

    def home(self, name: str) -> Path:
        return self.folder / name / "home"

    @property
    def ssh_config(self) -> Path:
        return self.folder / "ssh_config"

    @property
    def environment(self) -> dict[str, str]:
        """Of the user on alpha: nothing of this test's own."""
        kept = {key: os.environ[key] for key in ("PATH", "LANG", "LC_ALL") if key in os.environ}
        return {**kept, "HOME": str(self.home("alpha")), "COLUMNS": "120"}

    def macrame(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        """A command of the user's."""
        return subprocess.run(
            self.alpha.command(self.what.macrame, *arguments),
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
            env=self.environment,
            stdin=subprocess.DEVNULL,
        )

    @contextlib.contextmanager
    def up(
        self, config: Path, *arguments: object, with_wheels: bool = True
    ) -> Iterator[subprocess.Popen[str]]:
        """`macrame up --ssh --json` of the user's, until the block ends; then as after Ctrl-C."""
        wheels = ("--find-links", self.what.links) if with_wheels else ()
        usual = ("--ssh", "--ssh-config", self.ssh_config, *wheels, "--json")
        with (self.folder / "up.err").open("ab") as err:
            process = subprocess.Popen(
                self.alpha.command(self.what.macrame, "up", "--config", config, *usual, *arguments),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=err,
                text=True,
                env=self.environment,
                process_group=0,
            )
        try:
            yield process
        finally:
            if process.poll() is None:
                interrupt(self.alpha, "up")
            assert process.stdout is not None
            process.stdout.read()
            process.wait(30.0)
            process.stdout.close()

    def kill_up(self, up: subprocess.Popen[str]) -> None:
        """SIGKILL, after which ssh's own connections would live on for a minute; those are ended too."""
        interrupt(self.alpha, "up", signal.SIGKILL)
        up.wait(LIMIT_S)
        for connection in self.alpha.processes("[mux]"):
            connection.terminate()

    def nodes(self, name: str) -> int:
        """How many run_node run on a machine."""
        return len(self.machines[name].processes("cluster.run_node"))

    def errors(self) -> str:
        return (self.folder / "up.err").read_text()


def interrupt(machine: Machine, word: str, number: signal.Signals = signal.SIGINT) -> None:
    """A signal to the machine's Python process with that argument: nsenter does not pass them on."""
    (found,) = [p for p in machine.processes(word) if word in p.cmdline()[1:]]
    found.send_signal(number)


@contextlib.contextmanager
def ssh_machines(folder: Path, names: Sequence[str], what: Carried) -> Iterator[SshMachines]:
    """The machines, those after the first with sshd on port 22; their host keys are known on the first."""
    sshd = find_sshd()
    make_key(folder / "user_key")
    hidden = {name: [ROOT] for name in names}
    with network(folder, names, hidden=hidden) as net, contextlib.ExitStack() as stack:
        machines = SshMachines(folder, net.machines, what)
        known = []
        for name in names:
            machines.home(name).mkdir(parents=True)
        for machine in machines.others:
            place = folder / machine.name
            kind, key, *_ = make_key(place / "host_key").with_suffix(".pub").read_text().split()
            known.append(f"{machine.name} {kind} {key}")
            (place / "user_key.pub").write_bytes((folder / "user_key.pub").read_bytes())
            path = f"{base_python().parent}:/usr/bin:/bin"
            address = net.addresses[machine.name]
            config = server_config(place, place / "home", address=address, port=22, path=path)
            log = stack.enter_context((place / "sshd.log").open("wb"))
            server = subprocess.Popen(machine.command(sshd, "-D", "-e", "-f", config), stderr=log)
            stack.callback(server.wait, LIMIT_S)
        (folder / "known_hosts").write_text("\n".join(known) + "\n")
        machines.ssh_config.write_text(
            f"Host *\n  IdentityFile {folder / 'user_key'}\n  IdentitiesOnly yes\n  IdentityAgent none\n"
            f"  UserKnownHostsFile {folder / 'known_hosts'}\n  GlobalKnownHostsFile /dev/null\n"
        )
        for machine in machines.others:
            machine.run(base_python(), "-c", _WAIT, machine.name)
        stack.callback(_end_servers, machines)
        yield machines


_WAIT = """
import socket, sys, time
for _ in range(500):
    try:
        with socket.create_connection((sys.argv[1], 22), timeout=20) as connection:
            assert connection.recv(4) == b"SSH-"
            break
    except OSError:
        time.sleep(0.02)
else:
    sys.exit("no sshd")
"""


def _end_servers(machines: SshMachines) -> None:
    for machine in machines.others:
        for server in machine.processes("-D"):
            server.terminate()
