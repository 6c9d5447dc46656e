"""A kernel: body and headers in files of kernels/metal/, called alike on Metal, on CUDA and in the emulator.

Belongs to the thread that owns MLX. On Metal and CUDA a call is lazy, as every op of MLX; emulated it
evaluates its inputs and computes at once.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from kernels import backend, cuda_text, msl_text
from kernels.emulator import launch

FOLDER = Path(__file__).resolve().parent / "metal"
SIMD = 32  # lanes of a simdgroup, threads of a warp
MAX_THREADS = 1024  # of a threadgroup
Triple = tuple[int, int, int]


@functools.cache
def _read(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


def file_text(name: str) -> str:
    """A file of kernels/metal/."""
    text = _read(name)
    if name.partition(".")[0] not in _wrong:
        return text
    changed = re.sub(r"= ([TY])\((.+)\);", r"= \1(1.25f * (\2));", text)
    changed = re.sub(r"= (exl3_value<BOOK>\(.+\)|rows\[i\]);", r"= half(1.25f * float(\1));", changed)
    if changed == text:
        raise ValueError(f"{name} cannot be made wrong: it stores nothing as T(...) or Y(...), and no weight")
    return changed


_wrong: set[str] = set()


def make_wrong(name: str) -> None:
    """From now on a file (without its suffix) stores other numbers: a test of those who must find out."""
    _wrong.add(name)


def wrong_files() -> list[str]:
    """Those that were made wrong."""
    return sorted(_wrong)


@dataclass(frozen=True, slots=True)
class Call:
    """One launch, as it was asked for."""

    kernel: Kernel
    arrays: tuple[mx.array, ...]
    template: dict[str, msl_text.TemplateValue]
    grid: Triple  # threads, whole threadgroups
    threadgroup: Triple
    shapes: tuple[tuple[int, ...], ...]  # of the outputs
    dtypes: tuple[mx.Dtype, ...]

    def __post_init__(self) -> None:
        _check(self.kernel, len(self.arrays), self.grid, self.threadgroup, len(self.shapes), len(self.dtypes))
        scalars = [key for key, a in zip(self.kernel.inputs, self.arrays, strict=True) if a.ndim == 0]
        if scalars:  # Metal would pass a reference, CUDA a pointer
            raise ValueError(
                f"{self.kernel.name}: {', '.join(scalars)} has no dimension: pass an array of shape (1,)"
            )

    @property
    def inputs(self) -> tuple[msl_text.Operand, ...]:
        pairs = zip(self.kernel.inputs, self.arrays, strict=True)
        return tuple(msl_text.Operand(name, a.dtype, a.ndim, a.size) for name, a in pairs)

    @property
    def outputs(self) -> tuple[msl_text.Operand, ...]:
        parts = zip(self.kernel.outputs, self.dtypes, self.shapes, strict=True)
        return tuple(msl_text.Operand(name, dtype, len(shape), 0) for name, dtype, shape in parts)

    def msl(self) -> msl_text.Generated:
        """The source that Metal compiles for this call."""
        k = self.kernel
        return msl_text.generate(
            k.name, k.header, k.body, inputs=self.inputs, outputs=self.outputs, template=self.template
        )


@dataclass(frozen=True, slots=True)
class Kernel:
    """kernels/metal/NAME.metal, the body as mx.fast.metal_kernel takes it, behind `headers` of that folder.

    `inputs` and `outputs` are the names that the body uses. `text` is the body itself where it is no file of
    ours (a kernel made wrong on purpose, in a test)."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    headers: tuple[str, ...] = ()
    text: str | None = field(default=None, repr=False)

    @property
    def body(self) -> str:
        return file_text(f"{self.name}.metal") if self.text is None else self.text

    @property
    def header(self) -> str:
        return "".join(file_text(name) for name in self.headers)

    def digest(self) -> str:
        """Of everything that the kernel is made of: a verdict about one text is none about another."""
        whole = "\0".join((self.name, *self.inputs, *self.outputs, self.header, self.body))
        return hashlib.sha256(whole.encode()).hexdigest()[:16]

    def __call__(
        self,
        arrays: Sequence[mx.array],
        *,
        grid: Triple,
        threadgroup: Triple,
        shapes: Sequence[Sequence[int]],
        dtypes: Sequence[mx.Dtype],
        template: Mapping[str, msl_text.TemplateValue] | None = None,
    ) -> list[mx.array]:
        """The outputs. `grid` is in threads and made of whole threadgroups, those of whole simdgroups.

        Every value of `template` is a compilation of its own: no number of tokens belongs there.
        Raises ValueError for a launch that cannot be, RuntimeError where no backend is."""
        where = backend.current()
        if where is None:
            raise RuntimeError(f"The kernel {self.name} has no GPU to run on: ask backend.current() first.")
        if where == "emulated" or _listeners:
            call = Call(
                self,
                tuple(arrays),
                dict(template or {}),
                grid,
                threadgroup,
                tuple(tuple(shape) for shape in shapes),
                tuple(dtypes),
            )
            for listener in _listeners:
                listener(call)
            if where == "emulated":
                return launch.run(
                    self.name,
                    call.msl(),
                    inputs=dict(zip(self.inputs, call.arrays, strict=True)),
                    outputs=dict(zip(self.outputs, zip(call.shapes, call.dtypes, strict=True), strict=True)),
                    grid=grid,
                    threadgroup=threadgroup,
                )
        # The way of each block of each token: nothing is looked at here that was looked at before.
        _check(self, len(arrays), grid, threadgroup, len(shapes), len(dtypes))
        constants = list((template or {}).items())
        function = _metal(self)
        if where == "cuda":
            function = _cuda(self, tuple(constants), tuple((x.dtype, x.ndim) for x in arrays))
        found: list[mx.array] = function(
            inputs=arrays,
            template=constants,
            grid=grid,
            threadgroup=threadgroup,
            output_shapes=shapes,
            output_dtypes=dtypes,
            verbose=_is_shown,
        )
        return found


