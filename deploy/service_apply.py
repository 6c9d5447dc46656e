"""Writes a service's files and runs the system's commands, below another root if so asked. One thread."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import EXIT_ERROR, UserError
from deploy.units import Account, Command, Folder, Found, Installation, Manager, Removal, State, UnitFile
from shard_loader.whole_file import write_whole

COMMAND_TIMEOUT_S = 60.0
RETRY_S = 0.5


@dataclass(frozen=True, slots=True)
class Target:
    """Where files go. With a root nothing is run: it is a folder, or another machine's disk."""

    root: Path | None = None

    def path(self, path: Path) -> Path:
        """Where a file of the system is here."""
        return path if self.root is None else self.root / path.relative_to("/")


def install(plan: Installation, target: Target, *, is_started: bool = True) -> list[Path]:
    """Do what the plan says; the files that were written, changed or not. Raises UserError."""
    for folder in plan.folders:
        _make(folder, target)
    for file in plan.files:
        _write(file, target)
    if is_started and target.root is None:
        for command in plan.start:
            run(command)
    return [target.path(file.path) for file in plan.files]


def remove(plan: Removal, target: Target) -> list[Path]:
    """Stop it and take its files away; those that were there. Raises UserError."""
    is_live = target.root is None
    for command in plan.stop if is_live else ():
        run(command)
    gone = []
    for path in map(target.path, plan.files):
        try:
            path.unlink()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise UserError(f"{path} cannot be removed: {error.strerror}", EXIT_ERROR) from None
        gone.append(path)
    for command in plan.after if is_live else ():
        run(command)
    return gone


def installed(manager: Manager, target: Target) -> list[Found]:
    """The services of ours, by name."""
    found = []
    for path in target.path(manager.FOLDER).glob(manager.PATTERN):
        try:
            one = manager.read_installed(path, path.read_bytes())
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}", EXIT_ERROR) from None
        if one is not None:
            found.append(one)
    return sorted(found, key=lambda one: one.name)


def state(manager: Manager, name: str) -> State:
    """What the system says of a service now."""
    code, out, _ = _output(manager.state_command(name))
    return manager.read_state(name, code, out)


def run(command: Command) -> None:
    """Raises UserError with the command and its own words."""
    deadline = time.monotonic() + command.retry_s
    while True:
        code, out, err = _output(command.words)
        if code == 0 or command.may_fail:
            return
        if time.monotonic() > deadline:
            said = (err.strip() or out.strip()).splitlines()[-1:] or ["it says nothing"]
            raise UserError(f"'{' '.join(command.words)}' ended with exit code {code}: {said[0]}", EXIT_ERROR)
        time.sleep(RETRY_S)


def _output(words: Sequence[str]) -> tuple[int, str, str]:
    try:
        done = subprocess.run(
            words,
            capture_output=True,
            stdin=subprocess.DEVNULL,
            text=True,
            errors="replace",
            timeout=COMMAND_TIMEOUT_S,
            env=os.environ | {"LC_ALL": "C"},
            check=False,
        )
    except FileNotFoundError:
        raise UserError(f"there is no {words[0]} on this machine", EXIT_ERROR) from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"'{' '.join(words)}' cannot be run: {error}", EXIT_ERROR) from None
    return done.returncode, done.stdout, done.stderr


def _make(folder: Folder, target: Target) -> None:
    path = target.path(folder.path)
    missing = [level for level in (path, *path.parents) if not level.exists()]
    try:
        for level in reversed(missing):
            level.mkdir(folder.mode)
            _give(level, folder.account)
    except OSError as error:
        raise UserError(f"the folder {path} cannot be made: {error.strerror}", EXIT_ERROR) from None


def _write(file: UnitFile, target: Target) -> None:
    path = target.path(file.path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not (file.is_kept and path.exists()):
            write_whole(path, file.content.encode(), file.mode)
        path.chmod(file.mode)  # whatever the umask took
        _give(path, file.account)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}", EXIT_ERROR) from None


def _give(path: Path, account: Account | None) -> None:
    """To its user, where we may give things away; what root makes is root's anyway."""
    if account is not None and os.geteuid() == 0:
        os.chown(path, account.uid, account.gid, follow_symlinks=False)
