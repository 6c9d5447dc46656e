"""Why macrame cannot be installed on another machine, in one sentence. Pure; any thread."""

from __future__ import annotations

import re
from pathlib import Path

from deploy.ssh_trouble import is_full, last_line

NEEDED_GB = 1.0  # mlx and the rest, and what pip needs to unpack them
FULL_KB = 20_000
_NO_NETWORK = re.compile(
    r"NewConnectionError|name resolution|Failed to establish a new connection|Network is unreachable"
    r"|dns error|Could not connect|Failed to fetch|ConnectTimeoutError|Connection refused|tcp connect error"
)
_MISSING = re.compile(
    r"No matching distribution found for ([^\s;]+)|Because ([\w.-]+)(?:\[\S+\])? was not found"
    r"|there (?:is|are) no versions? of ([\w.-]+)"
)


def why_not_usable(destination: str, root: str, err: str) -> str:
    """The sentence for a home folder that cannot be used; err: standard error of the script."""
    if is_full(err):
        return f"the disk of {destination} is full: {root} cannot be made there; make room"
    return (
        f"{root} cannot be written on {destination} ({last_line(err)}): give its user a home folder there "
        "that they may write"
    )


def why_not_installed(destination: str, system: str, err: str, free_kb: str, find_links: Path | None) -> str:
    """The sentence for an installation that failed; free_kb: what df says of the home's disk, or empty."""
    free = int(free_kb) if free_kb.isdecimal() else None
    if is_full(err) or (free is not None and free < FULL_KB):  # not every tool below pip says why it failed
        left = "" if free is None else f", and {free / 1e6:.1f} GB were left"
        return (
            f"the disk of {destination} is full: macrame and what it needs take about {NEEDED_GB} GB "
            f"there{left}; make room"
        )
    missing = _MISSING.search(err)
    if find_links is not None and missing:
        name = next(group for group in missing.groups() if group)
        return (
            f"the wheels in {find_links} lack {name} for the Python of {destination} ({system}): fetch all "
            "with 'pip download' on a machine of that kind"
        )
    if _NO_NETWORK.search(err):
        return (
            f"{destination} cannot reach the package index ({_telling(err)}): connect it, or carry the "
            "wheels along with --find-links FOLDER"
        )
    return f"macrame could not be installed on {destination}: {_telling(err)}"


def _telling(err: str) -> str:
    """The line of an installer's output that says most: its first ERROR, else its last line."""
    lines = [line.strip() for line in err.splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith(("error", "× ", "fatal"))]
    return (errors[0] if errors else last_line(err))[:300] or "it gave no reason"
