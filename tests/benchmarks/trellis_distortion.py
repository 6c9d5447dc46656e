"""How near the EXL3 encoder comes to the best that so many bits allow: `python -m
tests.benchmarks.trellis_distortion`.

A Gaussian source of variance 1: Shannon's bound is an error of 4^-bits. In brackets, how much more it is.
"""

from __future__ import annotations

import time

import numpy as np

from kernels.exl3_encode import best_scale, encode_tiles
from kernels.exl3_reference import values

NUM_TILES = 8


def main() -> None:
    source = np.random.default_rng(1).standard_normal((NUM_TILES, 256)).astype(np.float32)
    power = np.mean(source**2)
    print("| bits | bound | trellis | best uniform grid | CPU ms a tile |\n| --- | --- | --- | --- | --- |")
    for bits in range(1, 9):
        scale = np.float32(best_scale(bits, "mcg"))
        encode_tiles(source[:1], bits, "mcg")
        started = time.process_time()
        found = values(encode_tiles(source / scale, bits, "mcg"), "mcg").astype(np.float32) * scale
        took_ms = 1e3 * (time.process_time() - started) / NUM_TILES
        error, bound = float(np.mean((found - source) ** 2) / power), 4.0**-bits
        grid = np.arange(2**bits) - (2**bits - 1) / 2
        uniform = min(
            float(np.mean((np.abs(source.reshape(-1, 1) - grid * step).min(axis=1)) ** 2) / power)
            for step in np.geomspace(0.5, 1.5, 41) * 4.5 * 2.0**-bits
        )
        print(f"| {bits} | {bound:.6f} | {error:.6f} ({error / bound:.2f} x) | "
              f"{uniform:.6f} ({uniform / bound:.2f} x) | {took_ms:.1f} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
