"""Pictures in files: what the SVG says, what size the PNG has, and that both are always the same."""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from cluster.config_read import ConfigError
from cluster.dry_run import main
from cluster.errors import EXIT_DOES_NOT_FIT, EXIT_OK, EXIT_USAGE
from cluster.plan_plot import draw, draw_plan
from cluster.sweep_plot import draw_sweep
from planner.picture import WIDTH, Box, Label, Picture
from planner.plan import Plan
from planner.plan_picture import plan_picture
from planner.solver import PlanOptions, make_plan
from planner.sweep import parse_range
from tests.fake_models import llama_config, llama_tensors, write_model
from tests.test_picture import cost_of, nodes_of, planned
from tests.test_sweep import sweep_of

SVG = "{http://www.w3.org/2000/svg}"
ROOT = Path(__file__).resolve().parent.parent


def texts(path: Path) -> list[str]:
    return ["".join(text.itertext()) for text in ElementTree.parse(path).iter(f"{SVG}text")]


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    return width, height


def test_an_svg_holds_its_texts_and_bars(tmp_path: Path) -> None:
    options = PlanOptions(8192, 3, "uniform")
    cost = cost_of(nodes_of(3, name="büro <{}> & $x$ 山"), options)
    plan = planned(cost, options)
    draw_plan(plan, cost, tmp_path / "plan.svg")
    picture = plan_picture(plan, cost)
    assert sorted(texts(tmp_path / "plan.svg")) == sorted(picture.texts)
    root = ElementTree.parse(tmp_path / "plan.svg").getroot()
    assert root.get("width") == f"{WIDTH * 0.75:g}pt"
    named = {item.name.replace(" ", "-") for item in picture.items if isinstance(item, Box) and item.name}
    assert named <= {group.get("id") for group in root.iter(f"{SVG}g")}
    assert len(named) >= 3 * 5


def test_a_bar_in_the_svg_is_as_wide_as_it_should_be(tmp_path: Path) -> None:
    options = PlanOptions(8192, 2, "uniform")
    cost = cost_of(nodes_of(2), options)
    plan = planned(cost, options)
    draw_plan(plan, cost, tmp_path / "plan.svg")
    groups = {g.get("id"): g for g in ElementTree.parse(tmp_path / "plan.svg").iter(f"{SVG}g")}

    def width(name: str) -> float:
        path = groups[name].find(f"{SVG}path")
        assert path is not None
        xs = [float(x) for x in re.findall(r"[ML] (\S+) ", str(path.get("d")))]
        return max(xs) - min(xs)

    for part in plan.assignments:
        names = ("weights", "KV", "scratch", "free", "reserve")
        whole = sum(width(f"{part.node}-{name}") for name in names)
        total_bytes = part.budget_bytes + part.reserve_bytes
        free_bytes = part.budget_bytes - part.need_bytes
        shares = [width(f"{part.node}-{name}") / whole for name in ("weights", "free")]
        assert shares == pytest.approx([part.weight_bytes / total_bytes, free_bytes / total_bytes], abs=1e-4)


