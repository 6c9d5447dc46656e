"""The command line of `macrame bench`: what is refused before anything starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.errors import EXIT_ERROR, EXIT_UNREACHABLE, EXIT_USAGE
from deploy.bench import main
from deploy.local_ring import free_ports
from tests.test_from_running import api


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--warm-up", "-1"], "argument --warm-up: '-1' must be a whole number from 0 on"),
        (["--requests", "0"], "argument --requests: '0' must be a whole number above 0"),
        (["--output-tokens", "0"], "argument --output-tokens/--max-tokens: '0' must be a whole number above"),
        (["--concurrency", "1,,4"], "argument --concurrency: '' must be a whole number above 0"),
        (["--dataset", "wiki"], "argument --dataset: invalid choice: 'wiki'"),
        (["--plot", "bench.pdf"], "argument --plot: 'bench.pdf' must end with .svg or .png"),
    ],
)
def test_usage_errors(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--url", "http://127.0.0.1:1", *arguments])
    assert ended.value.code == EXIT_USAGE
    assert f"macrame bench: {message}" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["--output-tokens", "--max-tokens"])
def test_a_load_beyond_the_context_starts_no_ring(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "cluster.json"
    path.write_text(json.dumps({"model": "m", "context": 256, "nodes": [{"host": "127.0.0.1"}]}))
    assert main(["--config", str(path), "--prompt-tokens", "200", name, "57"]) == EXIT_USAGE
    told = capsys.readouterr().err
    assert "a prompt of 200 and an answer of 57 tokens exceed the context of 256 tokens (" in told


def test_a_picture_that_cannot_be_written_is_told_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plot = tmp_path / "nowhere" / "bench.svg"
    assert main(["--url", "http://127.0.0.1:1", "--plot", str(plot)]) == EXIT_USAGE
    assert f"{plot.parent} is no folder: give another --plot" in capsys.readouterr().err


def test_another_programs_api(capsys: pytest.CaptureFixture[str]) -> None:
    with api({"/v1/cluster": []}) as url:
        assert main(["--url", url]) == EXIT_ERROR
    assert f"macrame bench: {url}/v1/cluster is not macrame's API" in capsys.readouterr().err


def test_nobody_there(capsys: pytest.CaptureFixture[str]) -> None:
    url = f"http://127.0.0.1:{free_ports('127.0.0.1', 1)[0]}"
    assert main(["--url", url]) == EXIT_UNREACHABLE
    out, told = capsys.readouterr()
    assert out == ""
    assert f"macrame bench: {url} does not answer (" in told
    assert told.rstrip().endswith("; is the ring running?")
