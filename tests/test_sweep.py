from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.config import load_config
from cluster.config_read import ConfigError
from cluster.dry_run import main
from cluster.errors import EXIT_DOES_NOT_FIT, EXIT_OK, EXIT_USAGE
from cluster.sweep import swept
from planner.node_profile import GB
from planner.plan import Plan, Refusal
from planner.solver import PlanOptions, make_plan
from planner.sweep import Sweep, SweepError, SweepRange, parse_range, render_sweep
from tests.big_shapes import cluster_file, write_shape
from tests.fake_models import made_up_model, node


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("context=4k..128K", ("context", None, [4096, 8192, 16384, 32768, 65536, 131072])),
        ("context=4096, 30000,8192", ("context", None, [4096, 8192, 30000])),
        ("context=1000..5000", ("context", None, [1000, 2000, 4000, 5000])),
        ("concurrency=1..16", ("concurrency", None, [1, 2, 4, 8, 16])),
        ("concurrency=7", ("concurrency", None, [7])),
        ("memory:mini 1=8..64", ("memory", "mini 1", [8, 16, 32, 64])),
        ("context=4k..4k", ("context", None, [4096])),
    ],
)
def test_a_range_doubles_or_is_a_list(text: str, found: tuple[str, str | None, list[int]]) -> None:
    axis, name, values = found
    assert parse_range(text) == SweepRange(axis, name, tuple(values))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("context", "'context' is no sweep: write context=4k..128k"),
        ("contxt=4k..8k", "'contxt=4k..8k' is no sweep"),
        ("memory=8..16", "'memory=8..16' is no sweep"),
        ("memory:=8..16", "'memory:=8..16' is no sweep"),
        ("context:mini=8..16", "'context:mini=8..16' is no sweep"),
        ("context=", "has the value ''"),
        ("context=4k..", "has the value ''"),
        ("context=4m..8m", "has the value '4m': write whole numbers above 0"),
        ("context=0,5", "has the value '0'"),
        ("context=1..-3", "has the value '-3'"),
        ("context=1e3", "has the value '1e3'"),
        ("context=4..99999999999", "has the value '99999999999'"),
        ("context=8k..4k", "must go up"),
        (f"context={','.join(map(str, range(1, 66)))}", "asks for 65 plans: 64 are the most"),
    ],
)
def test_what_is_no_range_is_refused(text: str, said: str) -> None:
    with pytest.raises(SweepError) as caught:
        parse_range(text)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def sweep_of(values: tuple[int, ...], budget_gb: float) -> Sweep:
    model = made_up_model([GB] * 6, kv_token_bytes=10_000)
    nodes = [node(0, budget_gb), node(1, budget_gb * 0.75), node(2, budget_gb, use=False)]
    results = tuple(make_plan(model, nodes, (), PlanOptions(value)) for value in values)
    return Sweep("made-up", SweepRange("context", None, values), ("n0", "n1", "n2"), results)


def test_a_sweep_is_a_line_for_each_value() -> None:
    sweep = sweep_of((256, 8192, 24576, 65536), 6)
    assert [type(result) for result in sweep.results] == [Plan, Plan, Plan, Refusal]
    lines = render_sweep(sweep).splitlines()
    assert lines[0] == "made-up: what the context changes"
    assert lines[2].split() == [
        *("context", "fits", "layers", "tok/s", "speed", "all", "users", "first", "token"),
        *("fullest", "node", "missing"),
    ]
    cells = [line.split() for line in lines[4:8]]
    assert [row[:2] for row in cells] == [["256", "yes"], ["8192", "yes"], ["24576", "yes"], ["65536", "no"]]
    for row, plan in zip(cells, sweep.plans, strict=False):
        counts = {part.node: part.stop - part.start for part in plan.assignments}
        assert row[2:4] == [str(counts.get(name, "-")) for name in ("n0", "n1")]
        assert row[4] == f"{plan.predicted.decode_tok_s:.1f}"
    assert lines[9] == "layers: of n0, n1"
    refusal = sweep.results[-1]
    assert isinstance(refusal, Refusal)
    missing = f"{refusal.missing_bytes / GB:.2f} GB"
    assert lines[-1] == f"It fits up to 24576 tokens; with 65536 tokens, {missing} are missing."
    assert max(map(len, lines)) <= 100


def test_a_sweep_says_where_the_limit_lies() -> None:
    assert render_sweep(sweep_of((1, 256), 20)).endswith("All of them fit, up to 256 tokens.")
    nothing = sweep_of((1, 256), 1)
    text = render_sweep(nothing)
    assert "None of them fits: with 1 token, " in text
    assert "layers: of" not in text
    rise = replace(nothing, range=SweepRange("memory", "n0", (8, 16)), results=nothing.results)
    plan = sweep_of((256,), 20).results[0]
    rising = render_sweep(replace(rise, results=(nothing.results[0], plan)))
    assert "what the memory of n0 changes" in rising
    assert "It fits from 16 GB on; with 8 GB, " in rising


