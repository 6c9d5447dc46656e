"""A real sshd on this machine with its own host key, port, user's key and HOME, and a config for clients."""

from __future__ import annotations

import contextlib
import getpass
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.ring_processes import free_ports

LIMIT_S = 10.0


def find_sshd() -> str:
    """The server's path; skips the test where it is not installed."""
    found = shutil.which("sshd") or shutil.which("/usr/sbin/sshd")
    for tool in ("ssh", "ssh-keygen"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    if found is None:
        pytest.skip("sshd is not installed")
    Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # where it separates privileges when root starts it
    return found


def make_key(path: Path) -> Path:
    """A new pair of keys without a passphrase."""
    command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", path.name, "-f", str(path)]
    subprocess.run(command, check=True)
    return path


def server_config(
    folder: Path, home: Path, *, address: str, port: int, path: str, more: Sequence[str] = ()
) -> Path:
    """The file for `sshd -f`; its host key is folder/host_key, and folder/user_key may come in."""
    lines = [
        f"ListenAddress {address}",
        f"Port {port}",
        f"HostKey {folder / 'host_key'}",
        f"AuthorizedKeysFile {folder / 'user_key.pub'}",
        f"PidFile {folder / 'sshd.pid'}",
        f'SetEnv HOME="{home}" PATH="{path}"',
        *("PasswordAuthentication no", "KbdInteractiveAuthentication no", "UsePAM no"),
        *("StrictModes no", "PermitRootLogin yes", "MaxStartups 100", "AllowUsers " + getpass.getuser()),
        *more,
    ]
    path = folder / "sshd_config"
    path.write_text("\n".join(lines) + "\n")
    return path


@dataclass
class SshHost:
    """A running server; `options` make `Ssh("box", options=...)` reach it."""

    folder: Path
    home: Path
    port: int
    server: subprocess.Popen[bytes]

    @property
    def client_config(self) -> Path:
        return self.folder / "ssh_config"

    @property
    def options(self) -> tuple[str, ...]:
        return ("-F", str(self.client_config))

    @property
    def known_hosts(self) -> Path:
        return self.folder / "known_hosts"

    def write_client_config(self, *more: str) -> None:
        lines = [
            *("Host box", *more, "HostName 127.0.0.1", f"Port {self.port}", f"User {getpass.getuser()}"),
            *(f"IdentityFile {self.folder / 'user_key'}", "IdentitiesOnly yes", "IdentityAgent none"),
            *(f"UserKnownHostsFile {self.known_hosts}", "GlobalKnownHostsFile /dev/null"),
        ]
        self.client_config.write_text("\n".join(lines) + "\n")

    def know(self) -> None:
        """Writes the server's key into known_hosts, as its owner's first visit does."""
        kind, key, *_ = (self.folder / "host_key.pub").read_text().split()
        self.known_hosts.write_text(f"[127.0.0.1]:{self.port} {kind} {key}\n")

    def log(self) -> str:
        return (self.folder / "sshd.log").read_text()


@contextlib.contextmanager
def ssh_host(folder: Path, *more: str, path: str = "/usr/bin:/bin") -> Iterator[SshHost]:
    """A server on a free port of 127.0.0.1; `more` lines come into its config, `path` is PATH there."""
    sshd = find_sshd()
    home = folder / "home"
    home.mkdir()
    for name in ("host_key", "user_key"):
        make_key(folder / name)
    (port,) = free_ports(1)
    config = server_config(folder, home, address="127.0.0.1", port=port, path=path, more=more)
    with (folder / "sshd.log").open("wb") as log:
        server = subprocess.Popen([sshd, "-D", "-e", "-f", str(config)], stderr=log)
    host = SshHost(folder, home, port, server)
    host.write_client_config()
    host.know()
    try:
        wait_greeting("127.0.0.1", port)
        yield host
    finally:
        server.terminate()
        server.wait(LIMIT_S)


def wait_greeting(address: str, port: int) -> None:
    """Until something there greets as ssh servers do."""
    deadline = time.monotonic() + LIMIT_S
    while True:
        try:
            with socket.create_connection((address, port), timeout=LIMIT_S) as connection:
                assert connection.recv(8).startswith(b"SSH-")
                return
        except OSError:
            assert time.monotonic() < deadline, f"no sshd at {address}:{port}"
            threading.Event().wait(0.02)
