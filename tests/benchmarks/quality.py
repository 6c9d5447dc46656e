"""Perplexity of the demo model's held-out text: `python -m tests.benchmarks.quality`.

Rows: the weights as they are (float32), MLX's affine form with groups of 64 and float16 scales, affine at
the bits of EXL3-3, and EXL3, made by `macrame quantize` where WORK has it not yet. All rows keep
embedding, router and norms in float32; what differs is the linears. EXL3 is read by the reference decoder,
the affine rows by MLX's dequantize, and all run through tests/benchmarks/demo_forward.py. The text that
EXL3 is fitted to and the text that is measured are different files (deploy/demo/corpus.py). Bits count all
that is stored of the linears.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import sysconfig
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from numpy.typing import NDArray
from tokenizers import Tokenizer

from cluster.quantize_source import load_plain, read_source
from deploy.demo.corpus import END_OF_TEXT_ID, is_held_out, read_sources
from deploy.quantize import main as quantize
from kernels.exl3_reference import dense
from tests.benchmarks.demo_forward import Floats, Weights, losses

MODEL = Path(__file__).parents[2] / "deploy" / "demo" / "model"
WINDOW = 512
EXPERTS = ".mlp.switch_mlp."


def plain_weights() -> dict[str, Floats]:
    """By mlx-lm's names, in float32."""
    model = load_plain(read_source(MODEL, is_for_exl3=True))
    return {name: np.array(array.astype(mx.float32)) for name, array in tree_flatten(model.parameters())}


def is_linear(name: str) -> bool:
    return EXPERTS in name or name.endswith(
        ("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight")
    )


def affine(weights: Weights, choose: Callable[[str], tuple[int, int]]) -> tuple[dict[str, Floats], float]:
    """Each linear through MLX's quantize with (bits, group size) by its name; and the bits stored."""
    out, stored, count = dict(weights), 0, 0
    for name in filter(is_linear, weights):
        bits, group = choose(name)
        parts = mx.quantize(mx.array(weights[name]).astype(mx.float16), group_size=group, bits=bits)
        out[name] = np.array(mx.dequantize(*parts, group_size=group, bits=bits).astype(mx.float32))
        stored += 8 * sum(part.nbytes for part in parts)
        count += weights[name].size
    return out, stored / count


def exl3(weights: Weights, folder: Path) -> tuple[dict[str, Floats], float]:
    """The linears of a checkpoint by the reference decoder; and the bits a weight stored."""
    stored: dict[str, mx.array] = {}
    for file in sorted(folder.glob("*.safetensors")):
        stored |= mx.load(str(file))  # type: ignore[arg-type]
    out, bits, count = dict(weights), 0, 0

    def decoded(path: str, shape: tuple[int, ...]) -> Floats:
        nonlocal bits
        parts = {leaf: np.array(stored[f"{path}.{leaf}"]) for leaf in ("trellis", "suh", "svh", "mcg")}
        bits += 8 * sum(part.nbytes for part in parts.values())
        plain = dense(parts["trellis"], parts["suh"], parts["svh"], "mcg")
        return plain[: shape[0], : shape[1]].astype(np.float32)

    for name in filter(is_linear, weights):
        path, shape = name.removesuffix(".weight"), weights[name].shape
        count += weights[name].size
        if EXPERTS in name:
            single = [path.replace(".switch_mlp.", f".experts.{number}.") for number in range(shape[0])]
            out[name] = np.stack([decoded(one, shape[1:]) for one in single])
        else:
            out[name] = decoded(path, shape)
    return out, bits / count


def mixed(weights: Weights, wanted: float) -> Callable[[str], tuple[int, int]]:
    """Affine of 3 bits, of 2 in every so many linears, groups of 128: `wanted` bits a weight with scales."""
    chosen: dict[str, tuple[int, int]] = {}
    owed = Fraction(0)
    for name in filter(is_linear, weights):
        owed += Fraction(3.25 - wanted) * weights[name].size
        is_less = owed * 2 >= weights[name].size
        owed -= is_less * weights[name].size
        chosen[name] = (2 if is_less else 3, 128)
    return chosen.__getitem__


def held_out(num_tokens: int) -> NDArray[np.int32]:
    """(num_tokens / WINDOW, WINDOW + 1) windows, spread evenly over the held-out files."""
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    sources = read_sources(Path(sysconfig.get_paths()["stdlib"]), is_held_out)
    ids = np.concatenate([[*tokenizer.encode(text).ids, END_OF_TEXT_ID] for text in sources.values()])
    starts = np.linspace(0, len(ids) - WINDOW - 1, num_tokens // WINDOW).astype(int)
    return np.stack([ids[start : start + WINDOW + 1] for start in starts]).astype(np.int32)


def checkpoint(work: Path, bits: int) -> Path:
    """The EXL3 checkpoint of so many bits, made if it is not there."""
    folder = work / f"exl3-{bits}"
    command = ["--model", str(MODEL), "--format", "exl3", "--bits", str(bits), "--output", str(folder)]
    if not folder.exists() and quantize([*command, "--calibration-tokens", "16384"]):
        sys.exit(1)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/quality"), help="EXL3 checkpoints go here")
    parser.add_argument("--tokens", type=int, default=16_384, help="of the held-out text")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    config = json.loads((MODEL / "config.json").read_text())
    weights, windows = plain_weights(), held_out(args.tokens)
    base = losses(weights, config, windows)
    plain = math.exp(base.mean())
    print(f"{base.size} tokens in windows of {WINDOW}\n")
    print("| linears | bits a weight | perplexity | above float32 |\n| --- | --- | --- | --- |")
    print(f"| float32 | 32 | {plain:.4f} | |", flush=True)
    above: dict[str, float] = {}

    def row(name: str, made: tuple[Weights, float]) -> None:
        found = losses(made[0], config, windows)
        above[name] = math.exp(found.mean()) - plain
        error = float((found - base).std()) / math.sqrt(found.size) * plain
        print(
            f"| {name} | {made[1]:.3f} | {plain + above[name]:.4f} | {above[name]:.4f} ± {error:.4f} |",
            flush=True,
        )

    for bits in (8, 4, 3, 2):
        row(f"affine {bits}, groups of 64", affine(weights, lambda _, bits=bits: (bits, 64)))
    row("affine 3, groups of 128", affine(weights, lambda _: (3, 128)))
    for bits in (4, 3, 2):
        made = exl3(weights, checkpoint(args.work, bits))
        row(f"EXL3 {bits}", made)
        if bits == 3:
            row(
                "affine 3 and 2, groups of 128, at the bits of EXL3 3",
                affine(weights, mixed(weights, made[1])),
            )
    best = above["EXL3 3"]
    equal = above["affine 3 and 2, groups of 128, at the bits of EXL3 3"]
    print(f"\nEXL3 3 is {best / equal:.2f} x as far above float32 as affine at its own bits, "
          f"{best / above['affine 3, groups of 128']:.2f} x as affine 3 with groups of 128, "
          f"{best / above['affine 4, groups of 64']:.2f} x as affine 4.")  # fmt: skip


if __name__ == "__main__":
    main()
