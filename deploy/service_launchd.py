"""A node as a LaunchDaemon of macOS: its plist, the rotation of its output, and launchctl's commands. Pure.

launchd.plist(5), launchctl(1) and newsyslog.conf(5) of macOS. A daemon with UserName and no agent: macOS
hides the local network from agents until somebody allows it in a window, and agents end with the login.
"""

from __future__ import annotations

import plistlib
import re
from pathlib import Path
from typing import Any
from xml.parsers.expat import ExpatError

from cluster.run_node import UNDER_LAUNCHD
from deploy.units import (
    MAX_OPEN_FILES,
    RESTART_S,
    STOP_S,
    WIRED_LIMIT,
    Command,
    Folder,
    Found,
    Installation,
    NodeService,
    Removal,
    State,
    UnitFile,
)

FOLDER = Path("/Library/LaunchDaemons")
LOGS = Path("/Library/Logs/macrame")
ROTATION = Path("/etc/newsyslog.d")
PREFIX = "org.macrame."
PATTERN = f"{PREFIX}*.plist"
LAUNCHCTL = "/bin/launchctl"
THROTTLE_S = 10  # launchd's own default, and its least
BOOTSTRAP_S = 10.0  # bootout returns before the old job is gone, and bootstrap fails until then
OUTPUT_KB, NUM_OUTPUTS = 1024, 3
_WIRED_TEXT = """\
The most memory that the GPU may hold on to, in MiB, set once at each start of the Mac: macOS forgets the
value at every restart, and has no file for it. More than macOS gives by itself leaves less to everything
else; where too little is left, the Mac stutters or restarts. Installed only by
"macrame service install wired-limit"; it does nothing but the one command in it.
Removed by "sudo macrame service remove wired-limit"; "sudo sysctl iogpu.wired_limit_mb=0" gives macOS its own
limit back at once."""


def label(name: str) -> str:
    """launchd's name of a service."""
    return PREFIX + name


def why_not_here() -> str | None:
    """None where launchd runs this machine, else why it does not. Reads the file system."""
    return None if Path(LAUNCHCTL).exists() else f"there is no {LAUNCHCTL}"


def node_plist(service: NodeService) -> dict[str, Any]:
    """The keys of the daemon. The plist can be read by everybody: no secret may be in the environment."""
    output = str(_output(service.name))
    return {
        "Label": label(service.name),
        "UserName": service.account.name,
        "ProgramArguments": [*service.command, UNDER_LAUNCHD, *_log_arguments(service)],
        "EnvironmentVariables": service.full_environment,
        "WorkingDirectory": str(service.account.home),
        "RunAtLoad": True,
        # after any exit code but 0, and after a signal: see run_node --under-launchd
        "KeepAlive": {"SuccessfulExit": False},
        "ThrottleInterval": max(THROTTLE_S, RESTART_S),
        "ExitTimeOut": STOP_S,
        # without it launchd holds back CPU and disk of what it starts
        "ProcessType": "Interactive",
        "SoftResourceLimits": {"NumberOfFiles": MAX_OPEN_FILES, "Core": 0},
        "HardResourceLimits": {"NumberOfFiles": MAX_OPEN_FILES, "Core": 0},
        "Umask": 0o077,
        "StandardOutPath": output,
        "StandardErrorPath": output,
    }


def node_installation(service: NodeService) -> Installation:
    """The plist, a file for the output that the user may write, and its rotation."""
    account, output = service.account, _output(service.name)
    return Installation(
        folders=(Folder(LOGS), Folder(_own_logs(service.name), account, 0o700)),
        files=(
            UnitFile(output, "", 0o640, account, is_kept=True),
            UnitFile(ROTATION / f"{label(service.name)}.conf", _rotation(service)),
            UnitFile(plist_path(service.name), plistlib.dumps(node_plist(service), sort_keys=False).decode()),
        ),
        start=_start(service.name),
        notes=(f"Its states and warnings: tail -f {output}", f"Its whole log: {_own_logs(service.name)}"),
    )


