"""A draft model in a plan: predicted bytes against measured ones, the budget, what is shown and refused."""

from __future__ import annotations

import gc
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from cluster.draft_load import DraftLoad, load_drafter
from cluster.drafter import DraftCall
from cluster.dry_run import main
from cluster.errors import EXIT_DOES_NOT_FIT, EXIT_OK, EXIT_USAGE
from cluster.memory_limits import MemoryNeed
from planner.draft_bytes import draft_part, drafter_on, session_bytes, with_drafter
from planner.draft_part import DraftPart
from planner.model_profile import read_model_profile
from planner.node_profile import GB, NodeProfile, make_node
from planner.plan import Plan, Refusal
from planner.planned_from import PlannedFrom
from planner.render import render_plan
from planner.sizes import gb
from planner.solver import PlanOptions, make_plan
from proto import ring_pb2
from tests.tiny_models import VOCAB_SIZE, write_checkpoint

LAYERS, DRAFT_LAYERS = 5, 3
CONTEXT = 1024


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint("llama", tmp_path_factory.mktemp("big"), num_layers=LAYERS, seed=1)


@pytest.fixture(scope="module")
def drafts(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def make(arch: str) -> Path:
        if arch not in made:
            made[arch] = write_checkpoint(arch, tmp_path_factory.mktemp(arch), num_layers=DRAFT_LAYERS)
        return made[arch]

    return make


def node(rank: int = 0, memory_gb: float = 16, **values: Any) -> NodeProfile:
    return make_node(rank, f"n{rank}", "h", memory_bytes=int(memory_gb * GB), chip="x86", **values)


@pytest.mark.parametrize(
    "arch",
    [
        "gemma3_text",
        *(pytest.param(arch, marks=pytest.mark.long) for arch in ("llama", "qwen3", "mamba2", "deepseek_v3")),
    ],
)
def test_predicted_bytes_are_the_measured_ones(arch: str, drafts: Callable[[str], Path]) -> None:
    """Weights and caches to 3 %; scratch is an upper bound."""
    folder = drafts(arch)
    num_users = 1 if arch == "gemma3_text" else 3  # a window holds a chunk more only while it is read
    profile = read_model_profile(folder)
    part = draft_part(profile, node(), CONTEXT, num_users)
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    drafter = load_drafter(DraftLoad(profile, part, folder, VOCAB_SIZE), folder, lambda loaded, total: None)
    assert drafter.shard.footprint.total_bytes == pytest.approx(part.weight_bytes, rel=0.01)
    base = mx.get_active_memory()
    assert base - before == pytest.approx(part.weight_bytes, rel=0.03, abs=4096 * 64)
    mx.reset_peak_memory()
    prompt = [(7 * i) % 250 for i in range(CONTEXT - 4)]
    most_bytes = 0
    for session in range(num_users):
        guessing = drafter.begin(
            DraftCall(session, [session, *prompt[1:]], 4, ring_pb2.Sampling(), len(prompt))
        )
        while guessing.step():
            most_bytes = max(most_bytes, drafter.kv_bytes)
    assert drafter.num_sessions == num_users
    assert most_bytes == pytest.approx(part.kv_bytes, rel=0.03)
    scratch_bytes = mx.get_peak_memory() - base - most_bytes
    assert scratch_bytes <= part.activation_bytes
    assert drafter.nbytes == drafter.shard.footprint.total_bytes + drafter.kv_bytes


def test_it_comes_off_rank_0s_budget_and_off_no_other(target: Path, drafts: Callable[[str], Path]) -> None:
    draft = read_model_profile(drafts("llama"), "small")
    plain = [node(0), node(1)]
    nodes = with_drafter(plain, draft, CONTEXT, 2)
    part = nodes[0].drafter
    assert part is not None
    assert nodes[0].budget_bytes == plain[0].budget_bytes - part.need_bytes
    assert nodes[1] == plain[1]
    assert with_drafter(plain, None, CONTEXT, 2) == plain
    plan = make_plan(read_model_profile(target), nodes, (), PlanOptions(CONTEXT, 2))
    assert isinstance(plan, Plan)
    assert plan.drafter == part == drafter_on(nodes)
    assert all(a.budget_bytes == nodes[a.rank].budget_bytes for a in plan.assignments)
    assert Plan.from_json(plan.to_json()) == plan
    assert plan.as_dict()["drafter"]["model"] == "small"
    told = PlannedFrom(read_model_profile(target), tuple(nodes), (), PlanOptions(CONTEXT, 2))
    assert PlannedFrom.from_plain(json.loads(told.to_json())) == told
    told_line = f"draft model: small on n0, {gb(part.weight_bytes)} of weights, {gb(part.kv_bytes)} KV, "
    assert f"{told_line}{gb(part.activation_bytes)} scratch, taken off its budget" in render_plan(plan, nodes)


def test_a_plan_without_one_says_nothing_of_it(target: Path) -> None:
    plan = make_plan(read_model_profile(target), [node()], (), PlanOptions(CONTEXT))
    assert isinstance(plan, Plan)
    assert "drafter" not in plan.as_dict()
    assert "draft" not in render_plan(plan, [node()])


def test_a_shorter_context_of_its_own_limits_its_caches(tmp_path: Path) -> None:
    folder = write_checkpoint(
        "llama", tmp_path, num_layers=DRAFT_LAYERS, overrides={"max_position_embeddings": 256}
    )
    draft = read_model_profile(folder)
    assert draft_part(draft, node(), 8192, 2) == draft_part(draft, node(), 256, 2)
    assert draft_part(draft, node(), 8192, 2).kv_bytes == 2 * session_bytes(draft, 256)


def test_one_that_does_not_fit_is_refused(target: Path, drafts: Callable[[str], Path]) -> None:
    draft, model = read_model_profile(drafts("llama"), "small"), read_model_profile(target)
    nodes = with_drafter([node(memory_gb=0.001), node(1)], draft, CONTEXT, 1)
    refusal = make_plan(model, nodes, (), PlanOptions(CONTEXT))
    part = nodes[0].drafter
    assert isinstance(refusal, Refusal)
    assert part is not None
    assert refusal.missing_bytes == part.need_bytes - replace(nodes[0], drafter=None).budget_bytes
    assert refusal.reason.startswith("the draft model small needs ")
    assert " of scratch on n0, whose budget is " in refusal.reason
    assert refusal.advice == (
        'Take a smaller draft model or a smaller context, or set speculation.method to "ngram".'
    )


def test_a_model_that_would_fit_without_it_is_told_so(target: Path, drafts: Callable[[str], Path]) -> None:
    draft, model = read_model_profile(drafts("llama"), "small"), read_model_profile(target)
    options = PlanOptions(CONTEXT)
    alone = make_plan(model, [node()], (), options)
    assert isinstance(alone, Plan)
    least = node(reserve_bytes=16 * GB - alone.assignments[0].need_bytes)
    assert isinstance(make_plan(model, [least], (), options), Plan), "it just fits"
    refusal = make_plan(model, with_drafter([least], draft, CONTEXT, 1), (), options)
    assert isinstance(refusal, Refusal)
    assert refusal.missing_bytes == draft_part(draft, least, CONTEXT, 1).need_bytes
    assert refusal.advice.startswith(
        'Set speculation.method to "ngram": without the draft model, which takes '
    )
    assert " of n0, it fits; or " in refusal.advice


def test_mlxs_limits_have_room_for_it() -> None:
    part = DraftPart("small", 0, "n0", weight_bytes=30, kv_bytes=20, activation_bytes=10)
    need = MemoryNeed(need_bytes=100, activation_bytes=5, budget_bytes=200, reserve_bytes=50)
    assert need.with_drafter(part) == MemoryNeed(160, 10, 260, 50)


# -- plan-dry-run -----------------------------------------------------------------------------------------
def dry_run(
    folder: Path, capsys: pytest.CaptureFixture[str], model: Path, speculation: dict[str, Any], *flags: str
) -> tuple[int, str, str]:
    nodes = [
        {"name": f"n{i}", "host": f"h{i}", "chip": "Apple M4", "gpu_cores": 10, "memory_gb": 16}
        for i in (0, 1)
    ]
    path = folder / "cluster.json"
    document = {"model": str(model), "context": CONTEXT, "nodes": nodes, "speculation": speculation}
    path.write_text(json.dumps(document))
    code = main(["--config", str(path), *flags])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_a_dry_run_shows_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], target: Path, drafts: Callable[[str], Path]
) -> None:
    speculation = {"draft_model": str(drafts("llama"))}
    code, out, _ = dry_run(tmp_path, capsys, target, speculation)
    assert code == EXIT_OK
    assert f"draft model: {drafts('llama')} on n0, " in out
    code, out, _ = dry_run(tmp_path, capsys, target, speculation, "--json")
    part = json.loads(out)["drafter"]
    profile = read_model_profile(drafts("llama"), str(drafts("llama")))
    assert (part["rank"], part["node"], part["weight_bytes"]) == (0, "n0", profile.full_bytes)
    assert part["kv_bytes"] == session_bytes(profile, CONTEXT)
    for method in ("ngram", "off"):
        code, out, _ = dry_run(tmp_path, capsys, target, speculation | {"method": method}, "--json")
        assert (code, "drafter" in json.loads(out)) == (EXIT_OK, False)


