"""Checkpoints of published size, headers only, planned on the clusters that people have."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from cluster.dry_run import main
from cluster.errors import EXIT_DOES_NOT_FIT, EXIT_OK
from planner.headers import read_headers
from planner.node_profile import GB
from planner.plan import Plan
from shard_loader import proof_store
from tests.big_shapes import CASES, PUBLISHED, SHAPES, cluster_file, write_shape

# Parameters by the model cards; a quantised weight also has its part of a scale and a bias.
CARD_PARAMS = {"Qwen3": 1.7e9, "GLM-4.7": 30e9, "Qwen3-235B": 235e9, "DeepSeek": 671e9}
WEIGHT_BYTES = {"bf16": 2, "8bit": 8.5 / 8, "4bit": 4.5 / 8}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("shapes")

    @cache
    def written(name: str) -> Path:
        return write_shape(name, folder / name)

    return written


@pytest.fixture(autouse=True)
def no_proofs_of_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only those that come with the release."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def plan(tmp_path: Path, capsys: pytest.CaptureFixture[str], cluster: str, model: Path) -> tuple[int, Any]:
    config = tmp_path / "cluster.json"
    config.write_text(json.dumps(cluster_file(cluster, model)))
    code = main(["--config", str(config), "--json"])
    printed = capsys.readouterr()
    assert printed.err == ""  # nothing was proven, nothing was missing
    return code, json.loads(printed.out)


@pytest.mark.parametrize(("name", "cluster"), CASES)
def test_a_large_model_is_planned_from_headers(
    name: str, cluster: str, shapes: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, data = plan(tmp_path, capsys, cluster, shapes(name))
    assert (code, data["fits"]) == (EXIT_OK, True)
    made = Plan.from_json(json.dumps(data))
    num_layers = SHAPES[name].config["num_hidden_layers"]
    assert sum(part.stop - part.start for part in made.assignments) == made.num_layers == num_layers
    assert all(part.need_bytes <= part.budget_bytes for part in made.assignments)
    params = next(value for key, value in reversed(CARD_PARAMS.items()) if name.startswith(key))
    known_bytes = params * WEIGHT_BYTES[name.rpartition("-")[2]]
    assert data["memory"]["full_model_bytes"] == pytest.approx(known_bytes, rel=0.015)
    extra_bytes = sum(part.weight_bytes for part in made.assignments) - data["memory"]["full_model_bytes"]
    assert extra_bytes == 0  # none of these splits has a copy of a tied embedding
    assert 5 < made.predicted.decode_tok_s < 200


def test_what_is_too_large_is_refused_with_the_missing_bytes(
    shapes: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, data = plan(tmp_path, capsys, "desk", shapes("Qwen3-235B-A22B-4bit"))
    assert (code, data["fits"]) == (EXIT_DOES_NOT_FIT, False)
    budgets_bytes = (64 * 0.75 - 6.4) * 2 * GB + 8.67 * GB
    assert data["refusal"]["missing_bytes"] == pytest.approx(132.3 * GB + 1.6 * GB - budgets_bytes, rel=0.02)


def test_files_are_holes(shapes: Any) -> None:
    folder = shapes("Qwen3-235B-A22B-4bit")
    sizes = [path.stat() for path in folder.glob("*.safetensors")]
    assert sum(stat.st_size for stat in sizes) > 132 * GB
    assert sum(stat.st_blocks * 512 for stat in sizes) < GB // 100
    headers = read_headers(folder)
    assert headers["model.layers.93.mlp.switch_mlp.up_proj.weight"].shape == (128, 1536, 512)
    assert headers["model.layers.93.mlp.gate.weight"].shape == (128, 1024)  # 8 bits, as mlx-lm keeps routers


def test_experts_may_lie_one_by_one(shapes: Any) -> None:
    headers = read_headers(shapes("DeepSeek-V3-bf16"))
    assert len(headers) == 45_456
    assert headers["model.layers.60.mlp.experts.255.down_proj.weight"].shape == (7168, 2048)


@pytest.mark.parametrize("config", PUBLISHED, ids=lambda config: str(config["model_type"]))
def test_proofs_of_published_configs_come_with_the_release(config: dict[str, Any]) -> None:
    published = config | {"bos_token_id": 1, "torch_dtype": "bfloat16", "quantization": {"bits": 4}}
    proofs = proof_store.find(published, None)
    assert proofs is not None
    assert [proof.exact for proof in proofs] == [True] * (config["num_hidden_layers"] - 1)