def wired_limit_installation(limit_mb: int) -> Installation:
    """A daemon that runs one command at each start of the Mac, as root, and explains itself."""
    keys = {
        "Label": label(WIRED_LIMIT),
        "ProgramArguments": ["/usr/sbin/sysctl", f"iogpu.wired_limit_mb={limit_mb}"],
        "RunAtLoad": True,
        "LaunchOnlyOnce": True,
    }
    plain = plistlib.dumps(keys, sort_keys=False).decode()
    explained = plain.replace("<dict>", f"<!--\n{_WIRED_TEXT}\n-->\n<dict>", 1)
    return Installation(
        folders=(),
        files=(UnitFile(plist_path(WIRED_LIMIT), explained),),
        start=_start(WIRED_LIMIT),
        notes=(_WIRED_TEXT,),
    )


def removal(name: str) -> Removal:
    """Stop it, and take away its files; what it printed stays."""
    stop = Command((LAUNCHCTL, "bootout", f"system/{label(name)}"), may_fail=True)
    files = [plist_path(name)]
    if name != WIRED_LIMIT:
        files.append(ROTATION / f"{label(name)}.conf")
    return Removal((stop,), tuple(files))


def plist_path(name: str) -> Path:
    """Where the daemon's plist belongs."""
    return FOLDER / f"{label(name)}.plist"


def read_installed(path: Path, content: bytes) -> Found | None:
    """What a plist of ours says of itself; None where it is not ours."""
    try:
        keys = plistlib.loads(content)
        arguments = list(map(str, keys["ProgramArguments"]))
        name = str(keys["Label"]).removeprefix(PREFIX)
        if name == WIRED_LIMIT:
            return Found(name, path)
        rank, config = (arguments[arguments.index(key) + 1] for key in ("--rank", "--config"))
        return Found(name, path, int(rank), config, keys.get("UserName"))
    except (plistlib.InvalidFileException, ExpatError, ValueError, LookupError, TypeError):
        return None


def state_command(name: str) -> tuple[str, ...]:
    """Prints what launchd knows of a service; needs no root."""
    return (LAUNCHCTL, "print", f"system/{label(name)}")


def read_state(name: str, code: int, text: str) -> State:
    """From launchctl's output, which Apple keeps for people: what is not found there is None."""
    if code != 0:
        return State("not loaded", is_well=False)

    def value(key: str) -> str | None:
        match = re.search(rf"^\t{key} = (.+)$", text, re.MULTILINE)
        return match[1].strip() if match else None

    def number(key: str) -> int | None:
        match = re.match(r"-?\d+", value(key) or "")
        return int(match[0]) if match else None

    word, last_exit = value("state") or "unknown", number("last exit code")
    is_done = name == WIRED_LIMIT and last_exit == 0
    is_refused = not is_done and word != "running" and last_exit == 0  # see run_node --under-launchd
    return State(
        "done" if is_done else "refused, see its log" if is_refused else word,
        is_well=is_done or word == "running",
        pid=number("pid"),
        last_exit=last_exit,
        num_starts=number("runs"),
    )


def _start(name: str) -> tuple[Command, ...]:
    domain = f"system/{label(name)}"
    return (
        Command((LAUNCHCTL, "bootout", domain), may_fail=True),  # one of an earlier install
        Command((LAUNCHCTL, "enable", domain)),
        Command((LAUNCHCTL, "bootstrap", "system", str(plist_path(name))), retry_s=BOOTSTRAP_S),
    )


def _own_logs(name: str) -> Path:
    """A folder of the user: run_node rotates its log itself, for which it renames files."""
    return LOGS / name


def _log_arguments(service: NodeService) -> tuple[str, ...]:
    """None where the user has named a log file."""
    if any(word.partition("=")[0] == "--log-file" for word in service.arguments):
        return ()
    return ("--log-file", str(_own_logs(service.name) / "node.log"))


def _output(name: str) -> Path:
    return LOGS / f"{name}.out.log"


def _rotation(service: NodeService) -> str:
    """A line of newsyslog.conf(5). A running node keeps its file, so that none is compressed under it."""
    return (
        f"# What run_node of {label(service.name)} prints, moved aside when it is large. B: no line of\n"
        "# newsyslog's own goes into it. N: no process is signalled.\n"
        "# logfilename  owner:group  mode  count  size(KB)  when  flags\n"
        f"{_output(service.name)}  {service.account.name}:staff  640  {NUM_OUTPUTS}  {OUTPUT_KB}  *  BN\n"
    )