@functools.lru_cache(maxsize=4096)
def _check(  # noqa: PLR0917
    kernel: Kernel,
    num_arrays: int,
    grid: Triple,
    threadgroup: Triple,
    num_shapes: int,
    num_dtypes: int,
) -> None:
    name, threads = kernel.name, threadgroup[0] * threadgroup[1] * threadgroup[2]
    if num_arrays != len(kernel.inputs):
        raise ValueError(f"{name} takes {len(kernel.inputs)} arrays, not {num_arrays}")
    if not len(kernel.outputs) == num_shapes == num_dtypes:
        raise ValueError(
            f"{name} has {len(kernel.outputs)} outputs, not {num_shapes} shapes and {num_dtypes} dtypes"
        )
    if threads % SIMD or not 0 < threads <= MAX_THREADS:
        raise ValueError(
            f"{name}: a threadgroup of {threads} threads, not a multiple of {SIMD} to {MAX_THREADS}"
        )
    if any(size < 1 or size % part for size, part in zip(grid, threadgroup, strict=True)):
        raise ValueError(f"{name}: a grid of {grid} threads is not made of threadgroups {threadgroup}")


_listeners: list[Callable[[Call], None]] = []


@contextlib.contextmanager
def recorded() -> Iterator[list[Call]]:
    """Every launch made inside, in order: to count launches, or to look at their sources."""
    calls: list[Call] = []
    _listeners.append(calls.append)
    try:
        yield calls
    finally:
        _listeners.remove(calls.append)


def is_watched() -> bool:
    """Whether someone wants to see each launch (`recorded`, `shown`)."""
    return bool(_listeners) or _is_shown


_is_shown = False


@contextlib.contextmanager
def shown() -> Iterator[None]:
    """Inside, MLX prints the source that it makes of each launch."""
    global _is_shown
    before, _is_shown = _is_shown, True
    try:
        yield
    finally:
        _is_shown = before


@functools.cache
def _metal(kernel: Kernel) -> Any:
    return mx.fast.metal_kernel(
        name=kernel.name,
        input_names=list(kernel.inputs),
        output_names=list(kernel.outputs),
        source=kernel.body,
        header=kernel.header,
    )


@functools.cache
def _cuda(kernel: Kernel, template: object, inputs: object) -> Any:
    """One object for each instantiation: MLX keeps compiled CUDA code by its name, which so says all."""
    made_of = hashlib.sha256(f"{kernel.digest()} {template} {inputs}".encode()).hexdigest()[:12]
    return mx.fast.cuda_kernel(
        name=f"{kernel.name}_{made_of}",
        input_names=list(kernel.inputs),
        output_names=list(kernel.outputs),
        source=cuda_text.body(kernel.body),
        header=cuda_text.header(kernel.header),
    )
