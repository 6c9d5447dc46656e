from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cluster.dry_run import main
from cluster.errors import EXIT_DOES_NOT_FIT, EXIT_ERROR, EXIT_OK, EXIT_USAGE
from planner.node_profile import GB
from planner.plan import Plan
from planner.solver import STRATEGIES
from shard_loader.cuts import proofs_of
from shard_loader.hub_source import HubSource
from tests.fake_models import llama_config, llama_tensors, write_model
from tests.hub_server import HubServer
from tests.tiny_models import write_checkpoint

ROOT = Path(__file__).resolve().parent.parent
NODES = [
    {"name": "mini", "host": "mini.local", "chip": "Apple M4", "gpu_cores": 10, "memory_gb": 16},
    {"name": "pro", "host": "pro.local", "chip": "Apple M4 Pro", "gpu_cores": 20, "memory_gb": 24},
    {"name": "air", "host": "air.local", "chip": "Apple M1", "gpu_cores": 8, "memory_gb": 8},
]
KEYS = {
    *(
        "model",
        "digest",
        "strategy",
        "objective",
        "fits",
        "num_layers",
        "context",
        "concurrency",
        "assignments",
    ),
    *("unused_nodes", "predicted", "memory", "refusal"),
}


@pytest.fixture(scope="module", autouse=True)
def proven() -> None:
    """The cuts of the model that most tests plan are proven before."""
    assert all(proof.exact for proof in proofs_of(llama_config(9)))


def write_config(folder: Path, **overrides: Any) -> Path:
    """A cluster of three Macs for the model in the folder's `model`, with nine layers."""
    if not (folder / "model").exists():
        write_model(folder / "model", llama_config(9), llama_tensors(9))
    path = folder / "cluster.json"
    path.write_text(json.dumps({"model": "model", "nodes": NODES} | overrides))
    return path


def run(
    folder: Path, capsys: pytest.CaptureFixture[str], *flags: str, **overrides: Any
) -> tuple[int, Any, str]:
    """The exit code, the JSON that was printed, and what was said on stderr."""
    code = main(["--config", str(write_config(folder, **overrides)), "--json", *flags])
    printed = capsys.readouterr()
    return code, json.loads(printed.out) if printed.out else None, printed.err


def layers(data: Any) -> dict[str, tuple[int, int]]:
    return {part["node"]: (part["start"], part["stop"]) for part in data["assignments"]}


def test_a_plan_is_one_json_object(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, data, said = run(tmp_path, capsys, "--strategy", "memory_proportional")
    assert (code, said) == (EXIT_OK, "")
    assert set(data) == KEYS
    assert (data["model"], data["fits"], data["num_layers"], data["refusal"]) == ("model", True, 9, None)
    assert (data["context"], data["concurrency"]) == (4096, 1)
    assert list(layers(data)) == ["mini", "pro", "air"]
    plan = Plan.from_json(json.dumps(data))
    assert plan.digest == data["digest"]
    for part in plan.assignments:
        assert part.need_bytes <= part.budget_bytes


def test_the_same_file_gives_the_same_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, capsys) == run(tmp_path, capsys)


def test_flags_take_the_place_of_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = write_model(tmp_path / "other", llama_config(3), llama_tensors(3))
    flags = ["--model", str(other), "--strategy", "uniform", "--objective", "ttft", "--context", "512"]
    code, data, _ = run(tmp_path, capsys, *flags, "--concurrency", "7", model="nowhere", context=9)
    assert code == EXIT_OK
    assert (data["model"], data["num_layers"]) == (str(other), 3)
    assert (data["strategy"], data["objective"], data["context"], data["concurrency"]) == (
        "uniform",
        "ttft",
        512,
        7,
    )


def test_a_model_lies_beside_the_file_or_in_the_working_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model(tmp_path / "cwd" / "mine", llama_config(3), llama_tensors(3))
    monkeypatch.chdir(tmp_path / "cwd")
    assert run(tmp_path, capsys, "--model", "mine")[1]["num_layers"] == 3
    assert run(tmp_path, capsys)[1]["num_layers"] == 9


