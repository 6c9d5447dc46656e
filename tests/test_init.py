"""`macrame init`: with arguments, asked on a real terminal, and over a real sshd."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from cluster.announce import Heard
from cluster.config import load_config
from deploy import init_ask
from deploy.init import main
from deploy.init_ask import hear_machines
from tests.ssh_host import SshHost, ssh_host

MODEL = "org/name"
START = """
import sys
import deploy.init_ask
deploy.init_ask.LISTEN_S = 0.01
from deploy.init import main
sys.exit(main(sys.argv[1:]))
"""


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = main([*map(str, words)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_one_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "cluster.json"
    code, out, _ = run(capsys, "--host", "localhost", "--model", MODEL, "-o", path)
    assert code == 0
    assert f"Wrote {path}. Now see the plan, and start it:\n    plan-dry-run --config {path}\n" in out
    assert out.endswith(f"    macrame up --config {path}\n")
    (node,) = load_config(path).nodes
    assert (node.host, node.memory_gb is not None) == ("127.0.0.1", True)
    before = path.read_text()
    code, _, err = run(capsys, "--host", "localhost", "--model", "other/name", "-o", path)
    assert (code, path.read_text()) == (3, before)
    assert err == (
        f"macrame init: {path} is there already: --force writes over it, --output FILE writes another\n"
    )
    words = ("--host", "localhost", "--model", "other/name", "-o", path, "--force", "--json")
    code, out, _ = run(capsys, *words)
    assert (code, load_config(path).model) == (0, "other/name")
    told = json.loads(out)
    assert (told["file"], told["machines"][0]["destination"]) == (str(path), None)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "standard input is no terminal to ask at: give --host"),
        (("--host", "localhost"), "standard input is no terminal to ask at: give --model"),
        (("--host", "localhost", "--model", "/no/such"), "/no/such is neither a folder here nor"),
        (("--host", "-x;y@z", "--model", MODEL), "is no host for ssh"),
    ],
)
def test_what_is_refused(
    words: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (tmp_path / "empty").open("w+") as empty, pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdin", empty)
        try:
            code = main([*(word.replace("-x", "x", 1) for word in words), "-o", str(tmp_path / "c.json")])
        except SystemExit as ended:
            code = int(str(ended.code))
    assert code == 3
    assert message in capsys.readouterr().err
    assert not (tmp_path / "c.json").exists()


@dataclass
class Terminal:
    """A process with a terminal of its own, and what it has shown there."""

    process: subprocess.Popen[bytes]
    end: int
    shown: str = ""
    _read: int = field(default=0)

    def until(self, text: str) -> None:
        """Reads until the text has come since the last time."""
        while text not in self.shown[self._read :]:
            try:
                data = os.read(self.end, 4096)
            except OSError:  # the terminal's other end is closed
                data = b""
            assert data, f"it ended before it said {text!r}:\n{self.shown}"
            self.shown += data.decode()
        self._read = self.shown.index(text, self._read) + len(text)

    def type(self, line: str) -> None:
        os.write(self.end, line.encode())


@contextlib.contextmanager
def on_a_terminal(folder: Path, *words: str) -> Iterator[Terminal]:
    end, other = pty.openpty()
    command = [sys.executable, "-c", START, *words]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    with subprocess.Popen(
        command, stdin=other, stdout=other, stderr=other, cwd=folder, env=environment, start_new_session=True
    ) as process:
        os.close(other)
        try:
            yield Terminal(process, end)
        finally:
            process.kill()
    os.close(end)


def test_it_asks_on_a_terminal(tmp_path: Path) -> None:
    with on_a_terminal(tmp_path) as terminal:
        terminal.until("to be a node? [yes] ")
        terminal.type("maybe\n")
        terminal.until("to be a node? [yes] ")
        terminal.type("\n")
        terminal.until("empty: none: ")
        terminal.type("nowhere.invalid\n")
        terminal.until("the name of nowhere.invalid is not known here")
        terminal.until("nowhere.invalid: try again, leave it out, or stop? [try] ")
        terminal.type("l\n")
        terminal.until("or a folder: [mlx-community/Qwen3-1.7B-8bit] ")
        terminal.type("no model\n")
        terminal.until("no model is neither a folder here nor a Hugging Face id")
        terminal.until("or a folder: [mlx-community/Qwen3-1.7B-8bit] ")
        terminal.type("\n")
        terminal.until("Write cluster.json? [yes] ")
        assert not (tmp_path / "cluster.json").exists()
        terminal.type("y\n")
        terminal.until("macrame up --config cluster.json")
        assert terminal.process.wait(10.0) == 0
    config = load_config(tmp_path / "cluster.json")
    assert (config.model, len(config.nodes)) == ("mlx-community/Qwen3-1.7B-8bit", 1)


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("\x04", "there was no answer, and nothing was written"),
        ("no\n\n", "a cluster needs at least one machine"),
    ],
)
def test_an_end_without_answers_writes_nothing(tmp_path: Path, typed: str, message: str) -> None:
    with on_a_terminal(tmp_path, "--model", MODEL) as terminal:
        terminal.until("to be a node? [yes] ")
        terminal.type(typed)
        terminal.until(message)
        assert terminal.process.wait(10.0) == 3
    assert list(tmp_path.iterdir()) == []


def test_what_is_heard_is_a_choice_of_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    def heard(kind: str, host: str) -> Heard:
        return Heard(kind, "x", host, ("10.0.0.1",), 22, chip="Apple M4" if kind == "node" else "")

    told = [heard("node", "mini2.local"), heard("ssh", "mini2.local"), heard("ssh", "localhost")]
    told += [heard("ssh", "-oProxyCommand=x y"), heard("ssh", "")]
    monkeypatch.setattr(init_ask, "listen", lambda seconds, with_ssh: told)
    assert [(one.host, one.chip) for one in hear_machines()] == [("mini2.local", "Apple M4")]

    def deaf(seconds: float, with_ssh: bool) -> list[Heard]:
        raise OSError(65, "No route to host")

    monkeypatch.setattr(init_ask, "listen", deaf)
    assert hear_machines() == []


@pytest.fixture
def box(tmp_path: Path) -> Iterator[SshHost]:
    folder = tmp_path / "ssh"
    folder.mkdir()
    with ssh_host(folder) as host:
        yield host


@pytest.mark.long
def test_a_machine_over_ssh(box: SshHost, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "cluster.json"
    words = ("--host", "box", "localhost", "--ssh-config", box.client_config, "--model", MODEL, "-o", path)
    code, out, err = run(capsys, *words)
    assert code == 0, err
    config = load_config(path)
    assert [(node.host, node.port) for node in config.nodes] == [("127.0.0.1", 50051), ("127.0.0.1", 50052)]
    first, second = (node.name for node in config.nodes)
    assert second == f"{first}-2"
    assert f"macrame up --config {path} --ssh --ssh-to {second}=box --ssh-config {box.client_config}\n" in out
    assert out.endswith("'macrame up' makes certificates for the nodes when it starts them the first time.\n")
    assert not list(box.home.iterdir())  # nothing was left there


@pytest.mark.long
def test_two_names_of_one_machine_are_told(
    box: SshHost, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    box.client_config.write_text(box.client_config.read_text().replace("Host box", "Host box again"))
    path = tmp_path / "cluster.json"
    code, _, err = run(
        capsys, "--host", "box", "again", "--ssh-config", box.client_config, "--model", MODEL, "-o", path
    )
    assert code == 0
    assert "look like one machine, whose memory would count twice" in err
    assert "This machine is none of the nodes; --host localhost makes it one." in err


@pytest.mark.long
def test_machines_that_cannot_be_reached_are_all_named(
    box: SshHost, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    box.known_hosts.write_text("")
    path = tmp_path / "cluster.json"
    words = ("--ssh-config", box.client_config, "--model", MODEL, "-o", path)
    with (tmp_path / "empty").open("w+") as empty, pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdin", empty)
        code, _, err = run(capsys, "--host", "box", "nowhere.invalid", "localhost", *words)
    assert code == 4
    assert "nowhere.invalid" in err.splitlines()[-1]
    assert "box" in err.splitlines()[-1]
    assert not path.exists()
