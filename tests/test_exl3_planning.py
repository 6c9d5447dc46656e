"""EXL3 checkpoints in plans: what a header stands for, the rate of decoding, and what a user reads."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from cluster.dry_run import main
from planner import exl3, exl3_shapes
from planner.chips import find_chip
from planner.cost import CostModel
from planner.headers import ModelFilesError, TensorHeader, read_config, read_headers
from planner.kv_profile import PREFILL_CHUNK_TOKENS as CHUNK
from planner.kv_profile import first_int
from planner.load_options import is_packed
from planner.model_profile import EXPERTS_KEYS, NUM_LAYERS_KEYS, flat_config, read_model_profile
from planner.node_profile import GB, make_node
from planner.parts import split_parts
from planner.precision import convert, num_params
from planner.speeds import DECODE_FLOPS, FormatRate, Speeds, table_speeds
from planner.workload import Workload
from shard_loader.rehearsal import Rehearsal, RehearsalError
from shard_loader.weights import load_shard
from tests.tiny_exl3 import three_bits, write_exl3
from tests.zoo.configs import module_names, zoo_config

NODES = [{"host": f"10.0.0.{i}", "memory_gb": 16, "chip": "Apple M4"} for i in (1, 2)]
WIDER = {"hidden_size": 256, "intermediate_size": 768, "kv_lora_rank": 128, "q_lora_rank": 128}
EXL3 = {"quantization_config": {"quant_method": "exl3", "bits": 3.0, "head_bits": 6}}


def group(path: str, num_out: int, num_in: int, bits: int, **more: TensorHeader) -> dict[str, TensorHeader]:
    """The headers of one weight."""
    made = {
        "trellis": ("I16", (num_in // 16, num_out // 16, 16 * bits), num_in * num_out * bits // 8),
        "suh": ("F16", (num_in,), 2 * num_in),
        "svh": ("F16", (num_out,), 2 * num_out),
        "mcg": ("I32", (), 4),
    }
    found = {
        f"{path}.{leaf}": TensorHeader(f"{path}.{leaf}", *h[:2], "f", 0, h[2]) for leaf, h in made.items()
    }
    return found | more


def test_a_group_of_tensors_becomes_one_matrix_with_its_bytes_in_memory() -> None:
    (only,) = exl3.fold(EXL3, group("a.q_proj", 256, 384, 3), "m").values()
    assert (only.name, only.dtype, only.shape) == ("a.q_proj.weight", "EXL3-3", (256, 384))
    assert only.nbytes == 256 * 384 * 3 // 8 + 2 * (256 + 384)  # the codebook's scalar is not kept
    assert exl3.bits_of(only.dtype) == 3
    assert exl3.bits_of("BF16") == 0


def test_what_is_not_exl3_stays_as_it_is() -> None:
    plain = {"a.weight": TensorHeader("a.weight", "F16", (4, 4), "f", 0, 32)}
    assert exl3.fold({}, plain, "m") == plain
    assert exl3.told(plain.values()) == ""


@pytest.mark.parametrize(
    ("drop", "sentence"),
    [
        ("suh", "lacks tensor 'a.b.suh': download the model again"),
        ("svh", "lacks tensor 'a.b.svh': download the model again"),
        ("trellis", "lacks tensor 'a.b.trellis': download the model again"),
    ],
)
def test_a_part_that_is_missing_is_named(drop: str, sentence: str) -> None:
    headers = group("a.b", 128, 128, 3)
    del headers[f"a.b.{drop}"]
    with pytest.raises(ModelFilesError, match=sentence):
        exl3.fold(EXL3, headers, "m")


def test_scales_of_another_size_are_refused() -> None:
    headers = group("a.b", 128, 128, 3) | {"a.b.suh": TensorHeader("a.b.suh", "F16", (64,), "f", 0, 128)}
    with pytest.raises(ModelFilesError, match=r"a\.b\.suh has 64 channels, its trellis 128"):
        exl3.fold(EXL3, headers, "m")


def test_a_weight_that_is_there_twice_is_refused() -> None:
    twice = TensorHeader("a.b.weight", "F16", (128, 128), "f", 0, 2 * 128 * 128)
    with pytest.raises(ModelFilesError, match=r"a\.b is there twice, as weight and as trellis"):
        exl3.fold(EXL3, group("a.b", 128, 128, 3) | {"a.b.weight": twice}, "m")


def test_bits_are_told_by_number_of_tensors() -> None:
    headers = {**group("a", 128, 256, 2), **group("b", 128, 256, 3), **group("c", 128, 256, 3)}
    folded = exl3.fold(EXL3, headers, "m")
    assert exl3.told(folded.values()) == "2.85 bits a weight (1 tensors of 2, 2 of 3)"


def test_decoding_bounds_what_a_chip_reads_of_exl3_until_it_was_measured() -> None:
    speeds = table_speeds(find_chip("Apple M4 Max", 40))
    assert speeds.weight_bytes_ms("affine4/64") == speeds.read_bytes_ms
    three, eight = (speeds.weight_bytes_ms(f"exl3/{bits}") for bits in (3, 8))
    assert three == speeds.flops_ms / DECODE_FLOPS * 3 / 8 < speeds.read_bytes_ms
    assert eight == min(speeds.read_bytes_ms, three * 8 / 3)
    measured = Speeds(1e8, 1e9, formats=(FormatRate("exl3/3", 1e6, 1e9),), source="measured")
    assert measured.weight_bytes_ms("exl3/3") == 1e8


def test_a_plan_says_the_bits_and_keeps_the_caches(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, plain = write_exl3("llama", tmp_path / "models", num_layers=5, overrides={"hidden_size": 96})
    config = tmp_path / "cluster.json"
    config.write_text(json.dumps({"model": str(model), "nodes": NODES, "context": 512}))
    assert main(["--config", str(config)]) == 0
    precision = read_model_profile(model).precision
    assert precision.endswith(" bits a weight (35 tensors of 3, 1 of 6)")
    assert f"note: EXL3 weights, {precision}\n" in capsys.readouterr().out
    assert main(["--config", str(config), "--json"]) == 0
    packed = json.loads(capsys.readouterr().out)
    assert main(["--config", str(config), "--json", "--model", str(plain)]) == 0
    dense = json.loads(capsys.readouterr().out)
    for one, other in zip(packed["assignments"], dense["assignments"], strict=False):
        assert one["kv_bytes"] * (other["stop"] - other["start"]) == other["kv_bytes"] * (
            one["stop"] - one["start"]
        )
    assert packed["memory"]["full_model_bytes"] < dense["memory"]["full_model_bytes"]


def damaged(folder: Path, change: Callable[[dict[str, mx.array]], object]) -> Path:
    """A copy of an EXL3 folder with other tensors."""
    weights: dict[str, mx.array] = {}
    for file in folder.glob("*.safetensors"):
        weights |= mx.load(str(file))  # type: ignore[arg-type]
    change(weights)
    copy = folder.with_name("damaged")
    copy.mkdir(exist_ok=True)
    (copy / "config.json").write_text((folder / "config.json").read_text())
    mx.save_safetensors(str(copy / "model.safetensors"), weights)
    return copy


@pytest.mark.parametrize(
    ("path", "axis", "sentence"),
    [
        ("0.mlp.experts.7", None, "lacks tensor 'model.layers.0.mlp.experts.7.down_proj.trellis'"),
        ("0.mlp.experts.2.up_proj", None, "lacks tensor 'model.layers.0.mlp.experts.2.up_proj.trellis'"),
        ("0.mlp.experts.5.up_proj", 0, "experts.5.up_proj has 256 inputs, where other experts have 128"),
        ("0.self_attn.q_proj", 0, "q_proj has 256 inputs, where what it works with has 128"),
        ("0.self_attn.o_proj", 1, "o_proj has 256 outputs, where what it works with has 128"),
        ("1.self_attn.q_proj", 1, "1.self_attn.q_proj has 256 outputs, where other layers have 128"),
        ("2.self_attn.o_proj", 0, "2.self_attn.o_proj has 256 inputs, where other layers have 128"),
    ],
)
def test_a_plan_of_a_damaged_folder_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], path: str, axis: int | None, sentence: str
) -> None:
    """An expert without its tensors, and a weight of twice its width; axis None: the tensors are gone."""
    whole, _ = write_exl3("qwen3_moe", tmp_path, num_layers=1 if path.startswith("0.") else 3)

    def change(weights: dict[str, mx.array]) -> None:
        found = [name for name in weights if name.startswith(f"model.layers.{path}.")]
        for name in found:
            if axis is None:
                del weights[name]
            elif name.endswith(("trellis", ("suh", "svh")[axis])):
                along = axis if name.endswith("trellis") else 0
                weights[name] = mx.concatenate([weights[name]] * 2, axis=along)

    file = tmp_path / "cluster.json"
    file.write_text(json.dumps({"model": str(damaged(whole, change)), "nodes": NODES, "context": 512}))
    assert main(["--config", str(file)]) == 3
    said = capsys.readouterr()
    assert said.err.count("\n") == 1
    assert sentence in said.err
    assert said.out == ""


@pytest.mark.long
def test_no_architecture_of_mlx_lm_is_taken_for_a_damaged_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights of each architecture's tiny model as if they were EXL3's, without padding."""
    monkeypatch.setattr(exl3_shapes, "BLOCK", 1)
    num_checked = 0
    for name in module_names():
        try:
            rehearsal = Rehearsal(zoo_config(name))
        except (RehearsalError, KeyError, SystemExit):
            continue
        headers: dict[str, TensorHeader] = {}
        for tensor, array in tree_flatten(rehearsal.model.parameters()):
            single = [array] if array.ndim < 3 or "weight" not in tensor else list(array)
            for number, one in enumerate(single):
                place = f"experts.{number}." if len(single) > 1 else "experts."
                own = re.sub(r"\b(switch_mlp|switch_glu|experts)\.", place, tensor, count=1)
                dtype = "EXL3-3" if one.ndim == 2 and tensor.endswith(".weight") else "F32"
                headers[own] = TensorHeader(own, dtype, tuple(one.shape), "f", 0, one.nbytes)
        flat = flat_config(rehearsal.config)
        layers = split_parts(headers, first_int(flat, NUM_LAYERS_KEYS) or None, name).layers
        if not any("scales" in tensor for tensor in headers):
            exl3_shapes.check_shapes(layers, flat, first_int(flat, EXPERTS_KEYS), name)
            num_checked += 1
    assert num_checked > 100


