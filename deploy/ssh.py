"""One host over the system's own `ssh`: scripts, files and ports through one authenticated connection.

Any thread, one at a time.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType

from cluster.errors import EXIT_ERROR, EXIT_UNREACHABLE, EXIT_USAGE, UserError
from deploy.local_ring import free_ports, is_free
from deploy.ssh_master import Master, end, feed, text
from deploy.ssh_trouble import last_line, why_not_written

RUN_LIMIT_S = 60.0
MIN_BYTES_PER_S = 200_000  # a slower transfer counts as stuck
TRIES = 5
_DESTINATION = re.compile(r"(?!-)[^\s\x00-\x1f'\"`$;&|<>(){}\\]+")

# A job, and a watcher that ends it when standard input ends, which is when nobody listens any more.
_WATCHED = """
exec 3<&0
{{
{script}
}} </dev/null 3<&- &
job=$!
{{ cat <&3; kill $job; }} >/dev/null 2>&1 &
exec 3<&-
wait $job
code=$?
kill $! 2>/dev/null
exit $code
"""

_PUT = """
umask 077
folder={folder}
part="$folder"/.{name}.$$
mkdir -p "$folder" || exit 1
trap 'rm -f "$part"' EXIT
trap 'exit 1' HUP INT TERM PIPE
cat >"$part" || exit 1
if [ "$(wc -c <"$part")" -ne {num_bytes} ]; then echo 'it came cut short' >&2; exit 1; fi
chmod {mode:o} "$part" && mv -f "$part" "$folder"/{name}
"""


@dataclass(frozen=True, slots=True)
class Reply:
    """What a script gave: its exit code and what it wrote, undecodable bytes replaced."""

    code: int
    out: str
    err: str


class Ssh:
    """One host. `connect` authenticates once, everything else goes through that connection.

    destination: as `ssh` takes it: user@host, host, a Host of ~/.ssh/config. options: more for `ssh`, such as
    ("-p", "2222"). is_interactive: whether `ssh` may ask on the terminal (None: where stdin is one).
    A lost connection is made again by the next call, if that needs no questions.
    """

    def __init__(
        self, destination: str, *, options: Sequence[str] = (), is_interactive: bool | None = None
    ) -> None:
        if not _DESTINATION.fullmatch(destination):
            raise UserError(
                f"{destination!r} is no host for ssh: write host, user@host or the name of a Host in "
                "~/.ssh/config",
                EXIT_USAGE,
            )
        self.destination = destination
        self._may_ask = sys.stdin.isatty() if is_interactive is None else is_interactive
        self._master = Master(destination, options)
        self._forwarded: set[str] = set()  # what -L was given, of this connection and those before

    def __enter__(self) -> Ssh:
        self.connect()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def is_connected(self) -> bool:
        return self._master.is_connected

    def connect(self) -> None:
        """Does nothing where it stands. Raises UserError (exit code 4): one sentence of what is wrong.

        Changed host keys are refused, also where the user's config says StrictHostKeyChecking no.
        """
        self._master.connect(may_ask=self._may_ask)

    def close(self) -> None:
        """Ends the connection and everything that runs through it."""
        self._master.close()

    def run(self, script: str, *, data: bytes = b"", timeout_s: float = RUN_LIMIT_S) -> Reply:
        """Lets `sh` there run a script in the home folder, with `data` as its standard input.

        The login shell there does not matter, nor what its start files print; messages are in English and
        PATH has MORE_PATH at its end. The script travels on standard input, so no process list shows it.
        Raises UserError (4) for a lost connection and where it does not end in time.
        """
        self._ensure()
        process, head = self._master.begin(script, subprocess.PIPE, subprocess.PIPE)
        try:
            out, err = process.communicate(head + data, timeout=timeout_s)
        except subprocess.TimeoutExpired:
            raise UserError(
                f"{self.destination} did not finish within {timeout_s:g} s: {_first_line(script)}",
                EXIT_UNREACHABLE,
            ) from None
        finally:
            end(process)
        mark = f"{self._master.mark}\n".encode()
        _, ran, out = out.partition(mark)
        noise, _, own = err.partition(mark)
        if not ran or (process.returncode == 255 and not self._master.is_alive()):
            raise UserError(
                f"the connection to {self.destination} was lost ({last_line(text(own or noise))})",
                EXIT_UNREACHABLE,
            )
        return Reply(process.returncode, text(out), text(own))

    def check(self, script: str, *, data: bytes = b"", timeout_s: float = RUN_LIMIT_S) -> str:
        """What the script wrote. Raises UserError, with its last line of errors, unless it ended with 0."""
        reply = self.run(script, data=data, timeout_s=timeout_s)
        if reply.code != 0:
            reason = last_line(reply.err) or f"exit code {reply.code}"
            raise UserError(f"{self.destination}: {reason}", EXIT_ERROR)
        return reply.out

    def put(self, content: bytes, path: str, *, mode: int = 0o644) -> None:
        """Writes a file there as a whole, never with more rights than `mode`; folders are made (mode 700).

        path: absolute, or relative to the home folder, also as ~/... . Raises UserError for a full disk and
        a folder that may not be written; then nothing of the new content is left there.
        """
        folder, slash, name = path.removeprefix("~/").rpartition("/")
        script = _PUT.format(
            folder=shlex.quote(folder or slash or "."),
            name=shlex.quote(name),
            num_bytes=len(content),
            mode=mode,
        )
        limit_s = RUN_LIMIT_S + len(content) / MIN_BYTES_PER_S
        reply = self.run(script, data=content, timeout_s=limit_s)
        if reply.code != 0:
            raise UserError(why_not_written(self.destination, path, len(content), reply.err), EXIT_ERROR)

    def popen(self, script: str) -> subprocess.Popen[bytes]:
        """A script that runs on, such as `exec tail -f FILE`; ending the process here ends its shell there.

        Its standard output is a pipe, standard error goes nowhere (2>&1); closing standard input ends it.
        """
        self._ensure()
        watched = _WATCHED.format(script=script)
        process, head = self._master.begin(watched, subprocess.PIPE, subprocess.DEVNULL)
        feed(process, head)
        assert process.stdout is not None
        mark = f"{self._master.mark}\n".encode()
        while (line := process.stdout.readline()) and not line.endswith(mark):
            pass
        return process

    def forward(self, remote_host: str, remote_port: int, *, local_port: int = 0) -> int:
        """A port of 127.0.0.1 here that leads to remote_host:remote_port as seen from there, while connected.

        local_port: which one, if it is free or leads there already; else any. Raises UserError where ssh
        refuses.
        """
        self._ensure()
        host = f"[{remote_host}]" if ":" in remote_host else remote_host
        err = ""
        # ssh says yes to a forward that it has
        may_be_ours = f"127.0.0.1:{local_port}:{host}:{remote_port}" in self._forwarded
        wanted = [local_port] if local_port and (may_be_ours or is_free("127.0.0.1", local_port)) else []
        # another process may take the port between the question and the answer
        for port in [*wanted, *free_ports("127.0.0.1", TRIES)]:
            forward = f"127.0.0.1:{port}:{host}:{remote_port}"
            done = self._master.ask("forward", "-L", forward)
            if done.returncode == 0:
                self._forwarded.add(forward)
                return port
            err = text(done.stderr)
        raise UserError(
            f"ssh does not forward a port to {remote_host}:{remote_port} over {self.destination}: "
            f"{last_line(err)}",
            EXIT_ERROR,
        )

    def _ensure(self) -> None:
        if not self._master.is_connected:
            self._master.connect(may_ask=self._may_ask and not self._master.was_connected)


def _first_line(script: str) -> str:
    return next((line.strip() for line in script.splitlines() if line.strip()), "")[:80]
