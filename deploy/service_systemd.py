"""A node as a unit of systemd: its text and systemctl's commands. Pure.

systemd.unit(5), systemd.service(5), systemd.exec(5); nothing newer than systemd 245. The journal takes what
the node prints, and rotates it (journald.conf(5), SystemMaxUse).
"""

from __future__ import annotations

import re
from pathlib import Path

from cluster.errors import EXIT_DOES_NOT_FIT, EXIT_USAGE
from deploy.units import (
    MAX_OPEN_FILES,
    RESTART_S,
    STOP_S,
    Command,
    Folder,
    Found,
    Installation,
    NodeService,
    Removal,
    State,
    UnitFile,
)

FOLDER = Path("/etc/systemd/system")
PREFIX = "macrame-"
PATTERN = f"{PREFIX}*.service"
BOOTED = Path("/run/systemd/system")  # sd_booted(3)
# exit codes of run_node that no restart mends: a model that does not fit, a config that cannot be used
FINAL = f"{EXIT_DOES_NOT_FIT} {EXIT_USAGE}"
_KEYS = {"Rank": "X-Macrame-Rank", "Config": "X-Macrame-Config"}

# What no node needs. PrivateDevices and ProtectClock would hide a GPU (systemd issue 18142),
# MemoryDenyWriteExecute forbids MLX and CUDA to compile, RemoveIPC would take the user's own.
_HARDENING = """\
NoNewPrivileges=yes
ProtectSystem=strict
ProtectHome=read-only
PrivateTmp=yes
ProtectProc=invisible
ProtectControlGroups=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
LockPersonality=yes
RestrictAddressFamilies=AF_INET AF_INET6 AF_NETLINK AF_UNIX
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallErrorNumber=EPERM
UMask=0077"""


def unit_name(name: str) -> str:
    """systemd's name of a service."""
    return f"{PREFIX}{name}.service"


def unit_path(name: str) -> Path:
    """Where the unit belongs."""
    return FOLDER / unit_name(name)


def why_not_here() -> str | None:
    """None where systemd runs this machine, else why it does not. Reads the file system."""
    return None if BOOTED.is_dir() else f"systemd does not run this machine (there is no {BOOTED})"


def node_unit(service: NodeService) -> str:
    """The unit's text. It can be read by everybody: no secret may be in the environment."""
    folders = [service.config.parent, *service.writes]
    before = ["network-online.target", *(["nvidia-persistenced.service"] if service.has_gpu else [])]
    capability = "CAP_NET_BIND_SERVICE" if service.binds_privileged_port else ""
    lines = [
        f"# Written by macrame service install. Your own settings: systemctl edit {unit_name(service.name)}",
        "[Unit]",
        f"Description=macrame node of rank {service.rank} in {_plain(str(service.config))}",
        "Wants=network-online.target",
        f"After={' '.join(before)}",
        f"RequiresMountsFor={' '.join(_quoted(str(path)) for path in folders)}",
        "# a node that is started again and again is not given up: the others wait for it",
        "StartLimitIntervalSec=0",
        "",
        "[Service]",
        "Type=exec",
        f"User={service.account.name}",
        f"WorkingDirectory={_plain(str(service.account.home))}",
        *(f"Environment={_quoted(f'{k}={v}')}" for k, v in sorted(service.full_environment.items())),
    ]
    if service.nvidia_modprobe is not None:
        lines += [
            "# makes /dev/nvidia-uvm after a start of the machine, which a process without privileges cannot",
            f"ExecStartPre=+-{service.nvidia_modprobe} -c 0 -u",
        ]
    lines += [
        f"ExecStart={' '.join(_word(word) for word in service.command)}",
        f"SyslogIdentifier={PREFIX}{service.name}",
        "",
        "Restart=always",
        f"RestartSec={RESTART_S}",
        "# what does not fit, or a config that cannot be used, is not tried again: systemctl status says why",
        f"RestartPreventExitStatus={FINAL}",
        "KillMode=mixed",
        f"TimeoutStopSec={STOP_S}",
        f"LimitNOFILE={MAX_OPEN_FILES}",
        "LimitMEMLOCK=infinity",
        "# a core file would hold prompts and keys",
        "LimitCORE=0",
        "TasksMax=4096",
        "",
        _HARDENING,
        f"CapabilityBoundingSet={capability}",
        f"AmbientCapabilities={capability}",
    ]
    if not service.has_gpu:
        lines.append("PrivateDevices=yes")
    if service.writes:
        lines.append(f"ReadWritePaths={' '.join(_quoted(str(path)) for path in service.writes)}")
    lines += ["", "[Install]", "WantedBy=multi-user.target", ""]
    lines += ["# for macrame service status; systemd takes no notice of X-", "[X-Macrame]"]
    lines += [f"X-Macrame-Rank={service.rank}", f"X-Macrame-Config={service.config}", ""]
    return "\n".join(lines)