@pytest.mark.long
def test_other_precisions_are_reckoned_from_the_weights_it_stands_for(tmp_path: Path) -> None:
    model, plain = write_exl3("qwen3_moe", tmp_path, num_layers=3, kind_of=three_bits)
    exl3_files, plain_files = ((read_config(f), read_headers(f)) for f in (model, plain))
    assert num_params(*exl3_files) >= num_params(*plain_files)  # padded
    assert is_packed(exl3_files[0])
    _, headers, _ = convert(*exl3_files, 16)
    assert headers["model.layers.0.self_attn.q_proj.weight"].dtype == "BF16"


@pytest.mark.long
@pytest.mark.parametrize("arch", ["llama", "qwen3_moe", "deepseek_v3"])
@pytest.mark.parametrize("num_chunks", [1, 3])
def test_scratch_covers_a_prefill_chunk(tmp_path: Path, arch: str, num_chunks: int) -> None:
    """As tests/test_model_profile.py measures it, in MLX's own operations."""
    folder, _ = write_exl3(arch, tmp_path, num_layers=5, overrides=WIDER)
    node = make_node(0, "n", "h", memory_bytes=8 * GB, chip="AMD EPYC")
    cost = CostModel(read_model_profile(folder), [node], (), Workload(num_chunks * CHUNK, 1))
    shard = load_shard(folder, 0, 5)
    state = shard.new_state()
    old_limit = mx.set_cache_limit(0)
    try:
        before_bytes = mx.get_active_memory()
        mx.reset_peak_memory()
        for _ in range(num_chunks):
            logits = shard.forward(mx.zeros((1, CHUNK), mx.int32), None, state)
            mx.eval(logits, state.arrays())
            del logits
        used_bytes = mx.get_peak_memory() - before_bytes
    finally:
        mx.set_cache_limit(old_limit)
    assert used_bytes <= 1.05 * (cost.kv_bytes(0, 5) + cost.activation_bytes(0, 0, 5))
