"""`macrame kernels`: are the kernels for experts and EXL3 right on this machine, and how fast are they.

The main thread owns MLX here. Progress goes to standard error, tables or the JSON object to standard output.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from cluster.arguments import Parser
from cluster.console import say
from cluster.errors import EXIT_ERROR, EXIT_OK, EXIT_USAGE, UserError
from cluster.probe import seen_machine
from deploy.command import run_command
from deploy.kernels_text import Result, results_text

if TYPE_CHECKING:
    from deploy.kernel_forms import Form, MatrixForm
    from kernels.self_test import Trial
    from kernels.verdicts import Machine

MODELS = ("qwen3-30b-a3b", "glm-4.7-flash", "nemotron-3-nano")
EXL3_BLOCKS = ("qwen3-8b-exl3", "qwen3-30b-a3b-exl3")
FORMATS = (
    "affine2",
    "affine3",
    "affine4",
    "affine5",
    "affine6",
    "affine8",
    "mxfp4",
    "mxfp8",
    "nvfp4",
    "plain",
)
FORMAT, GROUP_SIZE, BITS, DTYPE = "affine4", 64, 3, "bfloat16"  # of a known block where nothing is said
EMULATED_EXPERTS = 16
MEMORY_PARTS = 3  # a layer takes no more of the available memory than one of these


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, or 1 where a kernel is wrong, or none can run."""
    args = _parser().parse_args(argv)
    return run_command("macrame kernels", lambda: _run(args), is_verbose=args.verbose)


