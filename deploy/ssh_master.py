"""The one authenticated connection to a host: the system's `ssh` as a control master, held open by us.

The user's config, agent, keys and known hosts decide, as when they type `ssh HOST`.
Any thread, one at a time.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from cluster.errors import EXIT_ERROR, EXIT_UNREACHABLE, EXIT_USAGE, UserError
from deploy.ssh_trouble import last_line, why_not_connected

ANSWER_LIMIT_S = 10  # for a host to answer; the user's ConnectTimeout goes before it
CONNECT_LIMIT_S = 40.0  # for all of a connection that nobody types a password for
LINGER_S = 60  # how long the connection outlives a process of ours that was killed
SHORT_S = 5.0
# Where Homebrew, uv, pip and pyenv put programs: a shell without a terminal does not read the profile that
# adds them.
MORE_PATH = (
    "/opt/homebrew/bin:/usr/local/bin:$HOME/.local/bin:$HOME/.cargo/bin:$HOME/.pyenv/shims:/usr/sbin:/sbin"
)
# A client of the connection needs nothing of the user's config; without the connection it must fail at once
# instead of making one of its own.
_CLIENT = ("ssh", "-F", "/dev/null", "-o", "ProxyCommand=false", "-o", "BatchMode=yes")
_QUIET = ("-o", "LogLevel=ERROR")


class Master:
    """See deploy.ssh.Ssh, whose connection it is."""

    def __init__(self, destination: str, options: Sequence[str]) -> None:
        self.destination = destination
        self.mark = f"macrame-{secrets.token_hex(6)}"  # what our scripts print first, on both outputs
        self._options = tuple(options)
        self._folder: str | None = None
        self._keeper: subprocess.Popen[bytes] | None = None

    @property
    def is_connected(self) -> bool:
        return self._keeper is not None and self._keeper.poll() is None

    @property
    def was_connected(self) -> bool:
        return self._keeper is not None

    def connect(self, *, may_ask: bool) -> None:
        """Does nothing where it stands. Raises UserError (exit code 4): one sentence of what is wrong."""
        if self.is_connected:
            return
        self.close()
        options = self._own_options(may_ask)
        # Its path is short enough for a socket's name, and the folder is this user's alone.
        self._folder = tempfile.mkdtemp(prefix="macrame-ssh-", dir="/tmp")
        atexit.register(self.close)  # for a caller that ends without
        master = ["-o", "ControlMaster=yes", "-o", f"ControlPersist={LINGER_S}", "-S", self._socket]
        try:
            self._authenticate([*master, *options], may_ask=may_ask)
            # The connection lives for as long as we hold this, and LINGER_S more.
            self._keeper, head = self.begin("cat >/dev/null", subprocess.DEVNULL, subprocess.DEVNULL)
            feed(self._keeper, head)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Ends the connection and everything that runs through it."""
        atexit.unregister(self.close)
        if self._folder is not None:
            if Path(self._socket).exists():
                self.ask("exit")
            shutil.rmtree(self._folder, ignore_errors=True)
        if self._keeper is not None:
            end(self._keeper)
        self._keeper = self._folder = None

    def is_alive(self) -> bool:
        """Whether the connection itself stands: asked, not remembered."""
        return self._folder is not None and self.ask("check").returncode == 0

    def ask(self, request: str, *arguments: str) -> subprocess.CompletedProcess[bytes]:
        """A word to the master: check, exit, forward."""
        command = [*_CLIENT, *_QUIET, "-S", self._socket, "-O", request, *arguments, "--", self.destination]
        try:
            return subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                check=False,
                timeout=SHORT_S,
                start_new_session=True,
            )
        except subprocess.TimeoutExpired:
            return subprocess.CompletedProcess(command, 255, b"", b"ssh does not answer")

    def begin(self, script: str, out: int, err: int) -> tuple[subprocess.Popen[bytes], bytes]:
        """Starts a shell there, and what its input must begin with for it to run `script`.

        In a session of its own, for Ctrl-C is ours: the host must stay within reach to stop things there.
        """
        line, head = self._wrapped(script)
        command = [*_CLIENT, *_QUIET, "-T", "-S", self._socket, "--", self.destination, line]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=out, stderr=err, start_new_session=True
        )
        return process, head

    # -- making it ----------------------------------------------------------------------------------------
    @property
    def _socket(self) -> str:
        assert self._folder is not None
        return f"{self._folder}/c"

    def _own_options(self, may_ask: bool) -> list[str]:
        """What we insist on; the rest is the user's. Raises UserError for a config that ssh does not take."""
        wanted = ["RemoteCommand=none", "RequestTTY=no", "ClearAllForwardings=yes", "ForwardAgent=no"]
        wanted += ["ForwardX11=no", "PermitLocalCommand=no", "LogLevel=ERROR"]
        wanted += ["ServerAliveInterval=5", "ServerAliveCountMax=4"]
        wanted.append(f"BatchMode={'no' if may_ask else 'yes'}")
        settings = self._settings()
        if settings.get("connecttimeout", "none") in ("none", "0"):
            wanted.append(f"ConnectTimeout={ANSWER_LIMIT_S}")
        if settings.get("stricthostkeychecking") in ("no", "off", "false"):
            wanted.append("StrictHostKeyChecking=accept-new")  # new ones, as the user says; no changed ones
        return [word for option in wanted for word in ("-o", option)]

    def _settings(self) -> dict[str, str]:
        """ssh's settings for this host after all config files, by lower-case name."""
        if shutil.which("ssh") is None:
            raise UserError("there is no ssh here: install the OpenSSH client", EXIT_ERROR)
        done = subprocess.run(
            ["ssh", "-G", *self._options, "--", self.destination],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
        )
        if done.returncode != 0:
            raise UserError(
                f"ssh does not take its settings for {self.destination}: {last_line(text(done.stderr))}",
                EXIT_USAGE,
            )
        pairs = (line.partition(" ") for line in text(done.stdout).splitlines())
        return {key: value for key, _, value in pairs}

    def _authenticate(self, options: list[str], *, may_ask: bool) -> None:
        """Runs a script that does nothing; the connection stays in the background, out of Ctrl-C's reach."""
        line, head = self._wrapped(":")
        command = ["ssh", "-T", *options, *self._options, "--", self.destination, line]
        # Files, not pipes: an older ssh keeps standard error open for as long as the connection lives.
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=out, stderr=err, start_new_session=not may_ask
            )
            feed(process, head)
            code = _wait(process, err, None if may_ask else CONNECT_LIMIT_S)
            if code is None:
                raise UserError(
                    f"{self.destination} did not let us in within {CONNECT_LIMIT_S:.0f} s: try "
                    f"'ssh {self.destination}' in a terminal",
                    EXIT_UNREACHABLE,
                )
            if self.mark not in _read(out):
                raise UserError(self._why_no_shell(code, _read(err)), EXIT_UNREACHABLE)

    def _why_no_shell(self, code: int, err: str) -> str:
        if code == 255:
            return why_not_connected(self.destination, err)
        return (
            f"{self.destination} lets us in but runs no command ({last_line(err) or f'exit code {code}'}): "
            "the account there needs a login shell"
        )

    def _wrapped(self, script: str) -> tuple[str, bytes]:
        """A command line that means the same to every shell, and what `sh` then reads first from its input.

        dd reads byte by byte, so what follows the script stays for the script's own commands.
        """
        prelude = f"""echo {self.mark}; echo {self.mark} >&2
PATH="$PATH:{MORE_PATH}"; LC_ALL=C; export PATH LC_ALL
cd
"""
        head = (prelude + script).encode()
        return f"""sh -c 'eval "$(dd bs=1 count={len(head)} 2>/dev/null)"'""", head


