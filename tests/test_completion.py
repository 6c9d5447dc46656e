"""Every command's help reads as a short man page, and the shells complete what the parsers say."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.arguments import Parser, parser_of
from deploy import cli, completion
from deploy.demo.run import CONFIG

NAMES = {"node": "run_node", "plan": "plan-dry-run"}  # commands that have a name of their own besides
PRINTS_NO_DATA = {"node", "completion"}


def parser(command: str) -> Parser:
    return parser_of(importlib.import_module(cli.COMMANDS[command][0]).main)


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_is_a_short_man_page(command: str) -> None:
    text = parser(command).format_help()
    usage, description, *_ = text.split("\n\n")
    assert usage.startswith(f"usage: {NAMES.get(command, f'macrame {command}')}")
    assert len(description) > 60, "it says what the command does"
    examples = text.partition("\nexamples:\n")[2]
    assert f"  {NAMES.get(command, 'macrame')} " in examples or "  macrame " in examples
    assert text.endswith("exit codes: 0 fine, 1 failed, 2 does not fit, 3 usage or config, 4 not reachable\n")


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_option_has_a_help_text(command: str) -> None:
    def check(one: Parser) -> None:
        for action in one._actions:
            if isinstance(action.choices, dict):
                for inner in action.choices.values():
                    check(inner)
            elif action.option_strings and action.metavar != "N":
                assert action.help, action.option_strings

    check(parser(command))


@pytest.mark.parametrize("command", sorted(set(cli.COMMANDS) - PRINTS_NO_DATA))
def test_what_prints_has_json(command: str) -> None:
    assert "--json" in parser(command).format_help()


def test_a_main_without_a_parser_is_named() -> None:
    with pytest.raises(TypeError, match="main parses no arguments"):
        parser_of(lambda argv: 0)
    assert cli.main(["--version"]) == 0, "asking for parsers leaves them as they were"


def complete(script: Path, folder: Path, *words: str) -> list[str]:
    """What bash offers for the last of the words."""
    driver = (
        '. "$1"; shift; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); '
        '_shtab_macrame; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    result = subprocess.run(
        ["bash", "-c", driver, "bash", str(script), "macrame", *words],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    return result.stdout.split()


def test_bash_completes_commands_options_values_and_files(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "deploy.cli", "completion", "bash"], capture_output=True, text=True, check=True
    )
    script = tmp_path / "macrame"
    script.write_text(result.stdout)
    folder = CONFIG.parent
    assert set(complete(script, folder, "")) >= set(cli.COMMANDS)
    assert complete(script, folder, "stat") == ["status"]
    assert complete(script, folder, "plan", "--strat") == ["--strategy"]
    assert complete(script, folder, "plan", "--strategy", "b") == ["balanced"]
    assert complete(script, folder, "completion", "z") == ["zsh"]
    assert complete(script, folder, "plan", "--config", "clu") == ["cluster.json"]


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_get_a_script_that_they_can_read(
    shell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert completion.main([shell]) == 0
    text = capsys.readouterr().out
    assert all(command in text for command in cli.COMMANDS)
    if shutil.which(shell):  # the shell's own word
        script = tmp_path / "macrame"
        script.write_text(text)
        subprocess.run([shell, "-n", str(script)], check=True)


def test_an_unknown_shell_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        completion.main(["csh"])
    assert ended.value.code == 3
    assert "macrame completion: argument shell: invalid choice: 'csh'" in capsys.readouterr().err
