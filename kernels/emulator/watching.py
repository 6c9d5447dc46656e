"""The buffers of a watched launch, far apart in one piece of memory, and what watch.cpp counts of them."""

from __future__ import annotations

import ctypes
import mmap
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

ROOM_BYTES = (
    4 << 20
)  # before, between and behind buffers: never touched, so it takes address space and no memory
_PAGE = 4096
Bytes = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True, slots=True)
class Traffic:
    """What a launch moved of one buffer. What is loaded is summed over threads; requested, over simdgroups:
    a place that several lanes load in the same turn counts once, as on a GPU. Touched bytes count once."""

    loaded_bytes: int
    requested_bytes: int
    touched_bytes: int
    written_bytes: int


@dataclass(frozen=True, slots=True)
class Buffer:
    name: str
    array: np.ndarray[Any, Any]
    is_output: bool


class Arena:
    """Copies of buffers, as the library watches them. Every store of the kernel goes to the copies."""

    def __init__(self, library: ctypes.CDLL, buffers: Sequence[Buffer]) -> None:
        self._library, self._buffers = library, buffers
        places, end = [], ROOM_BYTES
        for buffer in buffers:
            places.append(end)
            end = _whole_pages(end + buffer.array.nbytes) + ROOM_BYTES
        self._memory: Bytes = np.frombuffer(mmap.mmap(-1, end), np.uint8)
        self.addresses = [self._memory.ctypes.data + place for place in places]
        self._parts = [
            self._memory[place : place + buffer.array.nbytes]
            for place, buffer in zip(places, buffers, strict=True)
        ]
        for part, buffer in zip(self._parts, buffers, strict=True):
            part[:] = buffer.array.reshape(-1).view(np.uint8)
        self._declare(end)

    def _declare(self, end: int) -> None:
        n, library = len(self._buffers), self._library
        library.shadow_bytes.restype = ctypes.c_long
        per_byte = library.shadow_bytes()
        self._were_read = [np.zeros(max(1, b.array.nbytes), np.uint8) for b in self._buffers]
        self._shadows = [
            np.zeros(b.array.nbytes * per_byte if b.is_output else 1, np.uint8) for b in self._buffers
        ]
        start = self._memory.ctypes.data
        library.watch_buffers(
            n,
            (ctypes.c_char_p * n)(*(b.name.encode() for b in self._buffers)),
            (ctypes.c_void_p * n)(*self.addresses),
            (ctypes.c_long * n)(*(b.array.nbytes for b in self._buffers)),
            (ctypes.c_int * n)(*(int(b.is_output) for b in self._buffers)),
            (ctypes.c_void_p * n)(*(x.ctypes.data for x in self._were_read)),
            (ctypes.c_void_p * n)(*(x.ctypes.data for x in self._shadows)),
            ctypes.c_void_p(start),
            ctypes.c_void_p(start + end),
        )

    def finish(self) -> tuple[dict[str, Traffic], int | None]:
        """Fills the outputs from their copies: what was moved, and the first fault's place in the library."""
        counts = (ctypes.c_long * (4 * len(self._buffers)))()
        self._library.watched.restype = ctypes.c_void_p
        place: int | None = self._library.watched(counts)
        for part, buffer in zip(self._parts, self._buffers, strict=True):
            if buffer.is_output:
                buffer.array.reshape(-1).view(np.uint8)[:] = part
        moved = {b.name: Traffic(*counts[4 * i : 4 * i + 4]) for i, b in enumerate(self._buffers)}
        return moved, place


def line_of(library: str, place: int | None) -> str:
    """Such as " (row_sums.metal, line 9)" for an instruction, where addr2line can tell; else nothing."""
    tool = shutil.which("addr2line")
    if place is None or tool is None:
        return ""
    command = [tool, "-e", library, hex(place)]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    path, _, line = said.split(" ")[0].rpartition(":")
    return f" ({path.rsplit('/', 1)[-1]}, line {line})" if line.isdigit() and path != "??" else ""


def _whole_pages(num_bytes: int) -> int:
    return -(-num_bytes // _PAGE) * _PAGE
