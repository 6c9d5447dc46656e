"""Doctor's checks of Python, packages, the environment and MLX. Any thread; `device` may start a process."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, packages_distributions, requires, version
from pathlib import Path

from cluster.diagnosis import Finding, Subject, fine, skipped
from cluster.ours import OWN_PACKAGES, hidden_packages
from cluster.versions import macrame_version

MIN_PYTHON = (3, 11)
DEVICE_LIMIT_S = 120.0  # a cold start of MLX from a slow disk
REINSTALL = "uv tool install --reinstall .    # in macrame's folder; or: .venv/bin/pip install --upgrade ."
OWN_ENVIRONMENT = "python3 -m venv .venv && .venv/bin/pip install .    # in macrame's folder"
_REQUIREMENT = re.compile(r"([A-Za-z0-9_.-]+)(?:\[[\w,]*\])?\s*>=\s*([\d.]+)")
# Sums a few numbers on the default device: what cannot do that cannot run a model.
_DEVICE_SCRIPT = """
import json, mlx.core as mx
total = mx.sum(mx.arange(8)).item()
kind = "metal" if mx.metal.is_available() else "cuda" if mx.cuda.is_available() else "cpu"
print(json.dumps({"total": total, "kind": kind}))
import mlx_lm
"""


def python(subject: Subject) -> Iterable[Finding]:
    """Version and architecture of the interpreter."""
    found = f"{platform.python_version()} ({sys.executable})"
    if sys.version_info < MIN_PYTHON:
        yield Finding(
            "python",
            "error",
            f"Python {found} is older than {'.'.join(map(str, MIN_PYTHON))}",
            "macrame is not written for it, and starts nowhere with it",
            "uv python install 3.12",
        )
    elif subject.is_mac and subject.output(["sysctl", "-n", "sysctl.proc_translated"]) == "1":
        yield Finding(
            "python",
            "error",
            f"Python {found} is built for Intel and runs translated (Rosetta)",
            "MLX's packages for Apple silicon cannot be installed into it, so the GPU is out of reach",
            "uv python install cpython-3.12-macos-aarch64-none    # then make the environment anew with it",
        )
    else:
        yield fine("python", found)


def packages(subject: Subject) -> Iterable[Finding]:
    """That the imported packages are ours, and what they need is there."""
    hidden = hidden_packages()
    for sentence in hidden:
        yield Finding(
            "packages",
            "error",
            sentence.partition("; ")[0],
            "Python imports it instead of macrame's, so nodes and commands end with an import error",
            f"{OWN_ENVIRONMENT}; and unset PYTHONPATH, and start from another folder",
        )
    yield from _claimed(packages_distributions())
    missing, too_old, num_good = [], [], 0
    for name, wanted in _wanted(requires("macrame") or ()):
        try:
            have = version(name)
        except PackageNotFoundError:
            missing.append(f"{name}>={wanted}")
            continue
        if _numbers(have) < _numbers(wanted):
            too_old.append(f"{name} {have} (needs {wanted})")
        else:
            num_good += 1
    for state, names in (("missing", missing), ("too old", too_old)):
        if names:
            yield Finding(
                "packages",
                "error",
                f"{'packages are' if len(names) > 1 else 'a package is'} {state}: {', '.join(names)}",
                "commands or nodes end with an import error, or behave as no test has seen",
                REINSTALL,
            )
    if not (missing or too_old or hidden):
        own = ", ".join(f"{name} {_version(name)}" for name in ("mlx", "mlx-lm"))
        yield fine("packages", f"macrame {macrame_version()}, {own}, and {num_good} needed packages in all")


def _claimed(owners: Mapping[str, list[str]]) -> Iterable[Finding]:
    """Another distribution in this environment that brings a package of our names."""
    for name in OWN_PACKAGES:
        others = sorted(set(owners.get(name, ())) - {"macrame"})
        if others:
            yield Finding(
                "packages",
                "warning",
                f"{', '.join(others)} in this environment has a package named {name!r} too",
                "both lie in one folder: the one installed or updated next overwrites the other's files",
                OWN_ENVIRONMENT,
            )


def _wanted(requirements: Iterable[str]) -> Iterable[tuple[str, str]]:
    """Name and lower bound of what this system needs without extras."""
    for text in requirements:
        requirement, _, marker = text.partition(";")
        match = _REQUIREMENT.match(requirement.strip())
        is_elsewhere = "sys_platform" in marker and f'"{sys.platform}"' not in marker.replace("'", '"')
        if match is not None and "extra" not in marker and not is_elsewhere:
            yield match[1], match[2]


def _numbers(text: str) -> list[int]:
    """The leading numbers of a version: "0.32.4.post1" is [0, 32, 4]."""
    match = re.match(r"\d+(\.\d+)*", text)
    return [int(part) for part in match[0].split(".")] if match else []


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"


def environment(_subject: Subject) -> Iterable[Finding]:
    """Variables that change what nodes do."""
    named = []
    if os.environ.get("MACRAME_FAULT"):
        named.append("MACRAME_FAULT")
        yield Finding(
            "environment",
            "warning",
            f"MACRAME_FAULT={os.environ['MACRAME_FAULT']} is set",
            "it is for tests: nodes started here break or slow down on purpose",
            "unset MACRAME_FAULT",
        )
    if os.environ.get("MLX_DISABLE_COMPILE", "0") not in ("", "0"):
        named.append("MLX_DISABLE_COMPILE")
        yield Finding(
            "environment",
            "warning",
            "MLX_DISABLE_COMPILE is set",
            "MLX then joins no operations, and nodes started here are slower; only exactness tests want that",
            "unset MLX_DISABLE_COMPILE",
        )
    if not named:
        yield fine("environment", "no variable is set that harms a node")


def device(subject: Subject) -> Iterable[Finding]:
    """That MLX computes, and on what."""
    if subject.running is not None:
        from cluster.probe import this_machine

        yield fine("device", f"{this_machine().device}; this node runs on it")
        return
    try:
        done = subprocess.run(
            [sys.executable, "-c", _DEVICE_SCRIPT],
            capture_output=True,
            text=True,
            timeout=DEVICE_LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        yield _broken_mlx(f"MLX has not computed a sum in {DEVICE_LIMIT_S:.0f} s")
        return
    lines = done.stdout.splitlines()
    kind = json.loads(lines[0])["kind"] if lines and lines[0].startswith("{") else ""
    if done.returncode != 0:
        ended = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
        last = done.stderr.strip().rpartition("\n")[2] or ended
        yield _broken_mlx(f"{'mlx-lm' if kind else 'mlx'} cannot be used: {last}")
    elif subject.is_mac and kind != "metal":
        yield Finding(
            "device",
            "error",
            "MLX finds no Metal device on this Mac",
            "models would run on the CPU alone, many times slower",
            "macrame doctor    # in a login of the Mac itself: virtual Macs and Intel Macs have none",
        )
    elif kind == "cpu" and Path("/dev/nvidiactl").exists():
        yield Finding(
            "device",
            "warning",
            "this machine has an NVIDIA GPU, and the installed MLX has no CUDA backend",
            "its node would compute on the CPU",
            "uv tool install --reinstall '.[cuda13]'    # in macrame's folder",
        )
    else:
        yield fine("device", f"MLX computes on {kind}")


def _broken_mlx(what: str) -> Finding:
    return Finding("device", "error", what, "no node can load a model without it", REINSTALL)


def without_packages(subject: Subject) -> list[Finding]:
    """What can be said where packages of ours cannot be imported."""
    found = [*python(subject), *packages(subject), *environment(subject)]
    rest = skipped("everything else", "needs macrame's own packages; mend those first")
    return [*found, rest]