def _parser() -> Parser:
    parser = Parser(
        prog="macrame kernels",
        description="Compare this machine's kernels for expert layers and EXL3 matrices with the reference, "
        "and time them against MLX's operations. Run it while nothing else runs.",
        examples=(
            ("macrame kernels", "the known blocks in 4 bits, at all sizes that a node tests"),
            ("macrame kernels --model mlx-community/Qwen3-30B-A3B-4bit --json", "a model's own blocks"),
            ("macrame kernels --block qwen3-8b-exl3 --bits 4", "the matrices of a known model in EXL3"),
            ("macrame kernels --emulate", "on a machine without a GPU: only whether they are right"),
        ),
    )
    what = parser.add_mutually_exclusive_group()
    blocks = (*MODELS, *EXL3_BLOCKS)
    what.add_argument("--block", choices=blocks, action="append", help="a known block; may be repeated")
    what.add_argument("--model", metavar="DIR_OR_ID", help="those of a folder's or a hub's model")
    parser.add_argument("--format", choices=FORMATS, help=f"of a known block ({FORMAT})")
    parser.add_argument(
        "--group-size", type=int, choices=(32, 64, 128), help=f"of a known block in affine ({GROUP_SIZE})"
    )
    parser.add_argument(
        "--bits", type=int, choices=range(1, 9), metavar="N", help=f"of a known EXL3 block, 1 to 8 ({BITS})"
    )
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), help=f"of a known block ({DTYPE})"
    )
    parser.add_argument("--tokens", type=_sizes, metavar="N,N", help="numbers of tokens instead of all")
    parser.add_argument(
        "--emulate", action="store_true", help="on the CPU, thread by thread: right or wrong, no times"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--verbose", action="store_true", help="show tracebacks")
    return parser


def _sizes(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.isdecimal() and 0 < int(part) <= 4096 for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} must be numbers from 1 to 4096, such as 1,8")
    return sorted({int(part) for part in parts})


def _run(args: argparse.Namespace) -> int:
    from kernels import wanted

    _check_options(args)
    if args.emulate:
        os.environ[wanted.VARIABLE] = "emulate"
    where = _backend()
    started = time.monotonic()

    def progress(line: str) -> None:
        say(f"macrame kernels: {time.monotonic() - started:5.1f} s  {line}")

    results = [_try(form, where, args.tokens, progress) for form in _forms(args, where)]
    from kernels.verdicts import this_machine

    machine = this_machine(where)
    if args.json:
        print(json.dumps(_object(machine, results, time.monotonic() - started), indent=2))
    else:
        print(results_text(machine, results))
    return EXIT_ERROR if any(t.failure for result in results for t in result.trials) else EXIT_OK


def _check_options(args: argparse.Namespace) -> None:
    """Raises UserError for an option that would change nothing."""
    for option in ("format", "group_size", "bits", "dtype"):
        if args.model is not None and getattr(args, option) is not None:
            name = "--" + option.replace("_", "-")
            raise UserError(
                f"{name} is of a known block (--block): the model of --model has its own, leave {name} out",
                EXIT_USAGE,
            )
    asked = {*(args.block or MODELS)}
    if args.bits is not None and not asked & {*EXL3_BLOCKS}:
        raise UserError(f"--bits is of a known EXL3 block: add --block {EXL3_BLOCKS[0]}", EXIT_USAGE)
    if (args.format or args.group_size) is not None and asked <= {*EXL3_BLOCKS}:
        raise UserError("--format and --group-size are of a block of experts: EXL3 has --bits", EXIT_USAGE)
    if args.group_size is not None and not (args.format or FORMAT).startswith("affine"):
        raise UserError(f"--group-size goes with affine: {args.format} has none to choose", EXIT_USAGE)


def _backend() -> str:
    """Raises UserError where the kernels cannot run."""
    from kernels import backend, wanted
    from kernels.emulator import build

    try:
        where = backend.current()
    except ValueError as error:
        raise UserError(str(error), EXIT_USAGE) from None
    if where is None:
        why = (
            f"{wanted.VARIABLE} is off"
            if os.environ.get(wanted.VARIABLE) == "off"
            else "MLX uses no GPU here"
        )
        raise UserError(f"{why}: run macrame kernels --emulate to learn whether they are right", EXIT_ERROR)
    if where == "emulated":
        try:
            build.working_compiler()
        except build.EmulatorError as error:
            raise UserError(str(error), EXIT_ERROR) from None
    return where


def _forms(args: argparse.Namespace, where: str) -> list[Form | MatrixForm]:
    from deploy.kernel_forms import format_of, forms_of_model, known_forms, known_matrices

    forms: list[Form | MatrixForm] = []
    if args.model is not None:
        forms = forms_of_model(args.model)
    else:
        form, dtype = format_of(args.format or FORMAT, args.group_size or GROUP_SIZE), args.dtype or DTYPE
        for name in args.block or MODELS:
            is_exl3 = name in EXL3_BLOCKS
            forms += known_matrices(name, args.bits or BITS, dtype) if is_exl3 else []
            forms += [] if is_exl3 else known_forms(name, form, dtype)
    if where == "emulated":
        return [form.with_few_experts(EMULATED_EXPERTS) for form in forms]
    node = seen_machine()
    most_bytes = (node.available_bytes or node.memory_bytes) // MEMORY_PARTS
    return [form.with_few_experts(most_bytes // form.expert_bytes) for form in forms]


def _try(
    form: Form | MatrixForm, where: str, asked: list[int] | None, progress: Callable[[str], None]
) -> Result:
    from kernels.measure import CACHE_BYTES
    from kernels.self_test import decide, sizes_of, try_size

    is_timed = where != "emulated"
    progress(f"{form.name}: random weights")
    made = form.subject(lambda layer_bytes: -(-CACHE_BYTES // (2 * layer_bytes)) if is_timed else 1)
    subject = made.subject
    classes = [ends for ends in subject.classes if subject.has_kernels(ends[0])]
    every = sorted({size for ends in classes for size in sizes_of(*ends, is_timed=is_timed)})
    trials = []
    for size in asked or (every if is_timed else made.emulated_tokens):
        progress(f"{form.name}: {size} tokens")
        trials.append(try_size(subject, size, is_timed=is_timed))
    by_size = {trial.num_tokens: trial for trial in trials}
    verdicts = [
        decide(*ends, [by_size[size] for size in sizes])
        for ends in classes
        if by_size.keys() >= {*(sizes := sizes_of(*ends, is_timed=is_timed))}
    ]
    return Result(form, subject.name, made.layer_bytes, made.num_layers, trials, verdicts)


def _object(machine: Machine, results: list[Result], took_s: float) -> dict[str, Any]:
    return {
        "machine": asdict(machine),
        "is_timed": machine.backend != "emulated",
        "blocks": [
            {
                "name": result.form.name,
                "block": result.name,
                "layer_bytes": result.layer_bytes,
                "num_layers": result.num_layers,
                "trials": [_trial(trial) for trial in result.trials],
                "verdicts": [asdict(one) for one in result.verdicts],
            }
            for result in results
        ],
        "took_s": round(took_s, 2),
    }


def _trial(trial: Trial) -> dict[str, Any]:
    times = trial.times
    return {
        "tokens": trial.num_tokens,
        "error": trial.error,
        "launches": trial.num_launches,
        "failure": trial.failure,
        "kernels_us": None if times is None else times.ours_us,
        "mlx_us": None if times is None else times.mlx_us,
        "ratio": None if times is None else times.ratio,
        "kernels_eval_us": None if times is None else times.ours_eval_us,
        "mlx_eval_us": None if times is None else times.mlx_eval_us,
        "needed_bytes": None if times is None else times.needed_bytes,
        "gb_s": None if times is None else times.gb_s,
    }


if __name__ == "__main__":
    sys.exit(main())