def test_a_hub_id_is_looked_up_in_the_local_cache(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    snapshot = hub / "models--org--tiny" / "snapshots" / ("a" * 40)
    write_model(snapshot, llama_config(3), llama_tensors(3))
    refs = hub / "models--org--tiny" / "refs"
    refs.mkdir()
    (refs / "main").write_text("a" * 40)
    code, data, _ = run(tmp_path, capsys, model="org/tiny")
    assert (code, data["model"], data["num_layers"]) == (EXIT_OK, "org/tiny", 3)
    code, data, said = run(tmp_path, capsys, model="org/none")
    assert (code, data) == (EXIT_USAGE, None)
    assert said.count("\n") == 1
    assert 'model = "org/none": org/none is not in the local cache, and HF_HUB_OFFLINE keeps' in said


def test_of_a_hub_id_small_files_and_headers_are_fetched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_model(tmp_path / "served", llama_config(3), llama_tensors(3))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with HubServer({"org/far": folder}) as server:
        monkeypatch.setattr("shard_loader.hub.HubSource", lambda: HubSource(endpoint=server.url))
        code, _, said = run(tmp_path, capsys, model="org/far")
        assert code == EXIT_OK, said
        assert server.bytes_of(where=lambda s: s.file.endswith(".safetensors")) < 10_000
    here, there = (run(tmp_path, capsys, model=m)[1] for m in (str(folder), "org/far"))
    assert here["assignments"] == there["assignments"]


def test_a_missing_file_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_checkpoint("llama", tmp_path / "lost", num_layers=5, max_shard_bytes=300_000)
    whole = run(tmp_path, capsys, model=str(folder))[1]
    next(folder.glob("model-00003-*")).unlink()
    code, data, said = run(tmp_path, capsys, model=str(folder))
    assert (code, data["assignments"]) == (EXIT_OK, whole["assignments"])
    assert "model-00003-of-00004.safetensors is missing: its tensors are taken" in said


def test_what_does_not_fit_is_refused_with_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, data, _ = run(tmp_path, capsys, "--context", "100000000")
    assert code == EXIT_DOES_NOT_FIT
    assert set(data) == KEYS
    assert (data["fits"], data["assignments"], data["digest"], data["predicted"]) == (False, [], None, None)
    refusal = data["refusal"]
    assert set(refusal) == {"reason", "missing_bytes", "advice"}
    assert refusal["missing_bytes"] > 0
    assert "one request of 100000000 tokens" in refusal["reason"]
    assert "Lower --context to" in refusal["advice"]
    most = refusal["advice"].split("--context to ")[1].split(",")[0]
    assert run(tmp_path, capsys, "--context", most)[0] == EXIT_OK


def test_without_json_there_is_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(write_config(tmp_path))
    assert main(["--config", path]) == EXIT_OK
    assert "predicted: " in capsys.readouterr().out
    assert main(["--config", path, "--context", "100000000"]) == EXIT_DOES_NOT_FIT
    assert "model does not fit: " in capsys.readouterr().out


def test_a_context_beyond_the_models_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, said = run(tmp_path, capsys, "--context", "5000")
    assert code == EXIT_OK
    assert "the context 5000 is beyond the 4096 tokens that model was made for" in said


def test_layers_are_forced_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nodes = [NODES[0] | {"layers": "0:9"}, *NODES[1:]]
    code, data, _ = run(tmp_path, capsys, "--layers", "air=0:2", "mini=5:9", nodes=nodes)
    assert code == EXIT_OK
    assert layers(data) == {"air": (0, 2), "pro": (2, 5), "mini": (5, 9)}
    _, data, _ = run(tmp_path, capsys, "--layers", "air=0:2", "--layers", "pro=2:9")
    assert layers(data) == {"air": (0, 2), "pro": (2, 9)}
    assert data["unused_nodes"] == ["mini"]


def test_excluded_nodes_own_nothing_this_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--strategy", "uniform", "--exclude"]
    code, data, _ = run(tmp_path, capsys, *flags, "pro")
    assert (code, list(layers(data)), data["unused_nodes"]) == (EXIT_OK, ["mini", "air"], ["pro"])
    code, data, _ = run(tmp_path, capsys, *flags, "mini", "--exclude", "air")
    assert (code, layers(data)) == (EXIT_OK, {"pro": (0, 9)})


def test_the_order_of_the_file_can_be_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, data, _ = run(tmp_path, capsys, "--layers", "air=0:5")
    assert (code, next(iter(layers(data)))) == (EXIT_OK, "air")
    code, data, _ = run(tmp_path, capsys, "--layers", "air=0:5", "--keep-order")
    assert code == EXIT_DOES_NOT_FIT
    assert data["refusal"]["reason"].endswith("or the order of the nodes, which --keep-order keeps")
    code, data, _ = run(tmp_path, capsys, "--layers", "air=5:9", "mini=0:3", "--keep-order")
    assert (code, list(layers(data))) == (EXIT_OK, ["mini", "pro", "air"])


def test_what_does_not_fit_can_be_forced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--context", "100000000"]
    refusal = run(tmp_path, capsys, *flags)[1]["refusal"]
    code, data, said = run(tmp_path, capsys, *flags, "--force")
    assert code == EXIT_OK
    assert set(data) == KEYS
    assert (data["fits"], data["refusal"]) == (False, refusal)
    plan = Plan.from_json(json.dumps(data))
    assert sum(part.over_bytes for part in plan.assignments) == refusal["missing_bytes"]
    assert plan.warnings
    for warning in plan.warnings:
        assert f"plan-dry-run: warning: {warning}" in said
    assert main(["--config", str(tmp_path / "cluster.json"), *flags, "--force"]) == EXIT_OK
    text = capsys.readouterr().out
    assert f"FORCED, IT DOES NOT FIT: {refusal['reason']}" in text
    assert f"WARNING: {plan.warnings[0]}" in text
    assert "strategy  " not in text  # none of the others fits


def test_all_strategies_stand_beside_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, data, _ = run(tmp_path, capsys, "--compare")
    assert (code, set(data)) == (EXIT_OK, KEYS | {"strategies"})
    assert {row["strategy"] for row in data["strategies"]} == set(STRATEGIES)
    assert data["strategies"][0] == {
        "strategy": "optimal",
        "objective": "latency",
        "is_chosen": True,
        "fits": True,
        "num_stages": 1,
        "predicted": data["predicted"],
    }
    assert main(["--config", str(tmp_path / "cluster.json")]) == EXIT_OK
    assert "memory_proportional       yes" in capsys.readouterr().out


def test_force_changes_nothing_where_a_plan_fits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, capsys, "--force") == run(tmp_path, capsys)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--exclude", "airs"], '--exclude airs: "airs" is no node, the nearest is "air"'),
        (["--exclude", "x"], '--exclude x: "x" is no node: the nodes are mini, pro, air'),
        (["--exclude", "air", "pro", "mini"], "--exclude air pro mini: no node is left to own layers"),
        (
            ["--layers", "air=0:9", "--exclude", "air"],
            "--exclude air: the layers 0:9 are forced onto that node",
        ),
        (
            ["--layers", "air=0:2", "pro=1:9"],
            "layers 1:9 of pro overlap those of air, which end at 2",
        ),
        (["--layers", "air=0:2", "pro=3:8", "mini=8:9"], "layers 2:3 are forced onto no node"),
        (["--layers", "air=0:10"], "layers 0:10 of air exceed the model, which has the layers 0:9"),
        (["--layers", "airs=0:9"], '--layers airs=0:9: "airs" is no node, the nearest is "air"'),
        (["--layers", "air=9:0"], '--layers air=9:0: the layers must be two whole numbers "start:stop"'),
        (["--layers", "air"], "--layers air: write NODE=A:B, such as mini=0:10"),
        (["--layers", "air=0:2", "air=2:9"], '"air" is given twice'),
        (["--model", "/nowhere"], 'cluster.json: model = "/nowhere": there is no model folder /nowhere'),
        (["--config", "/nowhere.json"], "/nowhere.json does not exist"),
    ],
)
def test_what_cannot_be_planned_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    code, data, said = run(tmp_path, capsys, *flags)
    assert (code, data) == (EXIT_USAGE, None)
    assert message in said
    assert said.count("\n") == 1
    assert said.startswith("plan-dry-run: ")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "the following arguments are required: --config"),
        (["--config", "c", "--strategy", "best"], "invalid choice: 'best'"),
        (["--config", "c", "--context", "-5"], "'-5' must be a whole number above 0"),
        (["--config", "c", "--concurrency", "0"], "'0' must be a whole number above 0"),
        (["--config", "c", "--concurrency", "nan"], "'nan' must be a whole number above 0"),
        (["--config", "c", "--context", "1000000000001"], "must be at most 1000000000000"),
        (["--config", "c", "--concurrency", "1000001"], "'1000001' must be at most 1000000"),
        (["--config", "c", "--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_usage_errors_end_with_3(capsys: pytest.CaptureFixture[str], flags: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main(flags)
    assert caught.value.code == EXIT_USAGE
    assert message in capsys.readouterr().err


def test_another_machine_needs_its_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, data, said = run(tmp_path, capsys, nodes=[{"host": "192.0.2.1", "chip": "Apple M4"}])
    assert (code, data) == (EXIT_USAGE, None)
    assert "nodes[0].memory_gb is missing: 192.0.2.1 is another machine" in said


def test_this_machine_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, data, _ = run(tmp_path, capsys, nodes=[{"host": "localhost"}])
    assert code == EXIT_OK
    assert layers(data) == {"localhost": (0, 9)}


def test_broken_files_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_config(tmp_path)
    weights = tmp_path / "model" / "model.safetensors"
    with weights.open("r+b") as file:
        file.truncate(weights.stat().st_size - 1)
    assert main(["--config", str(path)]) == EXIT_USAGE
    assert f"{weights} is truncated" in capsys.readouterr().err


def test_verbose_shows_where_it_happened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", str(tmp_path / "no.json"), "--verbose"]) == EXIT_USAGE
    assert "Traceback" in capsys.readouterr().err


def test_what_nobody_thought_of_is_one_sentence_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr("cluster.plan_asker.make_proven_plan", fail)
    code, data, said = run(tmp_path, capsys)
    assert (code, data) == (EXIT_ERROR, None)
    assert said == "plan-dry-run: ZeroDivisionError: oh; --verbose shows where, please report it\n"


def test_a_reader_that_leaves_early_is_no_traceback(tmp_path: Path) -> None:
    path = write_config(tmp_path)
    code = (
        f"import sys; from cluster.dry_run import main; sys.exit(main(['--config', {str(path)!r}, '--json']))"
    )
    read_end, write_end = os.pipe()
    os.close(read_end)
    result = subprocess.run(
        [sys.executable, "-u", "-c", code], cwd=ROOT, stdout=write_end, stderr=subprocess.PIPE, check=False
    )
    os.close(write_end)
    assert (result.returncode, result.stderr) == (EXIT_ERROR, b"")


def test_neither_mlx_nor_grpc_is_imported(tmp_path: Path) -> None:
    path = write_config(tmp_path)
    code = (
        "import sys; from cluster.dry_run import main; "
        f"code = main(['--config', {str(path)!r}]); "
        "names = ('mlx', 'mlx_lm', 'grpc', 'transformers'); "
        "print(code, [name for name in names if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.splitlines()[-1] == "0 []"


def check_demo(capsys: pytest.CaptureFixture[str], *flags: str) -> None:
    code = main(["--config", str(ROOT / "deploy" / "demo" / "cluster.json"), "--json", *flags])
    data = json.loads(capsys.readouterr().out)
    assert code == EXIT_OK
    assert [part["rank"] for part in data["assignments"]] == [0, 1, 2]
    assert [part["stop"] - part["start"] for part in data["assignments"]] == [3, 5, 1]
    assert sum(part["weight_bytes"] + part["kv_bytes"] for part in data["assignments"]) < GB // 4


def test_the_demo_cluster_is_an_uneven_plan_for_nine_layers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_model(tmp_path / "nine", llama_config(9), llama_tensors(9))
    check_demo(capsys, "--model", str(tmp_path / "nine"))


def test_the_demo_is_an_uneven_plan(capsys: pytest.CaptureFixture[str]) -> None:
    check_demo(capsys)
