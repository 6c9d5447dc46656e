"""`macrame completion SHELL`: a script that lets a shell complete commands, options and files.

It is made from the parsers that the commands themselves use, so it imports all of them. One thread.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

import shtab

from cluster.arguments import Parser, parser_of
from cluster.errors import EXIT_OK
from deploy.command import run_command

SHELLS = ("bash", "zsh", "fish")


def main(argv: list[str] | None = None) -> int:
    """Prints the script; returns the exit code."""
    parser = Parser(
        prog="macrame completion",
        description="Print a script that lets your shell complete macrame's commands, options and files.",
        examples=(
            (
                "macrame completion bash > ~/.local/share/bash-completion/completions/macrame",
                "bash, with the package bash-completion; make the folder first (mkdir -p)",
            ),
            (
                "macrame completion zsh > ~/.zfunc/_macrame",
                "zsh, with 'fpath+=~/.zfunc' before 'autoload -U compinit; compinit' in ~/.zshrc",
            ),
            ("macrame completion fish > ~/.config/fish/completions/macrame.fish", "fish"),
        ),
    )
    parser.add_argument("shell", choices=SHELLS, help="for which shell")
    parser.add_argument("--verbose", action="store_true", help="show tracebacks")
    args = parser.parse_args(argv)
    return run_command("macrame completion", lambda: _print(args.shell), is_verbose=args.verbose)


def _print(shell: str) -> int:
    print(shtab.complete(whole_parser(), shell=shell))
    return EXIT_OK


def whole_parser() -> argparse.ArgumentParser:
    """One parser of `macrame` with every command's own one below it."""
    from deploy.cli import COMMANDS  # which imports commands by name only

    whole = argparse.ArgumentParser(prog="macrame", description="Many Macs, one model.")
    whole.add_argument("--version", action="store_true", help="print the version and end")
    commands = whole.add_subparsers(dest="command", metavar="COMMAND")
    for name, (module, text) in COMMANDS.items():
        parser = parser_of(importlib.import_module(module).main)
        _complete_files(parser)
        commands.add_parser(
            name, help=text.replace("%", "%%"), description=text, parents=[parser], add_help=False
        )
    return whole


def _complete_files(parser: argparse.ArgumentParser) -> None:
    """What takes a path completes names of files; what takes a model, which may be a folder, of folders."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                _complete_files(inner)
        elif action.type is Path:
            action.complete = shtab.FILE  # type: ignore[attr-defined]  # shtab's own way of telling it
        elif action.dest == "model" and "folder" in (action.help or ""):
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]


if __name__ == "__main__":
    sys.exit(main())