def test_a_dry_run_refuses_what_does_not_fit_with_its_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], target: Path
) -> None:
    draft = write_checkpoint(
        "llama", tmp_path / "draft", num_layers=1, overrides={"max_position_embeddings": 10**9}
    )
    speculation = {"draft_model": str(draft)}
    code, out, _ = dry_run(tmp_path, capsys, target, speculation, "--json", "--context", str(10**8))
    data = json.loads(out)
    assert (code, data["fits"]) == (EXIT_DOES_NOT_FIT, False)
    assert "the draft model" in data["refusal"]["reason"]
    assert data["drafter"]["kv_bytes"] > 10**10


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("vocabulary", ""),
        ("gone", "there is no model folder"),
        ("empty", "has no config.json"),
    ],
)
def test_a_dry_run_refuses_one_that_cannot_guess(
    change: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], target: Path
) -> None:
    draft = tmp_path / "draft"
    if change == "vocabulary":
        write_checkpoint("llama", draft, num_layers=1)
        file = draft / "tokenizer.json"
        content = json.loads(file.read_text())
        vocab = content["model"]["vocab"]
        piece = next(text for text, number in vocab.items() if number == 65)
        del vocab[piece]
        vocab["new"] = 65
        told = rf"is not that of .*\(token 65 is 'new' in one and '{piece}' in the other\); choose a model"
        file.write_text(json.dumps(content))
    elif change == "empty":
        draft.mkdir()
    code, _, err = dry_run(tmp_path, capsys, target, {"draft_model": str(draft)})
    assert code == EXIT_USAGE
    assert "speculation.draft_model = " in err
    assert re.search(told, err), err
