"""`macrame doctor`: what is wrong with this machine, or with all of a running ring, and what mends it.

Imports nothing of ours that needs `proto` or `planner` before it knows that these are ours. One thread, but
for asking the nodes, which a pool does.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from cluster.arguments import Parser
from cluster.console import as_word
from cluster.diagnosis import Finding
from cluster.errors import EXIT_ERROR, EXIT_OK, EXIT_USAGE, UserError
from cluster.ours import hidden_packages
from deploy.command import run_command
from deploy.doctor_report import HERE, Report, Told, as_json, as_text, gather

EXAMPLES = (
    ("macrame doctor", "this machine alone"),
    (
        "macrame doctor --config cluster.json",
        "and its part of the cluster: ports, firewall, model, memory",
    ),
    (
        "macrame doctor --all --config cluster.json",
        "and every node of the running ring, compared with each other",
    ),
    ('macrame doctor --explain "No route to host"', "what a sentence of a log means"),
    ("macrame doctor --explain - < node-1.log", "the known sentences of a whole log"),
)


def main(argv: list[str] | None = None) -> int:
    """Exit code 0 where nothing was found, 1 where something was, 3 for what cannot be asked."""
    args = _parse(argv)
    return run_command("macrame doctor", lambda: _run(args), is_verbose=args.verbose)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="macrame doctor",
        description="Find what keeps this machine, or a ring, from working: what, why it matters, what mends "
        "it. Changes nothing. Where something is found, an error or a warning, it ends with exit code 1.",
        examples=EXAMPLES,
    )
    parser.add_argument("--config", type=Path, help="the cluster's JSON or YAML file")
    parser.add_argument("--model", help="as the nodes were started with")
    parser.add_argument("--all", action="store_true", help="ask every node of the config too")
    parser.add_argument("--explain", metavar="TEXT", help="explain what TEXT says; -: standard input")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--verbose", action="store_true", help="show tracebacks")
    args = parser.parse_args(argv)
    if args.all and args.config is None:
        parser.error("--all asks the nodes of a cluster file: add --config")
    if args.explain is not None and args.all:
        parser.error("--explain asks no node: leave out --all")
    return args


def _run(args: argparse.Namespace) -> int:
    if args.explain is not None:
        return _explain(args.explain, is_json=args.json)
    report, code = _examine(args)
    print(as_json(report) if args.json else as_text(report))
    return code or (EXIT_ERROR if report.num_wrong else EXIT_OK)


def _examine(args: argparse.Namespace) -> tuple[Report, int]:
    """The report, and the exit code of a config that cannot be used, else 0."""
    if hidden_packages():
        from cluster.diagnosis import Subject
        from cluster.diagnosis_software import without_packages

        return Report(gather([(HERE, without_packages(Subject()))])), 0
    from cluster.logs import LogChoices, Logs  # from here on, our own packages are ours

    logs = Logs(LogChoices(level=logging.ERROR), 0)  # what nodes warn of is a finding here
    logs.begin()
    try:
        return _examine_with(args)
    finally:
        logs.end()


def _examine_with(args: argparse.Namespace) -> tuple[Report, int]:
    """The same, once our own packages are known to be ours."""
    from deploy.doctor_machine import Machine

    machine, code, found = Machine(), EXIT_OK, list[Finding]()
    if args.config is not None:
        try:
            machine = Machine.of(args.config, args.model)
        except UserError as error:  # the rest can be looked at all the same
            found, code = [_bad_config(str(error), args.config)], EXIT_USAGE
            machine = Machine(why_no_config="needs a config that can be used")
    with _Progress() as progress:
        if not args.all or machine.config is None:
            found += machine.diagnose(progress.show)
            return Report(gather([(HERE, found)])), code
        from deploy.doctor_ring import examine_ring

        found += machine.diagnose(progress.show, without=("reach", "clock"))  # the nodes tell
        found = [finding for finding in found if finding.check != "config"]  # as compared, below
        ring = examine_ring(machine.config, machine.ring_credentials(), progress.show)
    return Report(gather([("", ring.findings), (HERE, found), *ring.told]), ring.nodes), code


def _bad_config(sentence: str, path: Path) -> Finding:
    return Finding(
        "config",
        "error",
        sentence,
        "no node starts with this file",
        f"$EDITOR {as_word(path)}    # then macrame doctor --config {as_word(path)} again",
    )


def _explain(text: str, *, is_json: bool) -> int:
    if hidden_packages():
        raise UserError(hidden_packages()[0], EXIT_ERROR)
    from cluster.diagnosis_sentences import explain

    found = explain(sys.stdin.read() if text == "-" else text)
    report = Report(tuple(Told(finding, ()) for finding in found))
    if is_json:
        print(as_json(report))
    elif found:
        print(as_text(report, is_counted=False))
    else:
        print("macrame doctor knows no sentence in that text")
    return EXIT_OK if found else EXIT_ERROR


class _Progress:
    """On a terminal, one line on standard error that says what is looked at; nothing elsewhere."""

    def __init__(self) -> None:
        self._is_shown = sys.stderr.isatty()

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._write("")

    def show(self, what: str) -> None:
        """Replaces the line."""
        self._write(f"looking at {what} ...")

    def _write(self, text: str) -> None:
        if self._is_shown:
            print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
