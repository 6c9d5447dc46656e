from __future__ import annotations

import io

import pytest

from cluster import load_bar
from cluster.load_bar import LoadBar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run(stream: io.StringIO, steps: int = 20) -> str:
    bar = LoadBar("mini1", stream)
    for i in range(steps + 1):
        bar.update(i * 10**8, steps * 10**8)
    return stream.getvalue()


def test_a_short_load_shows_nothing() -> None:
    assert run(io.StringIO()) == ""
    assert run(Terminal()) == ""


def test_a_file_gets_a_line_for_each_tenth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_bar, "MIN_SECONDS", 0.0)
    lines = run(io.StringIO()).splitlines()
    assert lines[0] == "[mini1] loaded 0.20 of 2.00 GB"
    assert lines[-1] == "[mini1] loaded 2.00 of 2.00 GB"
    assert len(lines) == 10


def test_a_terminal_gets_a_bar_that_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_bar, "MIN_SECONDS", 0.0)
    text = run(Terminal())
    assert "[mini1] loading" in text
    assert "2.0/2.0 GB" in text


def test_a_second_load_starts_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_bar, "MIN_SECONDS", 0.0)
    stream = io.StringIO()
    bar = LoadBar("n", stream)
    for _ in range(2):
        bar.update(0, 10)
        bar.update(10, 10)
    assert stream.getvalue().count("loaded 10 of 10 B") == 2


def test_a_fetch_says_that_it_is_one_and_may_begin_in_the_middle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_bar, "MIN_SECONDS", 0.0)
    stream = io.StringIO()
    bar = LoadBar("n", stream, verb="fetch")
    bar.update(5 * 10**8, 10**9)
    bar.update(10**9, 10**9)
    assert stream.getvalue().splitlines() == ["[n] fetched 0.50 of 1.00 GB", "[n] fetched 1.00 of 1.00 GB"]


@pytest.mark.parametrize("kind", [io.StringIO, Terminal])
def test_a_stream_that_is_gone_stops_no_load(
    monkeypatch: pytest.MonkeyPatch, kind: type[io.StringIO]
) -> None:
    monkeypatch.setattr(load_bar, "MIN_SECONDS", 0.0)
    stream = kind()
    bar = LoadBar("mini1", stream)
    bar.update(0, 10)
    stream.close()
    bar.update(5, 10)
    bar.update(10, 10)