def test_the_same_plan_gives_the_same_bytes(tmp_path: Path) -> None:
    options = PlanOptions(8192)
    cost = cost_of(nodes_of(2), options)
    plan = planned(cost, options)
    for name in ("a.svg", "b.svg", "a.png", "b.png"):
        draw_plan(plan, cost, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert "<dc:date>" not in (tmp_path / "a.svg").read_text()
    assert (
        "font-family: 'Helvetica Neue', Helvetica, Arial, 'DejaVu Sans'" in (tmp_path / "a.svg").read_text()
    )


def test_a_png_is_twice_as_wide_as_a_phone(tmp_path: Path) -> None:
    picture = Picture(WIDTH, 300.0, (Label(10, 20, "hello"), Box(10, 30, 50, 10)))
    draw(picture, tmp_path / "x.PNG")
    assert png_size(tmp_path / "x.PNG") == (800, 600)


def test_a_refusal_and_a_sweep_are_drawn(tmp_path: Path) -> None:
    options = PlanOptions(8192)
    cost = cost_of(nodes_of(2, memory_gb=16), options)
    refusal = make_plan(cost.model, cost.nodes, (), options)
    assert not isinstance(refusal, Plan)
    draw_plan(refusal, cost, tmp_path / "refusal.svg")
    assert any(text.startswith("Does not fit: ") for text in texts(tmp_path / "refusal.svg"))
    sweep = sweep_of((256, 8192, 24576, 65536), 6)
    draw_sweep(sweep, tmp_path / "sweep.svg")
    drawn = texts(tmp_path / "sweep.svg")
    assert {"tok/s", "memory: part of each node's budget", "layers of each node", "n0", "n1"} <= set(drawn)
    assert {"256", "8k", "24k", "64k", "context in tokens"} <= set(drawn)
    for plan in sweep.plans:
        assert all(str(part.stop - part.start) in drawn for part in plan.assignments)
    assert "missing" in " ".join(drawn)
    draw_sweep(sweep, tmp_path / "sweep.png")
    assert png_size(tmp_path / "sweep.png")[0] == 800


def test_a_sweep_of_many_values_or_of_none_that_fits_is_drawn(tmp_path: Path) -> None:
    many = parse_range(f"context={','.join(str(1000 * i) for i in range(1, 41))}")
    draw_sweep(sweep_of(many.values, 6), tmp_path / "many.svg")
    ticks = [text for text in texts(tmp_path / "many.svg") if text.endswith("000")]
    assert 0 < len(ticks) <= 3 * 8
    draw_sweep(sweep_of((256, 512), 1), tmp_path / "none.svg")
    assert any(text.startswith("None of them fits: with 256 tokens") for text in texts(tmp_path / "none.svg"))


# -- the command ------------------------------------------------------------------------------------------
def config_file(folder: Path, memory_gb: float = 16) -> Path:
    if not (folder / "model").exists():
        write_model(folder / "model", llama_config(9), llama_tensors(9))
    path = folder / "cluster.json"
    node = {"name": "mini", "host": "mini.local", "chip": "Apple M4", "memory_gb": memory_gb}
    path.write_text(json.dumps({"model": "model", "nodes": [node]}))
    return path


def test_the_command_draws_beside_what_it_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--config", str(config_file(tmp_path)), "--json"]
    assert main(flags) == EXIT_OK
    plain = capsys.readouterr()
    assert main([*flags, "--plot", str(tmp_path / "plan.svg")]) == EXIT_OK
    assert capsys.readouterr() == plain
    assert "layers 0:9 (9) + embedding + head" in texts(tmp_path / "plan.svg")
    assert main([*flags, "--sweep", "context=1k..4k", "--plot", str(tmp_path / "sweep.png")]) == EXIT_OK
    assert png_size(tmp_path / "sweep.png")[0] == 800


def test_a_refusal_is_drawn_and_stays_a_refusal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--config", str(config_file(tmp_path, 0.001)), "--plot", str(tmp_path / "plan.svg")]
    assert main(flags) == EXIT_DOES_NOT_FIT
    assert "does not fit" in capsys.readouterr().out
    assert any(text.startswith("Does not fit: ") for text in texts(tmp_path / "plan.svg"))


def test_what_cannot_be_drawn_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(config_file(tmp_path))
    with pytest.raises(SystemExit) as ended:
        main(["--config", config, "--plot", "plan.pdf"])
    assert ended.value.code == EXIT_USAGE
    assert "argument --plot: 'plan.pdf' must end with .svg or .png" in capsys.readouterr().err
    nowhere = tmp_path / "none" / "plan.svg"
    assert main(["--config", config, "--plot", str(nowhere)]) == EXIT_USAGE
    said = capsys.readouterr().err
    assert said == f"plan-dry-run: --plot {nowhere}: the file cannot be written: No such file or directory\n"
    with pytest.raises(ConfigError, match="cannot be written"):
        draw(Picture(WIDTH, 10, ()), nowhere)


def test_matplotlib_is_imported_for_a_picture_alone(tmp_path: Path) -> None:
    config = str(config_file(tmp_path))
    code = (
        "import sys\nfrom cluster.dry_run import main\nmain(sys.argv[1:])\n"
        "print('matplotlib' in sys.modules, file=sys.stderr)"
    )
    for flags, is_imported in (([], "False"), (["--plot", str(tmp_path / "p.svg")], "True")):
        done = subprocess.run(
            [sys.executable, "-c", code, "--config", config, *flags],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stderr.splitlines()[-1] == is_imported


def test_the_picture_of_the_documents_is_one() -> None:
    drawn = texts(ROOT / "docs" / "plan.svg")
    assert "GLM-4.7-Flash-4bit" in drawn
    assert "47 layers, one request of 8192 tokens" in drawn
