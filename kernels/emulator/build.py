"""Compiles what translate.py writes, once for each text and compiler, into the user's cache folder."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
HEADERS = ("numbers.h", "vectors.h", "fibers.h", "dispatch.h", "library.h", "matrix.h", "msl.h")
_FLAGS = ("-std=c++17", "-O2", "-fPIC", "-shared", "-w", "-ffp-contract=off", "-fvisibility=hidden")
_NEW_ENOUGH = {"avx2", "f16c", "fma", "bmi2"}  # x86-64-v3: half and fma as instructions, not as calls


class EmulatorError(RuntimeError):
    """The emulator cannot run a kernel, or has found what is wrong with it."""


@functools.cache
def compiler() -> str | None:
    """The C++ compiler: what CXX names, else g++, clang++ or c++; None where there is none."""
    for name in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        if name and (found := shutil.which(name)):
            return found
    return None


@functools.cache
def _version(path: str) -> str:
    return subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout


@functools.cache
def flags(path: str) -> tuple[str, ...]:
    """How to compile here. Every operation in half rounds to half, and nothing is contracted to an fma."""
    found = [*_FLAGS, "-fexcess-precision=16"]
    if "clang" not in _version(path):
        found.append("-fno-gnu-unique")
    if platform.machine() == "x86_64" and sys.platform == "linux":
        cpu = set(
            Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\nflags")[2].split("\n")[0].split()
        )
        if cpu >= _NEW_ENOUGH:
            found.append("-march=x86-64-v3")
    return tuple(found)


@functools.cache
def _headers() -> str:
    return "".join((HERE / name).read_text(encoding="utf-8") for name in HEADERS)


def cache_folder() -> Path:
    given = os.environ.get("XDG_CACHE_HOME")
    home = Path.home()
    base = (
        Path(given) if given else home / "Library" / "Caches" if sys.platform == "darwin" else home / ".cache"
    )
    return base / "macrame" / "emulated"


def library(text: str) -> Path:
    """The shared library of a C++ text. Raises EmulatorError without a compiler, and with its words where the
    text does not compile."""
    path = compiler()
    if path is None:
        raise EmulatorError("The emulator needs a C++ compiler: install g++ or clang++, or set CXX.")
    options = flags(path)
    key = hashlib.sha256("\0".join((text, _headers(), _version(path), *options)).encode()).hexdigest()[:24]
    folder = cache_folder()
    made = folder / f"{key}.so"
    if made.exists():
        return made
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{key}.lock").open("w") as lock:  # the nodes of a ring on one machine start together
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            _compile(path, options, text, made)
    return made


def _compile(path: str, options: tuple[str, ...], text: str, made: Path) -> None:
    source = made.with_suffix(".cpp")
    source.write_text(text, encoding="utf-8")
    unfinished = made.with_suffix(".unfinished")
    command = [path, *options, "-I", str(HERE), str(source), "-o", str(unfinished)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise EmulatorError(f"The kernel does not compile:\n{done.stderr.strip()}")
    unfinished.replace(made)
