"""Lines on standard error that nobody may be able to take."""

from __future__ import annotations

import os

import pytest

from cluster.console import say


def test_a_line_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    say("ready")
    assert capsys.readouterr().err == "ready\n"


def test_a_line_that_nobody_reads_is_lost() -> None:
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as stream:
        os.close(reader)
        say("lost", stream)
        os.dup2(os.open(os.devnull, os.O_WRONLY), writer)  # what is buffered still has to go somewhere
    say("lost", stream)
