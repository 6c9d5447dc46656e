"""What the self-test found, by form of block or matrix and number of tokens, and the file that keeps it.

A file belongs to a chip, a system, an MLX and the text of all kernels: where any of it is another, the test
is made again. Any thread.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import logging
import os
import platform
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

from kernels.source import wrong_files

logger = logging.getLogger(__name__)

VERSION = 1  # of how it is measured: a higher one makes older files void
MAX_FILE_BYTES = 1 << 20
HERE = Path(__file__).resolve().parent


NOT_YET = "not tested yet: the node does so while nobody asks for anything"


@dataclass(frozen=True, slots=True)
class Form:
    """What the time of a block or matrix hangs on, as the planner knows it from a checkpoint's headers.

    A block of experts has the formats of gate, up and down, in the order of their names, and outputs is the
    width of an expert; a matrix has one format, and num_experts 1 where it is no expert's.
    """

    num_experts: int
    top_k: int
    inputs: int
    outputs: int
    formats: tuple[str, ...]  # as planner.speeds names them


@dataclass(frozen=True, slots=True)
class Timed:
    """us of one call with so many tokens."""

    num_tokens: int
    ours_us: float
    mlx_us: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """For first to last tokens (0: any more). Times of one call, at the size where kernels gain least."""

    first: int
    last: int
    is_taken: bool
    reason: str = ""  # why not
    error: float = 0.0  # the largest difference from the reference, over the largest value of that
    ours_us: float = 0.0  # 0: not timed
    mlx_us: float = 0.0
    gb_s: float = 0.0  # bytes of the weights that were needed, each once, over our time without Python's part
    num_launches: int = 0  # of ours
    is_final: bool = True  # False: there was no time, or an exception came; next time it is tried again
    timed: tuple[Timed, ...] = ()  # all sizes that were

    @property
    def ratio(self) -> float:
        """How many times faster than MLX's operations; 0: not timed."""
        return self.mlx_us / self.ours_us if self.ours_us else 0.0

    @property
    def is_untested(self) -> bool:
        """Whether there was no time for it so far."""
        return self.reason == NOT_YET

    def covers(self, num_tokens: int) -> bool:
        return self.first <= num_tokens and (not self.last or num_tokens <= self.last)


@dataclass(frozen=True, slots=True)
class Machine:
    """What verdicts belong to."""

    chip: str
    system: str
    mlx: str
    kernels: str  # digest of their texts and of the code that launches them
    backend: str
    version: int = VERSION


def this_machine(backend: str) -> Machine:
    """The machine of MLX's default device."""
    chip = "cpu" if backend == "emulated" else _chip()
    system = platform.mac_ver()[0] or platform.release()
    return Machine(chip, f"{platform.system()} {system}", version("mlx"), kernel_digest(), backend)


def _chip() -> str:
    told = mx.device_info()
    return " ".join(str(told.get(key, "")) for key in ("device_name", "architecture", "memory_size")).strip()


def kernel_digest() -> str:
    """Of every file that a kernel's answer or its speed can depend on."""
    return _digest(tuple(wrong_files()))


@functools.cache
def _digest(wrong: tuple[str, ...]) -> str:
    found = hashlib.sha256(" ".join(wrong).encode())
    for path in sorted(HERE.rglob("*")):
        if path.suffix in {".py", ".metal", ".h"}:
            found.update(path.relative_to(HERE).as_posix().encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Kept:
    """Of one block or matrix. form: None where the planner knows none."""

    form: Form | None
    verdicts: tuple[Verdict, ...]


class Verdicts:
    """The file of one machine in `folder`; None: nothing is kept."""

    def __init__(self, folder: Path | None, machine: Machine) -> None:
        text = json.dumps(asdict(machine), sort_keys=True)
        self._machine = machine
        self._path = None
        if folder is not None:
            self._path = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"

    def find(self, block: str) -> tuple[Verdict, ...] | None:
        """Of a block or matrix, by a subject's name; None where it was not tested."""
        found = self._read().get(block)
        return None if found is None else found.verdicts

    def every(self) -> list[Kept]:
        """All that is kept for this machine."""
        return list(self._read().values())

    def keep(self, block: str, verdicts: Sequence[Verdict], form: Form | None = None) -> None:
        """Write them beside others, of this form too; a failure is said, and means a test next time."""
        if self._path is None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with _alone_in(self._path.parent):
                kept = dict(self._read())
                before = kept[block].verdicts if block in kept else ()
                both = {one.first: one for one in (*before, *verdicts)}
                kept[block] = Kept(form, tuple(both[first] for first in sorted(both)))
                content = {
                    "machine": asdict(self._machine),
                    "blocks": {name: asdict(found) for name, found in kept.items()},
                }
                _write_whole(self._path, json.dumps(content, indent=1))
        except OSError as error:
            logger.warning("verdicts on kernels cannot be kept in %s: %s", self._path, error)

    def _read(self) -> Mapping[str, Kept]:
        if self._path is None:
            return {}
        try:
            with self._path.open("rb") as file:
                content = json.loads(file.read(MAX_FILE_BYTES))
            if content["machine"] != asdict(self._machine):
                raise ValueError("they are of another machine")
            return {name: _kept(found) for name, found in content["blocks"].items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            logger.warning("the verdicts on kernels in %s cannot be used: %s", self._path, error)
            return {}


def _kept(told: Any) -> Kept:
    """From JSON. Raises KeyError, TypeError or AttributeError for another shape."""
    form = told["form"]
    verdicts = (
        Verdict(**{**one, "timed": tuple(Timed(**size) for size in one["timed"])}) for one in told["verdicts"]
    )
    return Kept(form and Form(**{**form, "formats": tuple(form["formats"])}), tuple(verdicts))


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Nodes of one machine write to one file: none may lose what another has just added."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _write_whole(path: Path, text: str) -> None:
    """As shard_loader.whole_file, which is out of reach for the reason in emulator.build.cache_folder."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem)
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        Path(name).replace(path)
    except OSError:
        Path(name).unlink(missing_ok=True)
        raise
