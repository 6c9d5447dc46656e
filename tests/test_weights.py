from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from planner.headers import ModelFilesError, read_headers
from planner.load_options import LoadOptions
from shard_loader.making import Making
from shard_loader.shard import ShardError
from shard_loader.weights import WeightsError, _portions, build, load_lazily, load_shard
from tests.tiny_models import write_checkpoint

NUM_LAYERS = 7


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return write_checkpoint("llama", tmp_path / "llama", num_layers=NUM_LAYERS)


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes the tensors of a checkpoint of one file."""
    file = str(folder / "model.safetensors")
    weights = mx.load(file)
    mx.eval(weights)
    change(weights)
    mx.save_safetensors(file, weights)


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_progress_counts_every_owned_byte(llama: Path) -> None:
    seen: list[tuple[int, int]] = []
    shard = load_shard(llama, 2, NUM_LAYERS, on_progress=lambda loaded, total: seen.append((loaded, total)))
    total = shard.footprint.total_bytes
    assert seen[0] == (0, total)
    assert seen[-1] == (total, total)
    assert [loaded for loaded, _ in seen] == sorted({loaded for loaded, _ in seen})
    assert len(seen) == 1 + 5 + 1  # five layers, then norm and head


def test_only_own_parameters_are_loaded(llama: Path) -> None:
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    shard = load_shard(llama, 3, 5)
    own_bytes = shard.footprint.total_bytes
    assert shard.footprint.full_model_bytes > 3 * own_bytes
    assert mx.get_active_memory() - before <= 1.02 * own_bytes
    assert mx.get_peak_memory() - before <= 1.05 * own_bytes + shard.new_state().nbytes + 2 * 256 * 64 * 4 * 2


def test_own_bytes_are_those_of_the_files(llama: Path) -> None:
    headers = read_headers(llama)
    shard = load_shard(llama, 0, 2)
    expected = {
        n: h.nbytes for n, h in headers.items() if n.startswith(("model.layers.0.", "model.layers.1."))
    }
    loaded = {name: array.nbytes for group in shard.ownership.layers for name, array in group.items()}
    assert loaded == expected
    assert shard.footprint.embed_bytes == headers["model.embed_tokens.weight"].nbytes


@pytest.mark.parametrize("name", ["lm_head.weight", "model.norm.weight", "model.layers.6.mlp.up_proj.weight"])
def test_a_missing_tensor_fails_by_name_on_every_stage(llama: Path, name: str) -> None:
    rewrite(llama, lambda weights: weights.pop(name))
    for start, stop in ((0, 2), (2, NUM_LAYERS)):
        with pytest.raises(WeightsError, match=rf"^the checkpoint lacks tensor '{name}'$"):
            load_shard(llama, start, stop)


def test_several_missing_tensors_are_counted(llama: Path) -> None:
    def drop(weights: dict[str, Any]) -> None:
        for name in [name for name in weights if name.startswith("model.layers.4.mlp")]:
            del weights[name]

    rewrite(llama, drop)
    with pytest.raises(WeightsError, match=r"lacks tensor 'model.layers.4.mlp.down_proj.weight' and 2 more$"):
        load_shard(llama, 0, 2)


def test_an_unexpected_tensor_fails_by_name(llama: Path) -> None:
    rewrite(llama, lambda weights: weights.update({"model.extra": mx.zeros((2,))}))
    with pytest.raises(WeightsError, match=r"^the model has no place for tensor 'model.extra'$"):
        load_shard(llama, 0, 2)


def test_a_wrong_shape_fails_by_name(llama: Path) -> None:
    rewrite(llama, lambda weights: weights.update({"model.norm.weight": mx.zeros((65,))}))
    with pytest.raises(
        WeightsError, match=r"tensor 'model.norm.weight' has the shape \(65,\); the config asks for \(64,\)"
    ):
        load_shard(llama, 0, 2)


def test_a_missing_expert_fails_by_name(tmp_path: Path) -> None:
    folder = write_checkpoint("qwen3_moe", tmp_path, num_layers=3, unstack_experts=True)
    rewrite(folder, lambda weights: weights.pop("model.layers.1.mlp.experts.5.down_proj.weight"))
    with pytest.raises(WeightsError, match=r"no tensor 'model.layers.1.mlp.experts.5.down_proj.weight'$"):
        load_shard(folder, 0, 1)


def test_an_unknown_architecture_is_one_sentence(llama: Path) -> None:
    edit_config(llama, model_type="no_such_model")
    with pytest.raises(WeightsError, match=r"no_such_model not supported") as caught:
        load_shard(llama, 0, 2)
    assert "\n" not in str(caught.value)


def test_a_config_without_a_needed_value_is_one_sentence(llama: Path) -> None:
    config = json.loads((llama / "config.json").read_text())
    del config["vocab_size"]
    (llama / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match="vocab_size"):
        load_shard(llama, 0, 2)


def test_custom_code_is_refused(llama: Path) -> None:
    edit_config(llama, model_file="evil.py")
    (llama / "evil.py").write_text("raise SystemExit('ran')")
    with pytest.raises(WeightsError, match="custom"):
        load_shard(llama, 0, 2)


def test_a_file_that_is_cut_short_is_named(llama: Path) -> None:
    path = llama / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelFilesError, match=r"model.safetensors is truncated"):
        load_shard(llama, 0, 2)


def test_a_missing_file_of_the_index_is_named_by_those_who_read_it(tmp_path: Path) -> None:
    folder = write_checkpoint("llama", tmp_path, num_layers=NUM_LAYERS, max_shard_bytes=300_000)
    (folder / "model-00002-of-00005.safetensors").unlink()
    sentence = r"model-00002-of-00005.safetensors is missing, and layers 0:2 read model\.layers\.1\."
    with pytest.raises(WeightsError, match=sentence):
        load_shard(folder, 0, 2)
    load_shard(folder, 4, 6)


def test_a_range_outside_the_model_is_refused(llama: Path) -> None:
    with pytest.raises(ShardError, match=r"layers \[5, 9\) do not lie within the model's 7 layers"):
        load_shard(llama, 5, 9)


def test_computed_tensors_are_made_one_by_one(tmp_path: Path) -> None:
    wide = {"hidden_size": 256, "moe_intermediate_size": 256}
    folder = write_checkpoint("qwen3_moe", tmp_path, num_layers=3, unstack_experts=True, overrides=wide)
    model, workshop = build(folder, LoadOptions())
    layer = model.layers[0]
    experts = layer.mlp.switch_mlp
    arrays = (experts.up_proj.weight, layer.mlp.gate.weight, experts.down_proj.weight)
    portions = list(_portions({str(i): array for i, array in enumerate(arrays)}, workshop))
    assert [isinstance(portion, Making) for portion in portions] == [True, True, False]


def test_the_loaded_model_has_its_own_class(llama: Path) -> None:
    assert type(load_lazily(llama)).__module__ == "mlx_lm.models.llama"
    assert type(load_lazily(llama)).__mro__[1].__name__ == "Module"


MEASURE = """
import sys
from pathlib import Path
from cluster.usage import peak_rss_bytes as peak
from planner.load_options import LoadOptions, Quantization
from shard_loader.weights import load_shard
base = peak()
options = LoadOptions(Quantization.of(sys.argv[4]) if sys.argv[4] else None)
shard = load_shard(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), options=options)
print((peak() - base) / shard.footprint.total_bytes)
"""


def peak_ratio(folder: Path, start: int, stop: int, mode: str = "") -> float:
    """Peak memory above the import base over the shard's bytes, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(folder), str(start), str(stop), mode],
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout)


