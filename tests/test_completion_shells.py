"""The completion scripts in real bash, zsh and fish: on a terminal, with Tab."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from deploy import cli
from tests.terminal import Terminal, on_terminal

pytestmark = pytest.mark.long
CASES = [
    ("stat", "status"),
    ("plan --strat", "plan --strategy"),
    ("plan --strategy b", "plan --strategy balanced"),
    ("completion z", "completion zsh"),
    ("plan --config clu", "plan --config cluster.json"),
    ("serve --config clu", "serve --config cluster.json"),
    ("serve mod", "serve model-folder/"),
    ("chat --load clu", "chat --load cluster.json"),
    ("models re", "models remove"),
    ("certs sh", "certs show"),
    ("service ins", "service install"),
    ("service install --ra", "service install --rank"),
]
START = {
    "bash": (["--norc", "-i"], "source ./macrame"),
    "zsh": (["-f", "-i"], "fpath=($PWD $fpath); autoload -U compinit; compinit -u -d $PWD/dump"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With something to complete."""
    (tmp_path / "cluster.json").touch()
    (tmp_path / "model-folder").mkdir()
    return tmp_path


def write_script(shell: str, path: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    with path.open("w") as file:
        subprocess.run([sys.executable, "-m", "deploy.cli", "completion", shell], stdout=file, check=True)


@pytest.mark.parametrize("shell", START)
def test_tab_completes(shell: str, folder: Path) -> None:
    write_script(shell, folder / ("_macrame" if shell == "zsh" else "macrame"))
    arguments, setup = START[shell]
    with on_terminal(["/usr/bin/env", shell, *arguments], env={"PS1": "$ "}, folder=folder) as terminal:
        terminal.expect("$ ")
        terminal.say(f"{setup}; echo it is re''ady")
        terminal.expect("it is ready")
        for typed, completed in CASES:
            terminal.expect("$ ")
            terminal.type(f"macrame {typed}\t")
            terminal.expect(f"macrame {completed}")
            _drop_line(terminal)
        terminal.expect("$ ")
        terminal.type("macrame \t\t")
        for _ in range(2):  # what was typed, and again below the list
            terminal.expect("macrame ")
        assert all(command in terminal.seen for command in cli.COMMANDS)


def _drop_line(terminal: Terminal) -> None:
    terminal.type("\x15")  # Ctrl-U: nothing of it is run
    terminal.say("echo d''one")
    terminal.expect("done")


def test_fish_completes(folder: Path) -> None:
    write_script("fish", folder / "macrame.fish")
    lines = [f"macrame {typed}" for typed, _ in CASES] + ["macrame "]
    ask = "; ".join(f"echo '== {line}'; complete -C '{line}'" for line in lines)
    result = subprocess.run(
        ["fish", "--no-config", "-c", f"source macrame.fish; {ask}"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stderr == ""
    answers = [part.splitlines() for part in result.stdout.split("== ")[1:]]
    offered = [[line.partition("\t")[0] for line in answer[1:]] for answer in answers]
    for (_, completed), words in zip(CASES, offered, strict=False):
        assert words == [completed.rpartition(" ")[2]]
    assert set(offered[-1]) >= set(cli.COMMANDS)
