"""Runs a generated kernel on this CPU: arrays in, arrays out, what it did in a list for who asks.

Belongs to the thread that owns MLX; its inputs are evaluated first, and it computes at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import mlx.core as mx
import numpy as np

from kernels.emulator import build, translate
from kernels.emulator.watching import Arena, Buffer, Traffic, line_of
from kernels.msl_text import Generated

Order = Literal["forward", "reverse", "random"]
ORDERS: tuple[Order, ...] = ("forward", "reverse", "random")
MAX_THREADS, STACK_BYTES = 1024, 128 << 10  # as in fibers.h
_POISON = 0xFF  # of every byte: a NaN in each float type, the largest number of an unsigned one


@dataclass(frozen=True, slots=True)
class Launch:
    """What one emulated launch did."""

    kernel: str
    num_switches: int
    num_barriers: int  # times that a thread came to a barrier of its threadgroup
    traffic: Mapping[str, Traffic]  # by buffer, of a watched launch


@dataclass(slots=True)
class Options:
    """How kernels are run, and what they did: see `options`."""

    order: Order = "forward"
    seed: int = 1
    mode: build.Mode = "plain"
    launches: list[Launch] = field(default_factory=list)


_options = Options()


@contextlib.contextmanager
def options(order: Order = "forward", seed: int = 1, mode: build.Mode = "plain") -> Iterator[Options]:
    """Inside, threads and threadgroups run in this order. The launches are listed in what is yielded.

    A watched launch counts what it reads, and fails where it reads or writes outside its buffers or where
    threads race; "address" and "thread" are for a process with that sanitizer loaded before all else."""
    global _options
    before, _options = _options, Options(order, seed, mode)
    try:
        yield _options
    finally:
        _options = before


def run(
    name: str,
    generated: Generated,
    *,
    inputs: Mapping[str, mx.array],
    outputs: Mapping[str, tuple[tuple[int, ...], mx.Dtype]],
    grid: tuple[int, int, int],
    threadgroup: tuple[int, int, int],
) -> list[mx.array]:
    """The outputs; what the kernel leaves out is NaN in them.

    Raises build.EmulatorError for what a GPU would not have survived: threads that wait for ever, collectives
    that only some reach, too much threadgroup memory."""
    mode = _options.mode
    path, library = _loaded(generated, f"{name}.metal", mode)
    given = {key: _host(array) for key, array in inputs.items()}
    made = {key: _poisoned(shape, dtype) for key, (shape, dtype) in outputs.items()}
    buffers = []
    for p in generated.parameters:
        if p.kind == "input":
            array = given[p.operand]
            buffers.append(Buffer(p.operand, array.copy() if mode == "address" else array, is_output=False))
        elif p.kind == "output":
            buffers.append(Buffer(p.operand, made[p.operand], is_output=True))
        elif p.kind != "attribute":
            metadata = _metadata(p.kind, given[p.operand])
            buffers.append(Buffer(f"{p.operand}_{p.kind}", metadata, is_output=False))
    arena = Arena(library, buffers) if mode == "watched" else None
    addresses = arena.addresses if arena else [buffer.array.ctypes.data for buffer in buffers]
    statistics = (ctypes.c_long * 2)()
    status = library.launch(
        (ctypes.c_void_p * len(buffers))(*addresses),
        (ctypes.c_int * 3)(*grid),
        (ctypes.c_int * 3)(*threadgroup),
        ORDERS.index(_options.order),
        ctypes.c_uint(_options.seed),
        _stacks(),
        statistics,
    )
    traffic, place = arena.finish() if arena else ({}, None)
    if status:
        raise build.EmulatorError(f"{name}: {library.last_error().decode()}{line_of(path, place)}")
    _options.launches.append(Launch(name, statistics[0], statistics[1], traffic))
    return [_device(made[key], dtype) for key, (_, dtype) in outputs.items()]


@functools.cache
def _stacks() -> ctypes.Array[ctypes.c_char]:
    """Of the fibers, for all kernels of the process: pages that no fiber touches take no memory."""
    return (ctypes.c_char * (MAX_THREADS * STACK_BYTES)).from_buffer(mmap.mmap(-1, MAX_THREADS * STACK_BYTES))


@functools.cache
def _loaded(generated: Generated, file_name: str, mode: build.Mode) -> tuple[str, ctypes.CDLL]:
    path = str(build.library(translate.cpp(generated, file_name), mode))
    library = ctypes.CDLL(path)
    library.last_error.restype = ctypes.c_char_p
    return path, library


def _host(array: mx.array) -> np.ndarray[Any, Any]:
    """Row-contiguous on the host, as Metal gets it; bfloat16 as its bits."""
    plain = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array
    return np.ascontiguousarray(np.array(plain, copy=None)).reshape(array.shape)


def _poisoned(shape: tuple[int, ...], dtype: mx.Dtype) -> np.ndarray[Any, Any]:
    raw = np.full(int(np.prod(shape)) * dtype.size, _POISON, np.uint8)
    made: np.ndarray[Any, Any] = raw.view(_numpy_type(dtype)).reshape(shape)
    return made


def _device(array: np.ndarray[Any, Any], dtype: mx.Dtype) -> mx.array:
    made = mx.array(array)
    return made.view(dtype) if made.dtype != dtype else made


def _numpy_type(dtype: mx.Dtype) -> Any:
    if dtype in (mx.bfloat16, mx.bool_):  # their bits
        return np.uint16 if dtype == mx.bfloat16 else np.uint8
    return np.dtype(str(dtype).removeprefix("mlx.core."))


def _metadata(kind: str, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    if kind == "shape":
        return np.array(array.shape, np.int32)
    if kind == "ndim":
        return np.array([array.ndim], np.int32)
    return np.array(array.strides, np.int64) // array.itemsize
