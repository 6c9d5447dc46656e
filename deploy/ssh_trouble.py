"""From what `ssh` writes when it fails to one sentence that says what to do. Pure; any thread."""

from __future__ import annotations

import re

_SILENT = re.compile(
    r"Connection timed out|Operation timed out|No route to host|Network is unreachable|Host is down"
    r"|Connection to .* timed out|timed out during banner exchange"
)
_OWN_WORDS = re.compile(r"^(ssh|kex_exchange_identification|mux_client\w*|debug\d?): *")
_DECORATION = re.compile(r"^[@\s]*$|^\*\* ")


def why_not_connected(destination: str, err: str) -> str:
    """The sentence for a connection that did not come about; err: standard error of `ssh`."""
    if "REMOTE HOST IDENTIFICATION HAS CHANGED" in err:
        return _changed_key(destination, err)
    if "Host key verification failed" in err:
        return (
            f"the host key of {destination} is not known here: run 'ssh {destination}' in a terminal once, "
            "compare the fingerprint that it shows with the one of that machine, and answer yes"
        )
    if "Could not resolve hostname" in err:
        return (
            f"the name of {destination} is not known here: check its spelling, try 'NAME.local' or its "
            "address, or give it a Host entry in ~/.ssh/config"
        )
    if "Connection refused" in err:
        return (
            f"{destination} answers, but no ssh server listens there: turn on Remote Login (macOS: System "
            "Settings, General, Sharing; Linux: install openssh-server), or name its port in ~/.ssh/config"
        )
    if _SILENT.search(err):
        return (
            f"{destination} does not answer ({last_line(err)}): is it switched on, awake and in this network?"
        )
    if "Too many authentication failures" in err:
        return (
            f"{destination} broke off after too many keys: name the right one for it in ~/.ssh/config "
            "(IdentityFile, with IdentitiesOnly yes)"
        )
    if "Permission denied" in err:
        return (
            f"{destination} does not let us in ({last_line(err)}): copy your key there with 'ssh-copy-id "
            f"{destination}', unlock it with 'ssh-add', or name the right user (user@host)"
        )
    reason = last_line(err)
    told = f" ({reason})" if reason else ""
    return f"no ssh connection to {destination}{told}: 'ssh -v {destination}' shows more"


def why_not_written(destination: str, path: str, num_bytes: int, err: str) -> str:
    """The sentence for a file that could not be written there; err: standard error of the script."""
    if is_full(err):
        return (
            f"the disk of {destination} is full: {path} ({num_bytes / 1e6:.1f} MB) could not be written; "
            "make room there"
        )
    reason = last_line(err) or "it broke off"
    return f"{path} could not be written on {destination}: {reason}"


def is_full(err: str) -> bool:
    """Whether something failed for want of room on a disk."""
    return any(words in err for words in ("No space left on device", "isk quota exceeded", "disk is full"))


def last_line(err: str) -> str:
    """The last line that says something, without the program's name."""
    lines = [line.strip() for line in err.splitlines()]
    said = [line for line in lines if line and not _DECORATION.match(line)]
    return _OWN_WORDS.sub("", said[-1]) if said else ""


def _changed_key(destination: str, err: str) -> str:
    found = re.search(r"Offending (?:\S+ )?key in (.+):(\d+)", err)
    where = f" (line {found[2]} of {found[1]})" if found else ""
    host = re.search(r"Host key for (\S+) has changed", err)
    name = host[1] if host else destination.rpartition("@")[2]
    return (
        f"the host key of {destination} is not the one that is known here{where}: either that machine was "
        "installed anew, or another one answers in its place; compare the fingerprints, and only if it is "
        f"right run: ssh-keygen -R '{name}'"
    )
