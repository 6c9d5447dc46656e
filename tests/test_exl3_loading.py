"""EXL3 checkpoints as shards: the numbers of the weights they stand for, their bytes, and what is refused."""

from __future__ import annotations

import itertools
import json
import zlib
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import qwen3_moe
from mlx_lm.utils import load_model

from kernels.exl3 import Exl3Linear, Exl3Parts, Exl3SwitchLinear
from kernels.exl3_reference import CODEBOOKS
from planner.adapters import AdapterFiles
from planner.headers import ModelFilesError, read_headers
from planner.load_options import LoadOptions, Quantization
from planner.model_profile import read_model_profile
from shard_loader import making
from shard_loader.adapters import load_adapters
from shard_loader.shard_cache import CacheSettings
from shard_loader.survey import own_tensors
from shard_loader.weights import WeightsError, load_lazily, load_shard
from tests.test_weights import edit_config, rewrite
from tests.tiny_adapters import adapted, write_adapter
from tests.tiny_exl3 import Kind, three_bits, write_exl3

TOKENS = mx.array([[1, 5, 9, 200, 33, 4, 7]])
NARROW = {"hidden_size": 96, "head_dim": 24}  # less than a block of 128


def all_kinds(path: str) -> Kind | None:
    """Every number of bits and every codebook, by the name of the weight."""
    if path.endswith((".gate", "embed_tokens")):
        return None
    number = zlib.crc32(path.encode())
    return 1 + number % 8, CODEBOOKS[number // 8 % 3]


def logits_of(folder: Path, cuts: list[int]) -> mx.array:
    """Of TOKENS through stages cut there."""
    carry: Any = None
    for start, stop in itertools.pairwise(cuts):
        shard = load_shard(folder, start, stop)
        carry = shard.forward(TOKENS, carry, shard.new_state())
    return mx.array(carry)


@pytest.mark.parametrize(
    ("arch", "overrides"), [("llama", NARROW), ("qwen3_moe", {}), ("qwen3", {"tie_word_embeddings": True})]
)
def test_a_shard_computes_with_the_weights_that_the_tensors_stand_for(
    tmp_path: Path, arch: str, overrides: dict[str, Any]
) -> None:
    exl3, plain = write_exl3(arch, tmp_path, num_layers=3, kind_of=all_kinds, overrides=overrides)
    expected = load_model(plain)[0](TOKENS)
    whole = logits_of(exl3, [0, 3])
    assert mx.abs(whole - expected).max() < 1e-5 * mx.abs(expected).max()
    assert mx.array_equal(logits_of(exl3, [0, 1, 3]), whole)


@pytest.mark.long
def test_predicted_bytes_are_the_loaded_ones(tmp_path: Path) -> None:
    exl3, _ = write_exl3("qwen3_moe", tmp_path, num_layers=3, kind_of=all_kinds)
    model = read_model_profile(exl3)
    for start, stop in ((0, 1), (1, 3)):
        part = load_shard(exl3, start, stop).footprint
        assert part.layers_bytes == sum(layer.weight_bytes for layer in model.layers[start:stop])
        assert part.head_bytes == (model.head_bytes if stop == 3 else 0)
        assert part.full_model_bytes == model.full_bytes


def test_a_stage_reads_its_own_tensors_only(tmp_path: Path) -> None:
    exl3, _ = write_exl3("qwen3_moe", tmp_path, num_layers=3)
    own = own_tensors(exl3, 1, 2)
    assert all(name.startswith("model.layers.1.") for name in own)
    assert "model.layers.1.mlp.experts.7.down_proj.trellis" in own
    assert "model.layers.1.self_attn.q_proj.suh" in own
    assert own_tensors(exl3, 2, 3) >= {"lm_head.trellis", "lm_head.svh", "model.norm.weight"}


@pytest.mark.long
def test_modules_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    exl3, _ = write_exl3("qwen3_moe", tmp_path, num_layers=3, kind_of=all_kinds)
    model = load_lazily(exl3)
    layer = model.layers[1]
    assert isinstance(layer.self_attn.q_proj, Exl3Linear)
    assert isinstance(layer.mlp.switch_mlp.up_proj, Exl3SwitchLinear)
    assert not isinstance(layer.mlp.gate, Exl3Linear)
    assert layer.mlp.switch_mlp.up_proj.num_experts == 8


@pytest.mark.long
def test_a_tied_head_stays_the_embedding(tmp_path: Path) -> None:
    exl3, _ = write_exl3(
        "qwen3", tmp_path, num_layers=3, overrides={"tie_word_embeddings": True}, kind_of=three_bits
    )
    assert read_model_profile(exl3).is_tied
    assert load_shard(exl3, 2, 3).footprint.head_bytes == read_model_profile(exl3).embed_bytes


@pytest.mark.long
def test_older_signs_and_padded_biases_are_read(tmp_path: Path) -> None:
    exl3, _ = write_exl3("llama", tmp_path, num_layers=3, overrides={**NARROW, "attention_bias": True})
    shorter = logits_of(exl3, [0, 3])

    def pad(weights: dict[str, Any]) -> None:
        for name in [name for name in weights if name.endswith("_proj.bias")]:
            weights[name] = mx.pad(weights[name], (0, 128 - weights[name].shape[0]))

    rewrite(exl3, pad)
    assert mx.array_equal(logits_of(exl3, [0, 3]), shorter)

    def pack(weights: dict[str, Any], leaf: str, *, is_packed: bool) -> None:
        for name in [name for name in weights if name.endswith(f".{leaf}")]:
            bits = np.array(weights.pop(name)) < 0
            words = (bits.reshape(-1, 16) << np.arange(16)).sum(-1).astype(np.uint16).view(np.int16)
            signs = mx.array((1 - 2.0 * bits).astype(np.float16))
            weights |= {name[:-1]: mx.array(words)} if is_packed else {name: signs}

    other = exl3.parent / "packed"
    other.mkdir()
    for file in exl3.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    for folder, is_packed in ((exl3, False), (other, True)):
        rewrite(folder, lambda weights, is_packed=is_packed: pack(weights, "suh", is_packed=is_packed))
    assert mx.array_equal(logits_of(other, [0, 3]), logits_of(exl3, [0, 3]))
    assert read_model_profile(other).full_bytes == read_model_profile(exl3).full_bytes


@pytest.mark.long
def test_what_a_model_joins_may_be_apart_in_the_checkpoint(tmp_path: Path) -> None:
    """phi3 has qkv_proj and gate_up_proj; its EXL3 checkpoints have the parts."""
    config = {
        "partial_rotary_factor": 1.0,
        "rope_traditional": False,
        "original_max_position_embeddings": 4096,
    }
    exl3, _ = write_exl3("llama", tmp_path, num_layers=3, overrides={"num_key_value_heads": 4, **config})
    expected = logits_of(exl3, [0, 3])
    edit_config(exl3, model_type="phi3")
    assert isinstance(load_lazily(exl3).layers[0].self_attn.qkv_proj, Exl3Parts)
    assert isinstance(load_lazily(exl3).layers[0].mlp.gate_up_proj, Exl3Parts)
    assert mx.array_equal(logits_of(exl3, [0, 1, 3]), expected)


@pytest.mark.long
def test_latent_attention_is_made_of_the_decoded_weight(tmp_path: Path) -> None:
    overrides = {"num_attention_heads": 4, "kv_lora_rank": 128, "q_lora_rank": 128, "num_key_value_heads": 4}
    exl3, plain = write_exl3("deepseek_v3", tmp_path, num_layers=3, overrides=overrides)
    assert "model.layers.0.self_attn.kv_b_proj.trellis" in read_headers(exl3)
    expected = load_model(plain)[0](TOKENS)
    whole = logits_of(exl3, [0, 3])
    assert mx.abs(whole - expected).max() < 2e-3 * mx.abs(expected).max()  # decoded to float16
    assert mx.array_equal(logits_of(exl3, [0, 1, 3]), whole)
    loaded = load_shard(exl3, 0, 3).footprint.full_model_bytes
    assert abs(read_model_profile(exl3).full_bytes - loaded) <= 0.01 * loaded


@pytest.mark.long
def test_experts_that_the_model_does_not_stack_itself_are_stacked_for_it(tmp_path: Path) -> None:
    """gpt_oss is published with its experts in one tensor; EXL3 keeps them singly, biases too."""
    exl3, plain = write_exl3("gpt_oss", tmp_path, num_layers=3, overrides={"num_attention_heads": 4})
    expected = load_model(plain)[0](TOKENS)
    whole = logits_of(exl3, [0, 3])
    assert mx.abs(whole - expected).max() < 1e-5 * mx.abs(expected).max()
    assert isinstance(load_lazily(exl3).layers[0].mlp.experts.up_proj, Exl3SwitchLinear)
    rewrite(exl3, lambda weights: [weights.pop(n) for n in list(weights) if ".1.mlp.experts.3.up_proj." in n])
    with pytest.raises(
        WeightsError, match=r"lacks tensor 'model.layers.1.mlp.experts.3.up_proj.trellis': download"
    ):
        load_shard(exl3, 0, 1)


@pytest.mark.long
def test_casting_leaves_the_scales_alone(tmp_path: Path) -> None:
    exl3, _ = write_exl3("llama", tmp_path, num_layers=3)
    shard = load_shard(exl3, 0, 1, options=LoadOptions(dtype="bfloat16"))
    dtypes = {name.rpartition(".")[2]: array.dtype for name, array in shard.ownership.layers[0].items()}
    assert (dtypes["suh"], dtypes["svh"], dtypes["weight"]) == (mx.float16, mx.float16, mx.bfloat16)
    assert shard.dtype == "bfloat16"


@pytest.mark.parametrize("leaf", ["trellis", "suh", "svh"])
def test_a_missing_tensor_fails_by_name(tmp_path: Path, leaf: str) -> None:
    exl3, _ = write_exl3("llama", tmp_path, num_layers=3)
    name = f"model.layers.1.mlp.up_proj.{leaf}"
    rewrite(exl3, lambda weights: weights.pop(name))
    with pytest.raises(WeightsError, match=rf"lacks tensor '{name}': download the model again$"):
        load_shard(exl3, 0, 1)
    with pytest.raises(ModelFilesError, match=rf"lacks tensor '{name}': download the model again$"):
        read_model_profile(exl3)


@pytest.mark.long
def test_a_missing_expert_fails_by_name(tmp_path: Path) -> None:
    exl3, _ = write_exl3("qwen3_moe", tmp_path, num_layers=3)

    def drop(weights: dict[str, Any]) -> None:
        for name in [name for name in weights if ".1.mlp.experts.5.down_proj." in name]:
            del weights[name]

    rewrite(exl3, drop)
    with pytest.raises(
        WeightsError, match=r"no tensor 'model.layers.1.mlp.experts.5.down_proj.(weight|trellis)'$"
    ):
        load_shard(exl3, 0, 1)


@pytest.mark.long
def test_a_wrong_size_fails_by_name(tmp_path: Path) -> None:
    exl3, _ = write_exl3("llama", tmp_path, num_layers=3)
    edit_config(exl3, intermediate_size=512)
    with pytest.raises(
        WeightsError, match=r"mlp\.\w+\.trellis' has \d+ inputs and \d+ outputs; the config asks for"
    ):
        load_shard(exl3, 0, 1)


@pytest.mark.long
def test_quantising_once_more_is_refused(tmp_path: Path) -> None:
    exl3, _ = write_exl3("llama", tmp_path, num_layers=3)
    options = LoadOptions(Quantization(4, 64))
    with pytest.raises(WeightsError, match=r"quantised already: remove load.quantize$"):
        load_shard(exl3, 0, 1, options=options)
    with pytest.raises(ModelFilesError, match=r"is quantised already: remove load.quantize"):
        read_model_profile(exl3, options=options)


@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight.indices", "layers__0__up_proj__indices"])
def test_an_older_trellis_checkpoint_is_refused_with_what_to_do(tmp_path: Path, name: str) -> None:
    exl3, _ = write_exl3("llama", tmp_path, num_layers=3)
    rewrite(exl3, lambda weights: weights.update({name: mx.zeros((2, 2, 96), mx.uint8)}))
    sentence = (
        r"older kind, with indices into a uniform grid: it is not EXL3 .* macrame quantize --format exl3$"
    )
    with pytest.raises(WeightsError, match=sentence):
        load_shard(exl3, 0, 1)
    with pytest.raises(ModelFilesError, match=sentence):
        read_model_profile(exl3)
    (tmp_path / "folders" / "layer_0000").mkdir(parents=True)
    (tmp_path / "folders" / "quantization_index.json").write_text("{}")
    (tmp_path / "folders" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ModelFilesError, match=sentence):
        read_model_profile(tmp_path / "folders")


@pytest.mark.long
def test_a_class_that_computes_with_experts_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model whose sanitize does something else with experts than to stack them."""
    exl3, _ = write_exl3("qwen3_moe", tmp_path, num_layers=3)
    own = qwen3_moe.Model.sanitize

    def doubled(self: Any, weights: dict[str, Any]) -> dict[str, Any]:
        return {n: w * 2 if "switch_mlp" in n else w for n, w in own(self, weights).items()}

    monkeypatch.setattr(qwen3_moe.Model, "sanitize", doubled)
    with pytest.raises(
        WeightsError, match=r"this model class uses the experts of its checkpoint .* no EXL3 form"
    ):
        load_shard(exl3, 0, 1)


@pytest.mark.long
def test_an_unknown_class_is_refused(tmp_path: Path) -> None:
    exl3, _ = write_exl3("llama", tmp_path, num_layers=3)
    edit_config(exl3, model_type="no_such_model")
    with pytest.raises(WeightsError, match="no_such_model not supported"):
        load_shard(exl3, 0, 1)


def test_a_config_without_tensors_of_the_format_is_refused(tmp_path: Path) -> None:
    _, plain = write_exl3("llama", tmp_path, num_layers=3)
    edit_config(plain, quantization_config={"quant_method": "exl3", "bits": 3})
    with pytest.raises(WeightsError, match=r"config.json says exl3, but no tensor is a trellis"):
        load_shard(plain, 0, 1)


def test_two_codebooks_and_odd_widths_are_refused(tmp_path: Path) -> None:
    exl3, _ = write_exl3("llama", tmp_path, num_layers=3)
    path = "model.layers.1.mlp.up_proj"
    rewrite(exl3, lambda weights: weights.update({f"{path}.mul1": mx.array(1)}))
    with pytest.raises(WeightsError, match=rf"{path} names two codebooks, mcg and mul1"):
        load_shard(exl3, 0, 1)
    rewrite(exl3, lambda weights: weights.pop(f"{path}.mul1"))
    rewrite(exl3, lambda weights: weights.update({f"{path}.trellis": mx.zeros((8, 8, 56), mx.int16)}))
    with pytest.raises(
        ModelFilesError, match=r"is I16 \[8, 8, 56\]; EXL3 is read in int16 and whole bits from 1"
    ):
        read_model_profile(exl3)
    with pytest.raises(WeightsError, match=r"a trellis \(8, 8, 56\) has 56 words a tile"):
        load_shard(exl3, 0, 1)


@pytest.mark.long
@pytest.mark.parametrize("arch", ["llama", "qwen3_moe"])
def test_adapters_change_exl3_layers_as_they_do_plain_ones(tmp_path: Path, arch: str) -> None:
    exl3, plain = write_exl3(arch, tmp_path / "models", num_layers=3)
    keys = ["self_attn.q_proj", "mlp.down_proj" if arch == "llama" else "mlp.switch_mlp.down_proj"]
    folder = write_adapter(plain, tmp_path / "sql", keys=keys)
    expected = adapted(plain, folder)(TOKENS)
    shard = load_shard(exl3, 0, 3)
    before = shard.forward(TOKENS, None, shard.new_state())
    adapters = load_adapters(shard, [AdapterFiles("sql", folder)])
    adapters.use("sql")
    after = shard.forward(TOKENS, None, shard.new_state())
    assert mx.abs(after - expected).max() < 1e-5 * mx.abs(expected).max()
    assert mx.abs(before - expected).max() > 1e-3
    dora = write_adapter(plain, tmp_path / "dora", keys=keys[:1], kind="dora")
    with pytest.raises(WeightsError, match="Can't convert layer of type Exl3Linear to LoRA"):
        load_adapters(load_shard(exl3, 0, 3), [AdapterFiles("dora", dora)])


@pytest.mark.long
def test_what_was_stacked_or_cast_is_found_in_the_shard_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(making, "SMALL_BYTES", 1000)
    exl3, _ = write_exl3("qwen3_moe", tmp_path / "models", num_layers=3, kind_of=all_kinds)
    cache = CacheSettings(tmp_path / "cache", is_on=True)
    for number, options in enumerate((LoadOptions(), LoadOptions(dtype="bfloat16"))):
        found = []
        for _ in range(2):
            shard = load_shard(exl3, 0, 3, options=options, cache=cache)
            found.append(shard.forward(TOKENS, None, shard.new_state()))
        assert mx.array_equal(*found)
        assert len(list(cache.folder.glob("*/manifest.json"))) == number + 1
