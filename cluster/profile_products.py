"""Products of a few rows with weights of one format, sized so that a call takes a set time. MLX.

For the thread that owns MLX. On a CPU, MLX computes a quantised product on one thread and is bound by
arithmetic: there a small matrix is enough, and a large one would take minutes. A GPU is bound by memory:
there the weights must be larger than its cache. Either way each call takes other weights than the one before.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from cluster.profile_exl3 import Exl3Weights, make_exl3
from cluster.profile_timing import OWN, WALL, Clock, time_once_ms

WIDTH = 4096  # in-features: a multiple of all group sizes, as wide as an 8B model
FIRST_OUT = 64
MAX_OUT = 16384  # out-features of one matrix
MIN_OUT = 4
FAST_BYTES_MS = 5e5  # from 0.5 GB/s on, a cache matters, and all of the pool is used
MAX_EACH = 1024
ROTATION = 16  # calls before the same weights come again
MAX_RESULTS = 1 << 26  # numbers that one call leaves behind
FEW, MANY = 8, 512
ROWS = (1, FEW, MANY)
MAIN_FORMATS = (
    *("bfloat16", "affine4/64", "affine8/64", "affine4/64+float16", "mxfp4", "float16", "float32"),
    *("affine8/64+float16", "affine4/64+float32", "affine8/64+float32"),
)
OTHER_FORMATS = (
    *("exl3/3", "exl3/4", "exl3/2"),
    *("affine3/64", "affine5/64", "affine6/64", "affine4/32", "affine8/32"),
    *("mxfp8", "nvfp4"),
)


@dataclass(frozen=True, slots=True)
class Weights:
    """(num_out, WIDTH) weights: one array, or values, scales and biases as `mx.quantize` gives them."""

    format: str
    arrays: tuple[mx.array, ...]
    options: dict[str, Any]

    @property
    def nbytes(self) -> int:
        return sum(int(array.nbytes) for array in self.arrays)

    @property
    def num_out(self) -> int:
        return int(self.arrays[0].shape[0])

    @property
    def dtype(self) -> mx.Dtype:
        """What the other operand has: that of floats and of affine scales, all else bfloat16."""
        return _dtype_of(self.format)

    def times(self, x: mx.array) -> mx.array:
        """x (rows, WIDTH) -> (rows, num_out)."""
        if not self.options:
            return x @ self.arrays[0].T
        values, scales, biases = (*self.arrays, None)[:3]
        return mx.quantized_matmul(x, values, scales, biases, **self.options)  # type: ignore[arg-type]

    def repeated(self, num_times: int) -> Weights:
        arrays = tuple(mx.concatenate([array] * num_times) for array in self.arrays)
        return Weights(self.format, _evaluated(arrays), self.options)

    def first(self, num_out: int) -> Weights:
        arrays = tuple(array[:num_out] for array in self.arrays)
        return Weights(self.format, _evaluated(arrays), self.options)


Pool = tuple[Weights | Exl3Weights, ...]


@dataclass(frozen=True, slots=True)
class Product:
    """A call: x (rows, WIDTH) with the next `num_each` of `pool`, round and round; all are of one size."""

    rows: int
    pool: Pool
    num_each: int

    @property
    def num_weights(self) -> int:
        """Weights that one call multiplies with, for each row."""
        return self.num_each * WIDTH * self.pool[0].num_out

    @property
    def num_bytes(self) -> int:
        """Bytes of weights that one call reads."""
        return self.num_each * self.pool[0].nbytes

    @property
    def name(self) -> str:
        return f"{self.pool[0].format} x {self.rows}"

    def case(self) -> Callable[[], None]:
        """What is timed. Each call takes other weights than the one before: no cache holds them by then."""
        x = _evaluated((mx.random.normal((self.rows, WIDTH)).astype(self.pool[0].dtype),))[0]
        weights = itertools.cycle(self.pool)

        def run() -> None:
            mx.eval([w.times(x) for w in itertools.islice(weights, self.num_each)])

        return run


def _dtype_of(name: str) -> mx.Dtype:
    dtype = name.rpartition("+")[2]
    return getattr(mx, dtype) if dtype in ("float32", "float16") else mx.bfloat16


def make_weights(name: str, num_out: int = FIRST_OUT) -> Weights | Exl3Weights:
    """Random weights; of EXL3 the smallest.

    Raises ValueError or RuntimeError for a format that this MLX or device lacks.
    """
    if name.startswith("exl3/"):
        return make_exl3(name, WIDTH, ROWS)
    values = mx.random.normal((num_out, WIDTH))
    if name in ("float32", "bfloat16", "float16"):
        return Weights(name, _evaluated((values.astype(getattr(mx, name)),)), {})
    if name.startswith("affine"):
        bits, _, group_size = name.partition("+")[0].removeprefix("affine").partition("/")
        options: dict[str, Any] = {"bits": int(bits), "group_size": int(group_size)}
    else:
        options = {"mode": name}
    arrays = mx.quantize(values.astype(_dtype_of(name)), **options)
    return Weights(name, _evaluated(tuple(arrays)), options)


def make_pool(name: str, target_ms: float, pool_bytes: int) -> Pool:
    """Matrices of one size, of which a product of one row takes a part of target_ms or more, if they may be
    that large; enough of them for ROTATION calls, and never more than pool_bytes together.

    Raises ValueError or RuntimeError for a format that this MLX or device lacks.
    """
    weights = make_weights(name)
    took_ms = _took_ms(1, (weights,))
    while took_ms < target_ms / 3 and weights.num_out < MAX_OUT and 8 * weights.nbytes <= pool_bytes:
        weights = weights.repeated(min(8, MAX_OUT // weights.num_out))
        took_ms = _took_ms(1, (weights,))
    num_each = max(1, round(target_ms / took_ms))
    num_held = min(ROTATION * num_each, pool_bytes // weights.nbytes)
    if weights.nbytes / took_ms > FAST_BYTES_MS:
        num_held = pool_bytes // weights.nbytes
    return (weights, *(weights.repeated(1) for _ in range(num_held - 1)))


def sized_product(pool: Pool, rows: int, target_ms: float) -> Product:
    """A call of about target_ms: parts of the matrices, as large as fits the time, or several whole ones.

    Raises ValueError or RuntimeError where MLX has no product of so many rows.
    """
    whole = pool[0].num_out
    num_out = min(whole, max(MIN_OUT, whole // rows))
    took_ms = _took_ms(rows, (pool[0].first(num_out),))
    while took_ms < target_ms / 3 and num_out < whole:
        num_out = min(4 * num_out, whole)
        took_ms = _took_ms(rows, (pool[0].first(num_out),))
    if num_out < whole:
        return Product(rows, tuple(w.first(num_out) for w in pool), 1)
    num_each, most = 1, max(1, min(MAX_EACH, MAX_RESULTS // (rows * whole)))
    while took_ms < target_ms / 2 and num_each < most:  # the first of them waits for the device to wake up
        num_each = min(most, max(2 * num_each, int(num_each * target_ms / took_ms)))
        took_ms = _took_ms(rows, pool, num_each)
    return Product(rows, pool, num_each)


def _took_ms(rows: int, pool: Pool, num_each: int = 1) -> float:
    return max(time_once_ms(Product(rows, pool, num_each).case(), device_clocks()), 1e-3)


def is_gpu() -> bool:
    """Whether MLX's default device is one."""
    return bool(mx.default_device().type == mx.DeviceType.gpu)


def device_clocks() -> Sequence[Clock]:
    """By which work of MLX's default device is timed."""
    return WALL if is_gpu() else OWN


def _evaluated(arrays: tuple[mx.array, ...]) -> tuple[mx.array, ...]:
    mx.eval(arrays)
    return arrays
