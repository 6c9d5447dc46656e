"""What headers predict of quantised and cast weights is what a load gives, within 1 %; the plan shows it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from cluster.dry_run import main
from planner.load_options import LoadOptions, Quantization
from planner.model_profile import read_model_profile
from shard_loader.weights import load_shard
from tests.tiny_models import write_checkpoint

NUM_LAYERS = 3
PROPORTIONS: dict[str, Any] = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8}
WIDER: dict[str, dict[str, Any]] = {
    "llama": PROPORTIONS,
    "qwen3": PROPORTIONS,
    "gemma3_text": PROPORTIONS,
    "qwen3_moe": {"hidden_size": 512, "moe_intermediate_size": 512},
    "deepseek_v3": {
        "hidden_size": 512,
        "moe_intermediate_size": 512,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "kv_lora_rank": 128,
        "v_head_dim": 64,
        "qk_nope_head_dim": 64,
    },
    "mamba2": {"hidden_size": 512, "num_heads": 32, "head_dim": 32},
}


@pytest.mark.parametrize(
    "options",
    [
        LoadOptions(Quantization.of("affine")),
        LoadOptions(Quantization.of("mxfp4"), "bfloat16"),
        LoadOptions(Quantization.of("nvfp4"), "float16"),
        LoadOptions(dtype="float32"),
    ],
    ids=["affine4", "mxfp4", "nvfp4", "cast"],
)
@pytest.mark.parametrize("arch", WIDER)
def test_predicted_bytes_are_the_loaded_ones(arch: str, options: LoadOptions, tmp_path: Path) -> None:
    source = write_checkpoint(
        arch,
        tmp_path,
        num_layers=NUM_LAYERS,
        dtype=mx.bfloat16,
        overrides=WIDER[arch] | {"torch_dtype": "bfloat16"},
        unstack_experts=arch == "qwen3_moe",
    )
    predicted = read_model_profile(source, options=options).full_bytes
    measured = load_shard(source, 0, NUM_LAYERS, options=options).footprint.total_bytes
    assert predicted == pytest.approx(measured, rel=0.01), json.dumps([predicted, measured])


def test_the_plan_counts_weights_as_they_will_be_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_checkpoint("llama", tmp_path / "wide", num_layers=3, overrides={"hidden_size": 256})
    full_bytes = {}
    for name, part in (("plain", {}), ("4 bits", {"quantize": {"bits": 4}}), ("half", {"dtype": "float16"})):
        path = tmp_path / "cluster.json"
        node = {"host": "localhost", "memory_gb": 16, "chip": "Apple M4"}
        path.write_text(json.dumps({"model": str(model), "nodes": [node], "load": part}))
        assert main(["--config", str(path), "--json"]) == 0
        full_bytes[name] = json.loads(capsys.readouterr().out)["memory"]["full_model_bytes"]
    assert full_bytes["half"] * 2 == full_bytes["plain"]
    assert full_bytes["4 bits"] / full_bytes["plain"] == pytest.approx(5 / 32, rel=0.02)  # float32 scales


def test_quantising_twice_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    how = {"bits": 4, "group_size": 32}
    model = write_checkpoint("llama", tmp_path / "packed", num_layers=3, quantize=how)
    path = tmp_path / "cluster.json"
    node = {"host": "localhost", "memory_gb": 16}
    path.write_text(json.dumps({"model": str(model), "nodes": [node], "load": {"quantize": {}}}))
    assert main(["--config", str(path)]) == 3
    assert "is quantised already: remove load.quantize" in capsys.readouterr().err
