"""The border of every command: one sentence, the right exit code, and quiet where nobody reads."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.errors import EXIT_UNREACHABLE, UserError
from deploy.command import run_command


def failing(error: BaseException) -> Callable[[], int]:
    def command() -> int:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UserError("it is not there", EXIT_UNREACHABLE), 4, "macrame x: it is not there\n"),
        (KeyboardInterrupt(), 130, ""),
        (BrokenPipeError(), 1, ""),
        (
            ZeroDivisionError("oh"),
            1,
            "macrame x: ZeroDivisionError: oh; --verbose shows where, please report it\n",
        ),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            1,
            "macrame x: No space left on device: "
            "make room where the output or the files of this command go\n",
        ),
    ],
)
def test_every_failure_is_a_sentence_and_a_code(
    error: BaseException, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command("macrame x", failing(error), is_verbose=False) == code
    assert capsys.readouterr() == ("", said)


def test_verbose_shows_where(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("macrame x", failing(UserError("oh")), is_verbose=True) == 1
    assert "Traceback" in capsys.readouterr().err


PRINTING = (
    "import sys; from deploy.command import run_command; "
    "sys.exit(run_command('x', lambda: {}, is_verbose=False))"
)


def run(what: str, output: int | None) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    return subprocess.run(
        [sys.executable, "-c", PRINTING.format(what)],
        stdout=output,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        check=False,
        preexec_fn=(lambda: os.close(1)) if output is None else None,
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("what", ["print(1) or 0", "print(1, flush=True) or 0"])
def test_a_full_disk_behind_standard_output_is_a_sentence(what: str) -> None:
    with open("/dev/full", "w") as full:
        result = run(what, full.fileno())
    assert (result.returncode, result.stderr) == (
        1,
        "x: standard output cannot be written: No space left on device\n",
    )


def test_a_reader_that_left_and_a_closed_output_are_no_traceback() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    left = run("print(1) or 0", writer)
    os.close(writer)
    assert (left.returncode, left.stderr) == (1, "")
    closed = run("print(1) or 0", None)
    assert (closed.returncode, closed.stderr) == (0, "")
