"""Compiles what translate.py writes, once for each text and compiler, into the user's cache folder."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

HERE = Path(__file__).resolve().parent
SOURCES = (
    "numbers.h",
    "vectors.h",
    "fibers.h",
    "dispatch.h",
    "library.h",
    "matrix.h",
    "msl.h",
    "watch.h",
    "watch.cpp",
)
_ERROR = re.compile(r"\berror\b|undefined reference", re.IGNORECASE)
Mode = Literal["plain", "watched", "address", "thread"]
_FLAGS = (
    "-std=c++17",
    "-O2",
    "-fPIC",
    "-fno-threadsafe-statics",
    "-Wno-attributes",
    "-Wno-unknown-attributes",
    "-Wframe-larger-than=65536",
    "-ffp-contract=off",
    "-fvisibility=hidden",
)
_MODE_FLAGS: dict[Mode, tuple[str, ...]] = {
    "plain": (),
    "watched": ("-fsanitize=thread", "-g1"),  # its calls, answered by watch.cpp
    "address": ("-fsanitize=address", "-g1"),
    "thread": ("-fsanitize=thread", "-g1", "-DMSL_TSAN"),
}
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


def working_compiler() -> str:
    """As `compiler`. Raises EmulatorError where there is none, or one that does not even tell its version."""
    path = compiler()
    if path is None:
        raise EmulatorError("the emulator needs a C++ compiler: install g++ or clang++, or set CXX")
    _version(path)
    return path


@functools.cache
def _version(path: str) -> str:
    return _called([path, "--version"], f"the C++ compiler {path} does not work, set CXX to another").stdout


@functools.cache
def flags(path: str) -> tuple[str, ...]:
    """How to compile here. Every operation in half rounds to half, and nothing is contracted to an fma."""
    found = list(_FLAGS)
    is_clang, is_x86 = "clang" in _version(path), platform.machine() in {"x86_64", "amd64"}
    if not is_clang:
        found.append("-fno-gnu-unique")
    if is_x86 or not is_clang:  # elsewhere clang knows no other, and refuses to be told
        found.append("-fexcess-precision=16")
    if is_x86 and sys.platform == "linux":
        cpu = set(
            Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\nflags")[2].split("\n")[0].split()
        )
        if cpu >= _NEW_ENOUGH:
            found.append("-march=x86-64-v3")
    return tuple(found)


@functools.cache
def _sources() -> str:
    return "".join((HERE / name).read_text(encoding="utf-8") for name in SOURCES)


def cache_folder() -> Path:
    """In the folder of shard_loader.cache_home, which may not be asked from here, and cannot ask here: what
    needs it must start where another package is called kernels.
    """
    given = os.environ.get("XDG_CACHE_HOME")
    home = Path.home()
    base = (
        Path(given) if given else home / "Library" / "Caches" if sys.platform == "darwin" else home / ".cache"
    )
    return base / "macrame" / "emulated"


def library(text: str, mode: Mode = "plain") -> Path:
    """The shared library of a C++ text. Raises EmulatorError without a compiler, and with its first error
    where the text does not compile; its other words are in the traceback."""
    path = working_compiler()
    options = flags(path)
    key = _key(text, _sources(), _version(path), mode, *options)
    made = cache_folder() / f"{key}.so"
    return _once(made, lambda unfinished: _compile([path, *options], text, mode, unfinished))


def _key(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def _once(made: Path, make: Callable[[Path], None]) -> Path:
    """The file, made now if it is not there; the nodes of a ring on one machine may want it at once."""
    if not made.exists():
        made.parent.mkdir(parents=True, exist_ok=True)
        with made.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not made.exists():
                unfinished = made.with_suffix(".unfinished")
                make(unfinished)
                unfinished.replace(made)
    return made


def _compile(start: list[str], text: str, mode: Mode, made: Path) -> None:
    source, kernel = made.with_suffix(".cpp"), made.with_suffix(".o")
    source.write_text(text, encoding="utf-8")
    compile_ = [*start, "-I", str(HERE), "-c"]
    _run([*compile_, *_MODE_FLAGS[mode], str(source), "-o", str(kernel)])
    objects, link = [str(kernel)], _MODE_FLAGS[mode]
    if mode == "watched":
        watch = cache_folder() / f"watch-{_key(_sources(), *start, _version(start[0]))}.o"
        _once(watch, lambda unfinished: _run([*compile_, str(HERE / "watch.cpp"), "-o", str(unfinished)]))
        objects, link = [*objects, str(watch)], ()
    _run([*start, "-shared", *link, *objects, "-o", str(made)])
    kernel.unlink()


def _run(command: list[str]) -> None:
    done = _called(command, f"the kernel does not compile with {command[0]}")
    if "frame-larger-than" in done.stderr:
        raise EmulatorError("A thread's own arrays take more than 64 KiB, which no GPU holds in registers.")


def _called(command: list[str], trouble: str) -> subprocess.CompletedProcess[str]:
    """Raises EmulatorError, `trouble` and the first error that the compiler tells, or else its code."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise EmulatorError(f"{trouble}: {error.strerror}") from None
    if done.returncode == 0:
        return done
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    told = next((line for line in lines if _ERROR.search(line)), (*lines, None)[0])
    failure = EmulatorError(f"{trouble}: {told or f'it ended with code {done.returncode}'}")
    failure.add_note(done.stderr.strip())
    raise failure
