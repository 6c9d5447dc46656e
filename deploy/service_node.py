"""From a command line to a node's service: which rank, which user, and whether it would start. One thread."""

from __future__ import annotations

import os
import pwd
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from cluster.config import ClusterConfig, load_config
from cluster.errors import EXIT_ERROR, EXIT_USAGE, UserError
from cluster.probe import is_this_machine
from deploy.units import PRIVILEGED_PORTS, Account, NodeService

CHECK_S = 60.0
_SECRET = re.compile(r"(TOKEN|SECRET|PASSWORD|KEYS?)$", re.IGNORECASE)
_NVIDIA = Path("/dev/nvidiactl")
_CACHES = ("MACRAME_CACHE", "HF_HOME", "HF_HUB_CACHE")
_FLEETING = ("/tmp", "/var/tmp")
_PRIVATE_ON_MACOS = ("Desktop", "Documents", "Downloads", "Library/Mobile Documents")


def node_service(
    config_path: Path,
    *,
    rank: int | None,
    name: str | None,
    user: str | None,
    environment: Mapping[str, str],
    arguments: Sequence[str],
    is_confined: bool,
) -> NodeService:
    """The service of one node. `is_confined`: it may write only to folders that its unit names.

    Raises UserError for a rank, a user, a name or a variable that cannot be used.
    """
    path = config_path.absolute()
    config = load_config(path, model="any")  # a model on the node's command line is the node's to check
    rank = _rank(config, rank)
    account = account_of(user)
    ports = [config.nodes[rank].port, *([config.api.port] if rank == 0 else [])]
    has_gpu = is_confined and _NVIDIA.exists()
    modprobe = shutil.which("nvidia-modprobe") if has_gpu else None
    try:
        return NodeService(
            name=name or f"node{rank}",
            rank=rank,
            config=path,
            account=account,
            python=Path(sys.executable),
            arguments=tuple(arguments),
            environment=environment,
            writes=_writes(config, account.home, environment) if is_confined else (),
            binds_privileged_port=any(0 < port < PRIVILEGED_PORTS for port in ports),
            has_gpu=has_gpu,
            nvidia_modprobe=Path(modprobe) if modprobe else None,
        )
    except ValueError as error:
        raise UserError(str(error), EXIT_USAGE) from None


def account_of(user: str | None) -> Account:
    """The user named, or who called sudo, or who runs this. Raises UserError; root only by name."""
    given = user or os.environ.get("SUDO_USER")
    try:
        entry = pwd.getpwnam(given) if given else pwd.getpwuid(os.geteuid())
    except KeyError:
        raise UserError(
            f"there is no user {given!r} on this machine: give --user another", EXIT_USAGE
        ) from None
    if entry.pw_uid == 0 and user is None:
        raise UserError("a node needs no root: name the user that it is to run as with --user", EXIT_USAGE)
    return Account(entry.pw_name, Path(entry.pw_dir), entry.pw_uid, entry.pw_gid)


def read_environment(pairs: Sequence[str]) -> dict[str, str]:
    """KEY=VALUE arguments. Raises UserError for another form, and for what looks like a secret."""
    found = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", key):
            raise UserError(f"--env {pair} is not of the form KEY=VALUE", EXIT_USAGE)
        if _SECRET.search(key):
            raise UserError(
                f"--env {key} would lie in a file that every user of this machine can read: put the secret "
                "into a file of mode 600 and name that in the cluster file (security.token_file, "
                "api.keys_file)",
                EXIT_USAGE,
            )
        found[key] = value
    return found


def check_start(service: NodeService) -> None:
    """Whether run_node, as that user and with that environment only, takes the config and its secrets.

    It is asked where we are that user or root. Raises UserError with run_node's own sentence.
    """
    account, is_root = service.account, os.geteuid() == 0
    if not is_root and account.uid != os.geteuid():
        return
    groups = os.getgrouplist(account.name, account.gid)
    try:
        done = subprocess.run(
            [*service.command, "--check"],
            capture_output=True,
            stdin=subprocess.DEVNULL,
            text=True,
            errors="replace",
            env=service.full_environment,
            cwd=account.home,
            timeout=CHECK_S,
            check=False,
            user=account.uid if is_root else None,
            group=account.gid if is_root else None,
            extra_groups=groups if is_root else None,
        )
    except (OSError, subprocess.SubprocessError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UserError(
            f"{account.name} cannot run {service.python} in {account.home}: {reason}; install macrame where "
            "that user may read it",
            EXIT_ERROR,
        ) from None
    if done.returncode != 0:
        said = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise UserError(
            f"as {account.name} and without your shell's environment, which a service does not have, the "
            f"node would not start: {said[0].removeprefix('run_node: ')}",
            done.returncode if done.returncode > 0 else EXIT_ERROR,
        )


def privacy_warning(service: NodeService) -> str | None:
    """On macOS: the folders that a daemon may read only after somebody has allowed it in System Settings."""
    home = service.account.home
    hidden = [home / name for name in _PRIVATE_ON_MACOS] + [Path("/Volumes")]
    for path in (service.config, service.python):
        for folder in hidden:
            if path.is_relative_to(folder):
                return (
                    f"{path} is in {folder}, which macOS keeps from daemons: move it elsewhere in {home}, or "
                    "give Python Full Disk Access in System Settings, Privacy & Security"
                )
    return None


def fleeting_path(service: NodeService) -> str | None:
    """On Linux: a file of the service below /tmp, where its unit has an empty folder of its own."""
    for path in (service.config, service.python):
        for folder in _FLEETING:
            if path.is_relative_to(folder):
                return (
                    f"{path} is in {folder}, which a restart empties and which the service sees as its own, "
                    "empty one: keep it elsewhere"
                )
    return None


def _rank(config: ClusterConfig, rank: int | None) -> int:
    if rank is None:
        here = [node.rank for node in config.nodes if node.use and is_this_machine(node.host)]
        if len(here) != 1:
            told = "several nodes" if here else "no node"
            raise UserError(
                f"{config.path} has {told} with this machine's host: say which with --rank", EXIT_USAGE
            )
        return here[0]
    if not 0 <= rank < len(config.nodes):
        raise UserError(
            f"--rank {rank} is not in {config.path}, which has ranks 0 to {len(config.nodes) - 1}", EXIT_USAGE
        )
    return rank


def _writes(config: ClusterConfig, home: Path, environment: Mapping[str, str]) -> tuple[Path, ...]:
    """Folders for what is fetched, made and measured: caches, all of them."""
    found = [Path(environment.get("XDG_CACHE_HOME", home / ".cache"))]
    found += [Path(environment[key]) for key in _CACHES if key in environment]
    if "HF_HUB_CACHE" in environment:  # our own parts of models lie beside the hub's
        found.append(Path(environment["HF_HUB_CACHE"]).with_name("macrame"))
    if config.load.cache_dir is not None:
        given = config.load.cache_dir  # from where the service works, which is the home
        found.append(home / given.removeprefix("~/"))
    return tuple(dict.fromkeys(found))
