"""What people see of a trace: tables, notes, the picture, and refusals in words."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.api.errors import ApiError
from cluster.api.tracing import Tracer
from cluster.config import load_config
from cluster.errors import EXIT_UNREACHABLE, EXIT_USAGE
from cluster.tls import Credentials
from cluster.trace_file import trace_file
from cluster.trace_plot import draw_trace
from deploy import profile, trace
from deploy.profile_memory import render as render_memory
from deploy.trace_text import render
from tests.ring_processes import free_ports
from tests.test_trace_spans import answered, records


def found(**changes: Any) -> dict[str, Any]:
    parts = [{"part": part, "p50_ms": 1.0, "mean_ms": 2.0, "share": 0.5} for part in ("queue", "compute")]
    node = {
        "name": "mini",
        "mean_ms": {"compute": 2.0, "wire": 0.25, "return to the head": 0.5},
        "clock_uncertainty_us": 120.4,
    }
    told = {
        "model": "m",
        "tokens": 5,
        "trips": 4,
        "tokens_of_trips": 4,
        "queued_ms": 1.0,
        "first_token_ms": 20.0,
        "trip_ms": {"p50": 3.0, "mean": 4.0},
        "parts": parts,
        "nodes": [node],
        "layers_per_span": 0,
        "others": 0,
        "unfinished_frames": 0,
        "trouble": [],
        "file": "t.json",
    }
    return told | changes


def test_a_whole_trace() -> None:
    lines = render(found()).splitlines()
    assert lines[0] == "m: 5 tokens traced; the first after 21.0 ms"
    assert lines[4].split() == ["queue", "1.000", "2.000", "50.0%"]
    assert lines[6].split() == ["a", "whole", "trip", "3.000", "4.000", "100.0%"]
    assert lines[-1] == "the timeline is in t.json: open it at https://ui.perfetto.dev"
    assert "mini" in lines[10]
    assert "0.750" in lines[10]  # the ways to it, a result's too
    assert lines[10].split()[-1] == "120"


def test_notes_say_what_a_reader_must_know() -> None:
    told = found(others=2, tokens_of_trips=9, layers_per_span=1, unfinished_frames=1, trouble=["n1: gone"])
    text = render(told)
    assert "while 2 other requests ran" in text
    assert "9 more in 4 trips, as guesses were right" in text
    assert "note: layers were evaluated by themselves" in text
    assert "note: one frame never came back" in text
    assert "partial: n1: gone" in text


def test_a_trace_of_nothing_says_so() -> None:
    text = render(found(parts=[], first_token_ms=None, tokens=0, trouble=["it was interrupted"]))
    assert "no token came back after the first one: there is nothing to add up" in text
    assert "partial: it was interrupted" in text


def test_the_picture_has_the_rows_of_the_file(tmp_path: Path) -> None:
    line, answer = answered(records(5))
    file = trace_file(line, answer, {0: "n0 0:3", 1: "n1 3:5"}, {"model": "demo"})
    draw_trace(file, tmp_path / "t.svg")
    drawn = (tmp_path / "t.svg").read_text()
    assert "demo: 2 of the traced trips" in drawn
    assert "n1 3:5  graph building" in drawn
    with pytest.raises(ValueError, match="no spans"):
        draw_trace({"traceEvents": []}, tmp_path / "t.svg")


def test_memory_beside_what_was_predicted() -> None:
    measured = dict.fromkeys(
        ("weight_bytes", "kv_bytes", "activation_bytes", "cache_bytes", "mlx_peak_bytes"), 2_000_000
    ) | {"peak_rss_bytes": 9_000_000, "import_rss_bytes": 5_000_000}
    predicted = dict.fromkeys(("weight_bytes", "kv_bytes", "activation_bytes", "sum_bytes"), 3_000_000)
    nodes = [
        {"name": "a", "measured": measured, "predicted": predicted, "load_s": 1.5},
        {"name": "b", "measured": measured, "predicted": None, "load_s": None},
    ]
    told = {"model": "m", "has_load": True, "prompt_tokens": 4, "tokens": 2, "nodes": nodes, "file": "m.json"}
    lines = render_memory(told | {"trouble": ["b: it is gone"]}).splitlines()
    assert lines[0] == "m: a load and an answer of 4 + 2 tokens; MB"
    assert lines[4].split()[1:4] == ["2.0", "/", "3.0"]
    assert lines[5].split()[1:3] == ["2.0", "2.0"]
    assert "partial: b: it is gone" in lines
    assert "(the ring was loaded before)" in render_memory(told | {"has_load": False, "trouble": []})


def test_wrong_arguments_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--tokens", "0"], ["--tokens", "9999"], ["--layers", "x"], ["--plot", "t.pdf"]):
        with pytest.raises(SystemExit) as ended:
            trace.main(words)
        assert ended.value.code == EXIT_USAGE
    assert "more than the 4096 that nodes keep records of" in capsys.readouterr().err
    assert trace.main(["--out", str(tmp_path / "no" / "t.json")]) == EXIT_USAGE
    assert "is no folder: give another --out" in capsys.readouterr().err
    assert profile.main(["--memory", "--out", str(tmp_path / "no" / "t.json")]) == EXIT_USAGE
    assert "is no folder: give another --out" in capsys.readouterr().err
    assert trace.main(["--plot", str(tmp_path / "no" / "t.svg")]) == EXIT_USAGE
    assert "is no folder: give another --plot" in capsys.readouterr().err
    for words in ([], ["--memory"]):
        main = profile.main if words else trace.main
        assert main([*words, "--out", str(tmp_path)]) == EXIT_USAGE
        assert capsys.readouterr().err.endswith(" is a folder: give --out the path of a file\n")
    assert profile.main(["--config", "cluster.json"]) == EXIT_USAGE
    assert "--config goes with --memory" in capsys.readouterr().err
    for words in (["--tokens", "3"], ["--prompt-tokens", "3"], ["--out", "m.json"]):
        assert profile.main(words) == EXIT_USAGE
        assert f"{words[0]} goes with --memory: speeds are" in capsys.readouterr().err
    for word in ("--quick", "--show", "--forget", "--no-save"):
        assert profile.main(["--memory", word]) == EXIT_USAGE
        assert f"{word} goes with speeds, not with --memory" in capsys.readouterr().err
    (port,) = free_ports(1)
    assert trace.main(["--url", f"http://127.0.0.1:{port}", "--out", str(tmp_path / "t.json")]) == (
        EXIT_UNREACHABLE
    )
    assert "is the ring running?" in capsys.readouterr().err


def test_a_file_that_may_not_be_written_starts_no_ring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("os.access", lambda path, _mode: Path(path) != tmp_path)  # root may write anywhere
    assert trace.main(["--out", str(tmp_path / "t.json")]) == EXIT_USAGE
    assert capsys.readouterr().err.endswith("t.json may not be written: give another --out\n")


def test_the_api_answers_wrong_questions_and_an_absent_ring(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    path = tmp_path / "cluster.json"
    path.write_text(json.dumps({"model": "m", "nodes": [{"host": "127.0.0.1", "port": port}]}))
    tracer = Tracer(load_config(path), Credentials(None))

    def asked(body: bytes) -> ApiError:
        with pytest.raises(ApiError) as refused:
            asyncio.run(tracer.trace(body))
        return refused.value

    assert (asked(b'{"tokens": 0}').status, asked(b'{"tokens": 0}').param) == (400, "tokens")
    assert "Extra inputs" in asked(b'{"token": 3}').message
    assert asked(b"[").status == 400
    absent = asked(b"{}")
    assert absent.status == 503
    assert "nothing listens there" in absent.message


@pytest.mark.parametrize("main", [trace.main, profile.main])
def test_a_request_beyond_the_context_starts_no_ring(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], main: Callable[[list[str]], int]
) -> None:
    path = tmp_path / "cluster.json"
    path.write_text(json.dumps({"model": "m", "context": 256, "nodes": [{"host": "127.0.0.1"}]}))
    memory = ["--memory"] if main is profile.main else []
    assert main([*memory, "--config", str(path), "--prompt-tokens", "250", "--tokens", "7"]) == EXIT_USAGE
    said = "a prompt of 250 and an answer of 7 tokens exceed the context of 256 tokens"
    assert f"{said} ({path}): ask for less" in capsys.readouterr().err
