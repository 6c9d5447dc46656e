"""What the bench prints and draws of a result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster.bench_plot import draw_bench
from cluster.config_read import ConfigError
from deploy.bench_text import render
from tests.test_plot import png_size, texts


def run(users: int, *, is_whole: bool = True, has_gaps: bool = True) -> dict[str, Any]:
    waits = {"p50": 100.0 * users, "p90": 150.0 * users, "p99": 200.0 * users}
    nothing = dict.fromkeys(("p50", "p90", "p99"))
    return {
        "concurrency": users,
        "num_requests": 3 * users,
        "is_whole": is_whole,
        "decode_tok_s": 50.0 / users,
        "aggregate_tok_s": 40.0 * users,
        "ttft_ms": waits,
        "gap_ms": waits if has_gaps else nothing,
        "hop_ms": nothing,
        "cpu_ms_per_token": 12.34,
        "stage_busy": [0.25 * users, 0.1 * users],
    }


def result_of(*runs: dict[str, Any]) -> dict[str, Any]:
    node = {"actual_memory_usage_gb": 1.25, "memory_saved_gb": 2.0, "peak_rss_bytes": 10**9}
    return {
        "model": "somebody/Model-8bit",
        "dataset": "random",
        "seed": 7,
        "prompt_tokens": 512,
        "output_tokens": 128,
        "stages": [
            {"rank": 1, "node": "b", "start": 0, "stop": 3},
            {"rank": 0, "node": "a", "start": 3, "stop": 9},
        ],
        "runs": list(runs),
        "nodes": [{"rank": rank, "weight_bytes": 5 * 10**8, **node} for rank in range(2)],
    }


def test_the_table_has_a_line_for_each_run_and_node() -> None:
    lines = render(result_of(run(1), run(3, is_whole=False))).splitlines()
    assert lines[0] == "somebody/Model-8bit: 512 prompt and 128 answered tokens, random, seed 7"
    one, three = (line.split() for line in lines[4:6])
    assert " ".join(one) == "1 3 40.0 50.0 100 150 200 100.0 150.0 200.0 - 12.3 25 10"
    assert " ".join(three) == "3* 9 120.0 16.7 300 450 600 300.0 450.0 600.0 - 12.3 75 30"
    assert lines[6] == "* interrupted: the figures until then"
    assert "stages: b 0:3, a 3:9" in lines
    assert lines[-1].split() == ["1", "0.500", "1.250", "2.000", "1.000"]
    assert max(map(len, render(result_of(run(1), run(3)), 40).splitlines()[1:])) <= 40


@pytest.mark.long
def test_the_picture_says_what_was_measured(tmp_path: Path) -> None:
    file = tmp_path / "bench.svg"
    draw_bench(result_of(run(1, has_gaps=False), run(4, is_whole=False)), file)
    found = texts(file)
    for text in ("Model-8bit", "512 prompt and 128 answered tokens, random", "busy share of each stage"):
        assert text in found
    assert {"a", "b", "25", "10", "100", "40", "1", "4*", "users at once"} <= set(found)
    draw_bench(result_of(run(1, has_gaps=False), run(4, is_whole=False)), tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_bytes() == file.read_bytes()
    draw_bench(result_of(run(1)), tmp_path / "bench.png")
    assert png_size(tmp_path / "bench.png")[0] == 800
    with pytest.raises(
        ConfigError, match=r"--plot .*nowhere/x.svg: the file cannot be written: No such file"
    ):
        draw_bench(result_of(run(1)), tmp_path / "nowhere" / "x.svg")
