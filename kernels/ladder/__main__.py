"""The ladder that every kernel climbs before a Mac sees it: python -m kernels.ladder RUNG.

docs/kernels.md says what each rung shows. Exits with 1 where a case fails, 0 where all pass or where the rung
needs what is not here, which is said.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import version

import mlx.core as mx

from kernels import backend, cuda_text
from kernels.emulator import build
from kernels.ladder import address_spaces, cuda_compiler, emulation, golden, gpu
from kernels.ladder.case import Case
from kernels.ladder.cases import all_cases
from kernels.ladder.tracing import traced
from kernels.source import Call


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m kernels.ladder", description=(__doc__ or "").split("\n")[0]
    )
    rungs = parser.add_subparsers(dest="rung", required=True)
    for name, said in (
        ("golden", "the generated Metal source is the one in tests/golden_msl"),
        ("spaces", "clang finds Metal's address spaces right"),
        ("emulate", "the generated source, thread by thread on this CPU, against the reference"),
        ("cuda", "the same bodies compile as CUDA"),
        ("gpu", "all cases on this machine's GPU, Metal or CUDA"),
    ):
        rung = rungs.add_parser(name, help=said, description=said)
        if name != "golden":
            rung.add_argument("--only", default="", metavar="TEXT", help="cases whose name has this in it")
            rung.add_argument(
                "--part",
                type=_part,
                default=(1, 1),
                metavar="I/N",
                help="the Ith of N parts of them, so that N processes share the work",
            )
        if name == "golden":
            rung.add_argument("--write", action="store_true", help="write the files as MLX makes them now")
        if name == "emulate":
            rung.add_argument("--short", action="store_true", help="the cases that each push is checked with")
            rung.add_argument("--sanitizer", choices=("address", "thread"), help="with this sanitizer")
            # given by the process that loads the sanitizer
            rung.add_argument("--inside", choices=("address", "thread"), help=argparse.SUPPRESS)
        if name == "gpu":
            rung.add_argument("--small", action="store_true", help="without the sizes of real models")
    given = parser.parse_args(arguments)
    cases = all_cases()
    if given.rung != "golden":
        cases = [case for case in cases if given.only in case.name]
        if not cases:
            return _fail(f"No case has {given.only!r} in its name.")
        cases = _dealt(_of_rung(given, cases), *given.part)
    run = {"golden": _golden, "spaces": _spaces, "emulate": _emulate, "cuda": _cuda, "gpu": _gpu}[given.rung]
    return run(given, cases)


def _part(text: str) -> tuple[int, int]:
    """I and N of "I/N". Raises argparse.ArgumentTypeError."""
    number, slash, parts = text.partition("/")
    if not (slash and number.isdecimal() and parts.isdecimal() and 1 <= int(number) <= int(parts)):
        raise argparse.ArgumentTypeError(f"{text!r} is no part: 2/8 is the second of eight")
    return int(number), int(parts)


def _of_rung(given: argparse.Namespace, cases: list[Case]) -> list[Case]:
    """Those that the rung runs."""
    if given.rung == "gpu":
        return [case for case in cases if not (given.small and case.is_full)]
    is_short = given.rung == "emulate" and given.short
    return [case for case in cases if not case.is_full and not (is_short and case.is_long)]


def _dealt(cases: list[Case], part: int, num_parts: int) -> list[Case]:
    """Every num_parts-th, so that each part has of the large and of the small; together they are all."""
    return cases[part - 1 :: num_parts]


def _golden(given: argparse.Namespace, cases: list[Case]) -> int:
    if given.write:
        print(f"{golden.write(cases)} files in {golden.FOLDER}")
        return 0
    if not golden.FOLDER.is_dir():
        return _skip("tests/golden_msl is part of a checkout, and this is none")
    said = golden.differences(cases)
    for line in said:
        print(line)
    if said:
        return _fail("Look at them; python -m kernels.ladder golden --write makes them the new ones.")
    print(f"{len(list(golden.FOLDER.glob('*.metal')))} sources are as committed")
    return 0


def _unique(cases: list[Case]) -> list[tuple[Case, Call, str]]:
    """Each source once, with the case that has it first."""
    found: dict[str, tuple[Case, Call, str]] = {}
    for case in cases:
        for call, text in traced(case):
            found.setdefault(text, (case, call, text))
    return list(found.values())


def _spaces(_given: argparse.Namespace, cases: list[Case]) -> int:
    if address_spaces.compiler() is None:
        return _skip("no clang that knows C++ for OpenCL is here (Debian: apt install clang-16)")
    sources = _unique(cases)
    troubles = [(case, said) for case, _, text in sources if (said := address_spaces.check(text))]
    for case, said in troubles:
        print(f"{case.name}:\n{said}")
    print(f"{len(sources) - len(troubles)} of {len(sources)} sources accepted by {address_spaces.compiler()}")
    return 1 if troubles else 0


def _emulate(given: argparse.Namespace, cases: list[Case]) -> int:
    if build.compiler() is None:
        return _skip("no C++ compiler (g++ or clang++) is here")
    if given.sanitizer:
        if emulation.runtime(given.sanitizer) is None:
            return _skip(f"no library of the {given.sanitizer} sanitizer (g++ on Linux has it)")
        short = ["--short"] if given.short else []
        part = "{}/{}".format(*given.part)
        done = emulation.sanitized(given.sanitizer, [*short, "--only", given.only, "--part", part])
        print(done.stdout, end="")
        print(done.stderr, end="", file=sys.stderr)
        return 1 if done.returncode else 0
    num_failed = 0
    for case in cases:
        result = emulation.emulate(case, given.inside or "watched")
        num_failed += bool(result.trouble)
        asked = "" if result.requested is None else f"  {result.requested:.2f} x its bytes"
        said = result.trouble or "ok"
        print(
            f"{case.name:48s} {result.num_launches} launches  error {result.error:.1e}{asked}  {said}",
            flush=True,
        )
    print(f"{len(cases) - num_failed} of {len(cases)} cases pass")
    return 1 if num_failed else 0


def _cuda(_given: argparse.Namespace, cases: list[Case]) -> int:
    tool = cuda_compiler.tool()
    if tool is None:
        return _skip("neither NVRTC (mlx[cuda13]) nor nvcc with its headers is here")
    sources = _unique(cases)
    num_failed = 0
    for case, call, _ in sources:
        kernel = call.kernel
        text = cuda_text.frame(
            kernel.name,
            cuda_text.header(kernel.header),
            cuda_text.body(kernel.body),
            inputs=call.inputs,
            outputs=call.outputs,
            template=call.template,
        )
        result = cuda_compiler.compiled(text)
        num_failed += bool(result.error)
        sizes = ""
        if result.num_registers is not None:
            sizes = f"{result.num_registers} registers, {result.spilled_bytes} bytes spilled, "
            sizes += f"{result.shared_bytes} bytes shared"
        print(f"{case.name:56s} {kernel.name:24s} {result.error or sizes or 'ok'}", flush=True)
    num_well = len(sources) - num_failed
    print(f"{num_well} of {len(sources)} sources compiled by {tool} for {cuda_compiler.ARCHITECTURE}")
    return 1 if num_failed else 0


def _gpu(given: argparse.Namespace, cases: list[Case]) -> int:
    where = backend.current()
    if where not in {"metal", "cuda"}:
        return _skip("MLX has no GPU here")
    print(f"{mx.device_info().get('device_name', where)}, MLX {version('mlx')}")
    num_failed = 0
    for case in cases:
        result = gpu.on_gpu(case)
        num_failed += bool(result.trouble)
        said = result.trouble or "ok"
        print(f"{case.name:48s} error {result.error:.1e}  {result.time_ms:8.3f} ms  {said}", flush=True)
    print(f"{len(cases) - num_failed} of {len(cases)} cases pass on {where}")
    return 1 if num_failed else 0


def _skip(reason: str) -> int:
    print(f"skipped: {reason}")
    return 0


def _fail(message: str) -> int:
    print(message, file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