@pytest.mark.long
def test_peak_memory_of_a_shard_of_a_large_checkpoint(tmp_path: Path) -> None:
    folder = write_checkpoint(
        "llama",
        tmp_path,
        num_layers=13,
        dtype=mx.bfloat16,
        max_shard_bytes=300_000_000,
        overrides={
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 32000,
        },
    )
    assert max(peak_ratio(folder, *stage) for stage in ((0, 5), (5, 9), (9, 13))) <= 1.05


@pytest.mark.long
def test_peak_memory_where_weights_are_quantised(tmp_path: Path) -> None:
    folder = write_checkpoint(
        "llama",
        tmp_path,
        num_layers=5,
        dtype=mx.bfloat16,
        overrides={
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_attention_heads": 16,
            "head_dim": 128,
        },
    )
    assert max(peak_ratio(folder, *stage, "affine") for stage in ((0, 3), (3, 5))) <= 1.15


@pytest.mark.long
def test_peak_memory_where_experts_are_stacked(tmp_path: Path) -> None:
    folder = write_checkpoint(
        "qwen3_moe",
        tmp_path,
        num_layers=11,
        unstack_experts=True,
        max_shard_bytes=400_000_000,
        overrides={"hidden_size": 512, "moe_intermediate_size": 512, "num_experts": 32},
    )
    assert max(peak_ratio(folder, *stage) for stage in ((0, 3), (3, 7), (7, 11))) <= 1.15