# -- the command ------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def glm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shape("GLM-4.7-Flash-4bit", tmp_path_factory.mktemp("glm") / "GLM-4.7-Flash-4bit")


def run(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[int, str, str]:
    config = tmp_path / "cluster.json"
    config.write_text(json.dumps(cluster_file("minis", model)))
    code = main(["--config", str(config), *flags])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def points(out: str) -> list[dict[str, Any]]:
    data = json.loads(out)
    assert list(data) == ["sweep"]
    found: list[dict[str, Any]] = data["sweep"]["points"]
    return found


def test_more_context_shifts_layers_until_it_is_refused_with_the_number(
    glm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, said = run(glm, tmp_path, capsys, "--sweep", "context=4k..128k", "--json")
    assert (code, said) == (EXIT_OK, "")
    found = points(out)
    assert [point["value"] for point in found] == [4096 << step for step in range(6)]
    assert [point["plan"]["context"] for point in found] == [4096 << step for step in range(6)]
    first = [point["plan"]["assignments"][0]["stop"] for point in found if point["plan"]["fits"]]
    assert len(first) == 4
    assert len(set(first)) > 1, "more context moves layers"
    missing = [point["plan"]["refusal"]["missing_bytes"] for point in found if not point["plan"]["fits"]]
    assert 0 < missing[0] < missing[1]
    alone = json.loads(run(glm, tmp_path, capsys, "--context", "16384", "--json")[1])
    assert found[2]["plan"] == alone


def test_concurrency_and_memory_can_be_swept(
    glm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(glm, tmp_path, capsys, "--sweep", "concurrency=1,3", "--json")
    assert code == EXIT_OK
    assert [point["plan"]["concurrency"] for point in points(out)] == [1, 3]
    flags = ["--sweep", "memory:m4-1=4..64", "--context", "32768", "--json"]
    code, out, _ = run(glm, tmp_path, capsys, *flags)
    assert code == EXIT_OK
    assert [point["plan"]["fits"] for point in points(out)] == [False, False, True, True, True]
    whole = points(out)[-1]["plan"]["assignments"]
    assert [part["node"] for part in whole] == ["m4-1"], "one node of 64 GB is faster than three"


def test_a_sweep_in_which_nothing_fits_is_a_refusal(
    glm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(glm, tmp_path, capsys, "--sweep", "context=128k,256k")
    assert code == EXIT_DOES_NOT_FIT
    assert "None of them fits: with 131072 tokens, 1" in out


def test_a_context_beyond_the_models_is_told_once(
    glm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, _, said = run(glm, tmp_path, capsys, "--sweep", "context=4k,256k,300k")
    assert said.count("is beyond the 202752 tokens that") == 1


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--sweep", "contxt=1..4"], "argument --sweep: 'contxt=1..4' is no sweep: write context=4k"),
        (["--sweep", "context=1..4", "--context", "4"], "--sweep context and --context exclude each other"),
        (["--sweep", "concurrency=1..4", "--concurrency", "4"], "--sweep concurrency and --concurrency"),
        (["--sweep", "context=1..4", "--force"], "--sweep and --force exclude each other: a sweep shows"),
        (["--sweep", "context=1..4", "--why"], "--sweep and --why exclude each other: ask for one value"),
        (["--sweep", "context=1..4", "--compare"], "--sweep and --compare exclude each other: ask"),
        (["--sweep", "concurrency=1,9999999"], "--sweep: 9999999 requests are more than 1000000"),
        (["--sweep", "memory:m4-9=1..4"], "--sweep memory:m4-9: the nodes are m4-0, m4-1, m4-2"),
    ],
)
def test_a_wrong_sweep_is_one_sentence(
    flags: list[str], said: str, glm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "cluster.json"
    config.write_text(json.dumps(cluster_file("minis", glm)))
    try:
        code = main(["--config", str(config), *flags])
    except SystemExit as ended:
        code = int(str(ended.code))
    printed = capsys.readouterr()
    assert (code, printed.out, printed.err.count("\n")) == (EXIT_USAGE, "", 1)
    assert said in printed.err


def test_the_swept_configs_differ_in_that_value_alone(tmp_path: Path) -> None:
    path = tmp_path / "cluster.json"
    path.write_text(json.dumps(cluster_file("minis", "m", context=77)))
    config = load_config(path)
    by_memory = list(swept(config, parse_range("memory:m4-1=8,9")))
    assert [[n.memory_gb for n in c.nodes] for c in by_memory] == [[16, 8, 16], [16, 9, 16]]
    assert {c.context for c in by_memory} == {77}
    with pytest.raises(ConfigError, match="the nodes are m4-0, m4-1, m4-2"):
        swept(config, parse_range("memory:x=8,9"))
