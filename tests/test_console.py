"""Lines on standard error that nobody may be able to take."""

from __future__ import annotations

import io
import os

import pytest

from cluster.console import look_of, say, show_anything


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


class Terminal(io.TextIOWrapper):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("encoding", "environment", "look"),
    [
        ("utf-8", {}, (True, True)),
        ("UTF8", {"NO_COLOR": "1"}, (True, False)),
        ("utf-8", {"TERM": "dumb"}, (True, False)),
        ("ascii", {"NO_COLOR": ""}, (False, True)),
        ("latin-1", {}, (False, True)),
    ],
)
def test_a_terminal_gets_what_it_can_show(
    encoding: str, environment: dict[str, str], look: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    found = look_of(Terminal(io.BytesIO(), encoding=encoding))
    assert (found.is_unicode, found.is_color) == look
    assert not look_of(io.TextIOWrapper(io.BytesIO(), encoding=encoding)).is_color


def test_what_an_encoding_lacks_is_escaped() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    show_anything(stream)
    stream.write("m\u00fc")
    stream.flush()
    assert raw.getvalue() == rb"m\xfc"
