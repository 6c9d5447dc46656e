"""Row sums on the ladder."""

from __future__ import annotations

from functools import partial

import mlx.core as mx

from kernels.ladder.case import Case, dtype_name
from kernels.row_sums import row_sums


def _rows(rows: int, columns: int, dtype: mx.Dtype) -> list[mx.array]:
    return [mx.random.normal((rows, columns), key=mx.random.key(columns)).astype(dtype)]


def _sums(x: mx.array) -> mx.array:
    return x.astype(mx.float32).sum(axis=1)


def row_sum_cases() -> list[Case]:
    sizes = [(3, 1000, False), (1, 31, False), (2, 4097, False), (65536, 8192, True)]
    return [
        Case(
            name=f"row_sums/{rows}x{columns}-{dtype_name(dtype)}",
            inputs=partial(_rows, rows, columns, dtype),
            run=row_sums,
            reference=_sums,
            tolerance=1e-4,
            is_golden=rows == 3,
            is_full=is_full,
            is_long=rows == 2,
            once=("x",),
        )
        for rows, columns, is_full in sizes
        for dtype in (mx.float32, mx.float16, mx.bfloat16)
        if not is_full or dtype == mx.float16
    ]
