"""`macrame quantize`: a model folder with fewer bits a weight, as EXL3 or in MLX's affine form.

The main thread owns MLX here. Progress goes to standard error, the summary or the JSON object to standard
output.
"""

from __future__ import annotations

import argparse
import json
import sys
import sysconfig
import time
import zlib
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.arguments import Parser
from cluster.console import say
from cluster.errors import EXIT_OK, EXIT_USAGE, UserError
from cluster.load_bar import LoadBar
from deploy.command import INTERRUPTED, run_command
from planner.sizes import size

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mlx import nn

    from cluster.quantize_exl3 import Layer, Quantised
    from cluster.quantize_parts import Parts
    from cluster.quantize_source import Source

HEAD_BITS = 6
CALIBRATION_TOKENS = 32_768
_ONE_FILE_IN = 16  # of the library, where no text is given
_PLAIN_BYTES = 2  # of a weight, in what the progress counts


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, 2 where the disk is too small, 3 for wrong input."""
    args = _parser().parse_args(argv)
    return run_command("macrame quantize", lambda: _run(args), is_verbose=args.verbose)


def _parser() -> Parser:
    parser = Parser(
        prog="macrame quantize",
        description="Write a model with fewer bits a weight. EXL3 (trellis) keeps most at a size and is "
        "fitted to a text; affine is MLX's own form, made in seconds and faster to compute with. A stopped "
        "EXL3 run goes on where it was when the same command is repeated.",
        examples=(
            (
                "macrame quantize --format exl3 --bits 3 --model ./Qwen3-8B",
                "writes Qwen3-8B-exl3-3bit beside you",
            ),
            (
                "macrame quantize --bits 3.5 --model ./Qwen3-8B --calibration notes.txt",
                "fitted to your own text",
            ),
            ("macrame quantize --format affine --bits 4 --model ./Qwen3-8B-exl3-4bit", "from EXL3 to affine"),
        ),
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="the model's folder")
    parser.add_argument("--format", choices=("exl3", "affine"), default="exl3", help="default: exl3")
    parser.add_argument(
        "--bits", required=True, metavar="N", help="a weight: 1 to 8 for exl3, 3.5 is a mix of 3 and 4; "
        "affine has 2, 3, 4, 5, 6, 8"
    )  # fmt: skip
    parser.add_argument(
        "--group-size", type=int, help="weights that share a scale, affine only: 32, 64, 128 (default 64)"
    )
    parser.add_argument("--head-bits", type=int, help="of the output layer, exl3 only (default 6)")
    parser.add_argument(
        "--output", metavar="DIR", help="default: the model's name with format and bits, here"
    )
    parser.add_argument(
        "--calibration",
        metavar="FILE",
        help="text that EXL3 is fitted to (default: sources of Python's library)",
    )
    parser.add_argument(
        "--calibration-tokens",
        type=_above_zero,
        metavar="N",
        help=f"of that text (default {CALIBRATION_TOKENS})",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--verbose", action="store_true", help="show tracebacks")
    return parser


def _above_zero(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number above 0")
    return int(text)


def _run(args: argparse.Namespace) -> int:
    folder = Path(args.model).expanduser().resolve()
    bits = _bits(args.bits, args.format)
    shown = str(bits.numerator) if bits.denominator == 1 else f"{float(bits):g}"
    output = (
        Path(args.output).expanduser() if args.output else Path(f"{folder.name}-{args.format}-{shown}bit")
    )
    output = output.resolve()
    if output == folder:
        raise UserError(f"--output {output} is the model itself: name another folder", EXIT_USAGE)
    started = time.monotonic()
    run = _exl3 if args.format == "exl3" else _affine
    found = {"output": str(output), "format": args.format, "bits": float(bits)} | run(
        args, folder, bits, output
    )
    found["took_s"] = round(time.monotonic() - started, 1)
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        print(
            f"{output}: {found['num_layers']} layers at {found['bits_per_weight']:.3f} bits a weight with "
            f"their scales, {size(found['total_bytes'])} in all, {found['took_s']:.0f} s"
        )
    return EXIT_OK


def _bits(text: str, form: str) -> Fraction:
    from cluster.quantize_affine import AFFINE_BITS

    try:
        bits = Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise UserError(f"--bits {text}: give a number, such as 3 or 3.5", EXIT_USAGE) from None
    if form == "affine" and bits not in AFFINE_BITS:
        raise UserError(f"--bits {text}: affine has {', '.join(map(str, AFFINE_BITS))}", EXIT_USAGE)
    if not 1 <= bits <= 8:
        raise UserError(f"--bits {text}: EXL3 has 1 to 8", EXIT_USAGE)
    return bits


def _affine(args: argparse.Namespace, folder: Path, bits: Fraction, output: Path) -> dict[str, Any]:
    from cluster.quantize_affine import GROUP_SIZES, quantize_affine
    from cluster.quantize_source import load_plain, read_source

    for option in ("head_bits", "calibration", "calibration_tokens"):
        if getattr(args, option) is not None:
            name = "--" + option.replace("_", "-")
            raise UserError(f"{name} goes with --format exl3: affine weights are only rounded", EXIT_USAGE)
    group_size = 64 if args.group_size is None else args.group_size
    if group_size not in GROUP_SIZES:
        raise UserError(f"--group-size {group_size}: MLX has {', '.join(map(str, GROUP_SIZES))}", EXIT_USAGE)
    source = read_source(folder, is_for_exl3=False)
    made = quantize_affine(source, load_plain(source), int(bits), group_size, output)
    return {
        "group_size": group_size,
        "bits_per_weight": made.bits_per_weight,
        "num_layers": made.num_layers,
        "total_bytes": made.total_bytes,
    }


def _exl3(args: argparse.Namespace, folder: Path, bits: Fraction, output: Path) -> dict[str, Any]:
    from cluster.quantize_exl3 import choose_layers, exl3_config, unnamed
    from cluster.quantize_parts import Parts, claimed
    from cluster.quantize_source import load_plain, read_source
    from cluster.quantize_text import token_rows

    if args.group_size is not None:
        raise UserError("--group-size goes with --format affine: EXL3 has no groups", EXIT_USAGE)
    head_bits = HEAD_BITS if args.head_bits is None else args.head_bits
    if not 1 <= head_bits <= 8:
        raise UserError(f"--head-bits {head_bits}: EXL3 has 1 to 8", EXIT_USAGE)
    source = read_source(folder, is_for_exl3=True)
    text, named = _text(args.calibration)
    rows = token_rows(folder, text, args.calibration_tokens or CALIBRATION_TOKENS, named)
    model = load_plain(source)
    layers = choose_layers(model, source.headers, bits, head_bits)
    if not layers:
        raise UserError(
            f"{folder} has no linear layers of 128 channels or more that EXL3 could store", EXIT_USAGE
        )
    left = unnamed(model, source.headers)
    if left:
        say(
            f"macrame quantize: {len(left)} layers stay as they are, {left[0]} first: the checkpoint joins "
            "their weights with others, or has other names for them"
        )
    settings = {
        "model": str(folder),
        "tensors": _digest(folder, source.headers),
        "bits": str(bits),
        "head_bits": head_bits,
        "rows": zlib.crc32(rows.tobytes()),
    }
    with claimed(output):
        config = exl3_config(source, bits, head_bits, rows.shape)
        made = _encoded(source, model, layers, rows, config, parts=Parts(output, settings))
    if made.num_resumed:
        say(f"macrame quantize: {made.num_resumed} of {len(layers)} layers were done by an earlier run")
    num_weights = sum(layer.num_weights for layer in layers.values())
    return {
        "head_bits": head_bits,
        "bits_per_weight": 8 * sum(layer.nbytes for layer in layers.values()) / num_weights,
        "num_layers": len(layers),
        "num_left": len(left),
        "num_resumed": made.num_resumed,
        "total_bytes": made.total_bytes,
        "losses": dict(made.losses),
    }


def _encoded(
    source: Source, model: nn.Module, layers: Mapping[str, Layer], rows: Any, config: dict[str, Any],
    *, parts: Parts,
) -> Quantised:  # fmt: skip
    """Raises UserError, also for Ctrl-C."""
    from cluster.quantize_exl3 import kept_tensors, quantize_exl3

    kept_bytes = sum(array.nbytes for _, array in kept_tensors(source, model, layers))
    parts.open(2 * sum(layer.nbytes for layer in layers.values()) + kept_bytes)
    bar = LoadBar(source.folder.name, verb="encod")
    try:
        return quantize_exl3(
            source, model, layers, rows, parts, config=config,
            progress=lambda done, total: bar.update(_PLAIN_BYTES * done, _PLAIN_BYTES * total),
        )  # fmt: skip
    except KeyboardInterrupt:
        message = "stopped; the layers that are done are kept, and the same command goes on from there"
        raise UserError(message, INTERRUPTED) from None
    finally:
        bar.close()


def _text(file: str | None) -> tuple[str, str]:
    """The calibration text and what to call it. Raises UserError."""
    if file is not None:
        try:
            return Path(file).expanduser().read_text(encoding="utf-8"), file
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--calibration {file} cannot be read as text: {error}", EXIT_USAGE) from None
    from deploy.demo.corpus import is_held_out, read_sources

    def is_wanted(name: str) -> bool:  # what the demo model is measured on stays out
        return not is_held_out(name) and zlib.crc32(name.encode()) % _ONE_FILE_IN == 0

    sources = read_sources(Path(sysconfig.get_paths()["stdlib"]), is_wanted)
    return "\n".join(sources.values()), "the library of this Python"


def _digest(folder: Path, headers: Any) -> str:
    """Of the source's files by name, size and time: a run goes on only with the same ones."""
    files = sorted({header.file for header in headers.values()})
    seen = [(name, (folder / name).stat().st_size, (folder / name).stat().st_mtime_ns) for name in files]
    return f"{zlib.crc32(repr(seen).encode()):08x}"


if __name__ == "__main__":
    sys.exit(main())
