"""The figures of docs/copies.md: bytes read and held by a load, and what the copies of a carry cost.

python -m tests.benchmarks.copies
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx

from proto.codec import FrameAssembler, Tensor, encode
from shard_loader.carry import from_wire, to_wire
from tests.frames import step
from tests.load_probe import FORMS, probe, write_form

HIDDEN = 4096
ROUNDS = 300


def loads() -> None:
    """One row per form of checkpoint, as multiples of the own bytes: layers 2:5 of 7."""
    print(
        "| checkpoint | own MB | read / own | peak in MLX / own | kept in MLX / own | kept, resident / own |"
    )
    print("| --- | --- | --- | --- | --- | --- |")
    for form in FORMS:
        with tempfile.TemporaryDirectory() as directory:
            found = probe(write_form(form, Path(directory) / "model"), 2, 5)
        own = found["own"]
        shares = (found[key] / own for key in ("read", "mlx_peak", "mlx_kept", "kept"))
        print(f"| {form} | {own / 1e6:.1f} | {' | '.join(f'{share:.3f}' for share in shares)} |")


def best_us(work: Callable[[], Any]) -> float:
    """The best of ROUNDS."""
    best = float("inf")
    for _ in range(ROUNDS):
        started = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - started)
    return best * 1e6


def carries() -> None:
    """One row per carry: out with a copy to bytes first, as it was, and without; in by its two parts."""
    print("| carry | out, copied to bytes first, us | out, us | joining parts, us | into MLX, us |")
    print("| --- | --- | --- | --- | --- |")
    for tokens in (1, 16, 100, 512):
        x = mx.random.normal((1, tokens, HIDDEN)).astype(mx.bfloat16)
        mx.eval(x)

        def twice(x: mx.array = x) -> list[bytes]:
            view = to_wire(x)
            return encode(step(1), [Tensor(view.dtype, view.shape, bytes(view.data))])

        def once(x: mx.array = x) -> list[bytes]:
            return encode(step(1), [to_wire(x)])

        messages = once()

        def decode(messages: list[bytes] = messages) -> Any:
            assembler = FrameAssembler()
            return [assembler.feed(message) for message in messages][-1]

        tensor = decode()[1][0]
        times = (best_us(twice), best_us(once), best_us(decode), best_us(lambda t=tensor: from_wire(t)))
        print(f"| {x.nbytes / 1024:.0f} KiB | {' | '.join(f'{t:.1f}' for t in times)} |")


if __name__ == "__main__":
    loads()
    print()
    carries()