def node_installation(service: NodeService) -> Installation:
    """The unit, and the folders that it may write to."""
    name = unit_name(service.name)
    return Installation(
        folders=tuple(Folder(path, service.account, 0o700) for path in service.writes),
        files=(UnitFile(unit_path(service.name), node_unit(service)),),
        start=(
            Command(("systemctl", "daemon-reload")),
            Command(("systemctl", "enable", name)),
            Command(("systemctl", "restart", name)),
        ),
        notes=(f"Its log: journalctl -u {name} -f",),
    )


def removal(name: str) -> Removal:
    """Stop it, take away its file, and let systemd forget it."""
    unit = unit_name(name)
    return Removal(
        (Command(("systemctl", "disable", "--now", unit), may_fail=True),),
        (unit_path(name),),
        (
            Command(("systemctl", "daemon-reload")),
            Command(("systemctl", "reset-failed", unit), may_fail=True),
        ),
    )


def read_installed(path: Path, content: bytes) -> Found | None:
    """What a unit of ours says of itself; None where it is not ours."""
    text = content.decode(errors="replace")

    def value(key: str) -> str | None:
        match = re.search(rf"^{key}=(.+)$", text, re.MULTILINE)
        return match[1] if match else None

    rank, config = value(_KEYS["Rank"]), value(_KEYS["Config"])
    if rank is None or not rank.isdecimal() or config is None:
        return None
    name = path.name.removeprefix(PREFIX).removesuffix(".service")
    return Found(name, path, int(rank), config, value("User"))


def state_command(name: str) -> tuple[str, ...]:
    """Prints what systemd knows of a service; needs no root."""
    keys = "LoadState,ActiveState,SubState,MainPID,ExecMainStatus,NRestarts"
    return ("systemctl", "show", unit_name(name), f"--property={keys}")


def read_state(name: str, code: int, text: str) -> State:
    """From `systemctl show`, which prints KEY=VALUE lines (org.freedesktop.systemd1(5))."""
    values = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
    if code != 0 or values.get("LoadState") != "loaded":
        return State("not loaded", is_well=False)

    def number(key: str) -> int | None:
        return int(values[key]) if values.get(key, "").isdecimal() else None

    active, sub = values.get("ActiveState", "unknown"), values.get("SubState", "")
    is_well = (active, sub) == ("active", "running")
    restarts = number("NRestarts")
    return State(
        "running" if is_well else f"{active} ({sub})",
        is_well=is_well,
        pid=number("MainPID") or None,
        last_exit=number("ExecMainStatus"),
        num_starts=None if restarts is None else restarts + 1,
    )


def _plain(text: str) -> str:
    """A value that is taken as it stands: only % means something (SPECIFIERS of systemd.unit(5))."""
    return text.replace("%", "%%")


def _quoted(text: str) -> str:
    """One word of a list, in quotes where it needs them."""
    escaped = _plain(text).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"' if re.search(r"[\s'\";#\\]", text) or not text else escaped


def _word(text: str) -> str:
    """One word of a command, in which $ means something too."""
    return _quoted(text).replace("$", "$$")