def end(process: subprocess.Popen[bytes]) -> None:
    """Ends a process of ours that has nothing more to do, if it has not ended by itself."""
    if process.poll() is None:
        process.terminate()
    try:
        process.wait(SHORT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


def feed(process: subprocess.Popen[bytes], content: bytes) -> None:
    """Writes to its standard input, which stays open; a process that ended is found out by its exit code."""
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(content)
        process.stdin.flush()


def text(raw: bytes) -> str:
    """Of what ssh wrote, whose lines may end as a terminal's do."""
    return raw.decode("utf-8", "replace").replace("\r\n", "\n")


def _wait(process: subprocess.Popen[bytes], err: IO[bytes], limit_s: float | None) -> int | None:
    """The exit code, or None after `limit_s`; without a limit standard error is passed on meanwhile."""
    try:
        if limit_s is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(limit_s)
            return None
        shown = 0
        while (code := process.poll()) is None:
            told = _read(err)
            print(told[shown:], end="", file=sys.stderr, flush=True)  # such as: touch your security key
            shown = len(told)
            time.sleep(0.1)
        return code
    finally:
        end(process)


def _read(file: IO[bytes]) -> str:
    # pread: the child writes through the same open file, whose place must stay at its end
    return text(os.pread(file.fileno(), 1 << 20, 0))
