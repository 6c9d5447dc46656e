"""`macrame quantize`: what it writes loads, it goes on where it was killed, and says what it cannot do."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load_model

import cluster.quantize_affine
import cluster.quantize_exl3
from cluster.quantize_exl3 import choose_layers
from cluster.quantize_source import load_plain, read_source
from deploy.quantize import main
from kernels.exl3_reference import dense
from shard_loader.weights import load_shard
from tests.test_exl3_encode_linear import fast_search
from tests.tiny_exl3 import write_exl3
from tests.tiny_models import write_checkpoint

TOKENS = mx.array([[1, 5, 9, 200, 33, 4, 7]])
WIDE = {
    "hidden_size": 128,
    "head_dim": 64,
    "num_attention_heads": 2,
    "moe_intermediate_size": 128,
    "num_experts": 3,
}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Walks that are closed but far from the best, so that a model takes no time."""
    monkeypatch.setattr(cluster.quantize_exl3, "make_search", lambda: fast_search)


def a_model(folder: Path, arch: str = "qwen3_moe", num_layers: int = 1, **options: Any) -> Path:
    return write_checkpoint(arch, folder, num_layers=num_layers, overrides=WIDE, **options)


def a_text(folder: Path) -> Path:
    file = folder / "text.txt"
    file.write_text("".join(f"line {i} of {i * i} and {i % 7}\n" for i in range(400)))
    return file


def run(model: Path, output: Path, *more: str) -> int:
    text = str(a_text(output.parent))
    few = [] if "affine" in more else ["--calibration", text, "--calibration-tokens", "1024"]
    return main(["--model", str(model), "--output", str(output), *few, *more])


def tensors(folder: Path) -> dict[str, mx.array]:
    found: dict[str, mx.array] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= mx.load(str(file))  # type: ignore[arg-type]
    return found


def decoded_model(folder: Path, plain: Path) -> Path:
    """The plain model with the weights that the EXL3 one stands for, by the reference."""
    stored, weights = tensors(folder), tensors(plain)
    for name in list(weights):
        path = name.removesuffix(".weight")
        if f"{path}.trellis" in stored:
            parts = (np.array(stored[f"{path}.{leaf}"]) for leaf in ("trellis", "suh", "svh"))
            out, inner = weights[name].shape
            weights[name] = mx.array(dense(*parts, "mcg")[:out, :inner].astype(np.float32))
    copy = plain.with_name("decoded")
    copy.mkdir()
    (copy / "config.json").write_text((plain / "config.json").read_text())
    mx.save_safetensors(str(copy / "model.safetensors"), weights)
    return copy


@pytest.mark.long
@pytest.mark.usefixtures("quick")
def test_what_is_written_loads_and_computes_with_what_it_stands_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Experts singly, config as exllamav3 writes it, the rest as it was; through the shard loader."""
    plain = a_model(tmp_path / "plain", unstack_experts=True)
    assert run(plain, tmp_path / "out", "--bits", "3", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    quantisation = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (quantisation["quant_method"], quantisation["bits"], quantisation["codebook"]) == (
        "exl3",
        3,
        "mcg",
    )
    assert quantisation["calibration"] == {"rows": 4, "cols": 256}
    stored = tensors(tmp_path / "out")
    assert stored["model.layers.0.mlp.experts.2.down_proj.trellis"].shape == (8, 8, 48)
    assert stored["lm_head.trellis"].shape[-1] == 96
    assert int(np.array(stored["lm_head.mcg"]).view(np.uint32)) == 0xCBAC1FED
    assert "model.layers.0.mlp.gate.weight" in stored
    assert said["num_layers"] == 4 + 3 * 3 + 1
    parts = [name for name in stored if name.endswith((".trellis", ".suh", ".svh", ".mcg"))]
    paths = [name.removesuffix(".trellis") for name in parts if name.endswith(".trellis")]
    num_weights = sum(tensors(plain)[f"{path}.weight"].size for path in paths)
    assert said["bits_per_weight"] == 8 * sum(stored[name].nbytes for name in parts) / num_weights
    assert said["total_bytes"] == sum(array.nbytes for array in stored.values())
    assert not (tmp_path / "out.partial").exists()
    copied = {file.name for file in plain.iterdir()} - {"config.json", "model.safetensors"}
    assert copied >= {"tokenizer.json", "tokenizer_config.json"}
    assert copied <= {file.name for file in (tmp_path / "out").iterdir()}

    shard = load_shard(tmp_path / "out", 0, 1)
    found = mx.array(shard.forward(TOKENS, None, shard.new_state()))
    expected = load_model(decoded_model(tmp_path / "out", plain))[0](TOKENS)
    assert mx.abs(found - expected).max() < 1e-4 * mx.abs(expected).max()


@pytest.mark.long
@pytest.mark.usefixtures("quick")
def test_an_affine_model_of_8_bits_and_stacked_experts(tmp_path: Path) -> None:
    source = a_model(tmp_path / "plain", quantize={"bits": 8, "group_size": 64})
    assert run(source, tmp_path / "out", "--bits", "2") == 0
    stored = tensors(tmp_path / "out")
    assert "model.layers.0.mlp.experts.0.up_proj.trellis" in stored
    assert not any(name.endswith(".scales") or "switch_mlp" in name for name in stored)
    shard = load_shard(tmp_path / "out", 0, 1)
    assert mx.isfinite(mx.array(shard.forward(TOKENS, None, shard.new_state()))).all()


@pytest.mark.long
@pytest.mark.usefixtures("quick")
def test_a_stopped_run_goes_on_and_gives_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = a_model(tmp_path / "plain")
    assert run(plain, tmp_path / "whole", "--bits", "3") == 0
    searches = 0

    def stop_at_the_fourth(*args: Any) -> Any:
        nonlocal searches
        searches += 1
        if searches > 40:
            raise KeyboardInterrupt
        return fast_search(*args)

    monkeypatch.setattr(cluster.quantize_exl3, "make_search", lambda: stop_at_the_fourth)
    assert run(plain, tmp_path / "again", "--bits", "3") == 130
    assert "the same command goes on from there" in capsys.readouterr().err
    assert not (tmp_path / "again").exists()
    assert run(plain, tmp_path / "again", "--bits", "4") == 3
    assert "a stopped run with other settings" in capsys.readouterr().err
    monkeypatch.setattr(cluster.quantize_exl3, "make_search", lambda: fast_search)
    assert run(plain, tmp_path / "again", "--bits", "3", "--json") == 0
    assert json.loads(capsys.readouterr().out)["num_resumed"] == 5
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes(), file.name


@pytest.mark.long
@pytest.mark.usefixtures("quick")
def test_affine_from_plain_and_from_exl3_loads_in_mlx_lm(tmp_path: Path) -> None:
    plain = a_model(tmp_path / "plain", unstack_experts=True)
    assert run(plain, tmp_path / "exl3", "--bits", "4") == 0
    for source in ("plain", "exl3"):
        output = tmp_path / f"{source}-affine"
        assert run(tmp_path / source, output, "--format", "affine", "--bits", "8", "--group-size", "32") == 0
        model, config = load_model(output)
        assert config["quantization"]["bits"] == 8
        assert "quantization_config.json" not in {file.name for file in output.iterdir()}
        folder = plain if source == "plain" else decoded_model(tmp_path / "exl3", plain)
        expected = load_model(folder)[0](TOKENS)
        assert mx.abs(model(TOKENS) - expected).mean() < 0.05 * mx.abs(expected).mean()


@pytest.mark.long
@pytest.mark.usefixtures("quick")
def test_affine_from_exl3_computes_in_the_dtype_of_the_model(tmp_path: Path) -> None:
    """Scales in float16 beside activations in bfloat16 would widen everything, the caches too, to float32."""
    plain = a_model(tmp_path / "plain", unstack_experts=True)
    narrow = {name: array.astype(mx.bfloat16) for name, array in tensors(plain).items()}
    mx.save_safetensors(str(plain / "model.safetensors"), narrow)
    assert run(plain, tmp_path / "exl3", "--bits", "2") == 0
    assert run(tmp_path / "exl3", tmp_path / "affine", "--format", "affine", "--bits", "4") == 0
    assert {a.dtype for name, a in tensors(tmp_path / "affine").items() if "weight" not in name} == {
        mx.bfloat16
    }
    assert load_model(tmp_path / "affine")[0](TOKENS).dtype == mx.bfloat16


def test_damaged_exl3_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A tensor that is missing, an expert, and a weight of twice the model's inputs."""
    whole, _ = write_exl3("qwen3_moe", tmp_path / "models", num_layers=1)
    path = "model.layers.0.self_attn.q_proj"

    def refused(change: Callable[[dict[str, mx.array]], object]) -> str:
        weights = tensors(whole)
        change(weights)
        folder = tmp_path / "damaged"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text((whole / "config.json").read_text())
        mx.save_safetensors(str(folder / "model.safetensors"), weights)
        assert main(["--model", str(folder), "--format", "affine", "--bits", "4", "--output", "out"]) == 3
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert not Path("out").exists()
        return said

    def widen(weights: dict[str, mx.array]) -> None:
        for leaf in ("trellis", "suh"):
            weights[f"{path}.{leaf}"] = mx.concatenate([weights[f"{path}.{leaf}"]] * 2)

    assert f"lacks tensor '{path}.svh'" in refused(lambda weights: weights.pop(f"{path}.svh"))
    assert f"lacks tensor '{path}.trellis'" in refused(lambda weights: weights.pop(f"{path}.trellis"))
    expert = "model.layers.0.mlp.experts.0.up_proj"
    assert f"lacks tensor '{expert}.trellis': download the model again" in refused(
        lambda weights: [weights.pop(name) for name in list(weights) if name.startswith(expert)]
    )
    assert f"{path} has 256 inputs, where what it works with has 128: download" in refused(widen)


def test_bits_that_are_no_whole_number_are_a_mix(tmp_path: Path) -> None:
    source = read_source(a_model(tmp_path, num_layers=3), is_for_exl3=True)
    layers = choose_layers(load_plain(source), source.headers, Fraction("3.5"), 6)
    inner = [layer for layer in layers.values() if layer.path != "lm_head"]
    assert {layer.bits for layer in inner} == {3, 4}
    mean = sum(layer.bits * layer.num_weights for layer in inner) / sum(layer.num_weights for layer in inner)
    assert mean == pytest.approx(3.5, abs=0.05)
    assert layers["lm_head"].bits == 6
    stacks: dict[str, set[int]] = {}
    for name, layer in layers.items():
        stacks.setdefault(re.sub(r"experts\.\d+", "experts", name), set()).add(layer.bits)
    assert len(stacks) < len(layers)
    assert {len(bits) for bits in stacks.values()} == {1}  # exllamav3 loads no experts of mixed bits


@pytest.mark.parametrize(
    ("options", "code", "sentence"),
    [
        (["--bits", "9"], 3, "--bits 9: EXL3 has 1 to 8"),
        (["--bits", "many"], 3, "--bits many: give a number, such as 3 or 3.5"),
        (["--bits", "7", "--format", "affine"], 3, "--bits 7: affine has 2, 3, 4, 5, 6, 8"),
        (["--bits", "3", "--head-bits", "0"], 3, "--head-bits 0: EXL3 has 1 to 8"),
        (
            ["--bits", "4", "--format", "affine", "--group-size", "16"],
            3,
            "--group-size 16: MLX has 32, 64, 128",
        ),
        (["--bits", "4", "--format", "affine", "--head-bits", "6"], 3, "--head-bits goes with --format exl3"),
        (
            ["--bits", "4", "--format", "affine", "--calibration-tokens", "99"],
            3,
            "--calibration-tokens goes with --format exl3",
        ),
        (["--bits", "3", "--group-size", "32"], 3, "--group-size goes with --format affine"),
        (["--bits", "3", "--calibration", os.devnull], 3, "has 0 tokens and 32768 are wanted"),
        (["--bits", "3", "--calibration-tokens", "99999999"], 3, "give more text, or a smaller"),
    ],
)
def test_wrong_options(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], code: int, sentence: str
) -> None:
    model = a_model(tmp_path / "model")
    text = [] if "affine" in options else ["--calibration", str(a_text(tmp_path))]
    assert main(["--model", str(model), *text, *options]) == code
    assert sentence in capsys.readouterr().err


def test_calibration_tokens_are_above_zero(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--model", "any", "--bits", "3", "--calibration-tokens", "0"])
    assert ended.value.code == 3
    assert "'0' must be a whole number above 0" in capsys.readouterr().err


def test_wrong_folders(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(model: Path, code: int = 3, bits: str = "3", form: str = "exl3") -> str:
        assert run(model, tmp_path / "out", "--bits", bits, "--format", form) == code
        assert not (tmp_path / "out.partial").exists()
        return capsys.readouterr().err

    assert "is not a folder: name the folder of a model" in refused(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert "is not a model folder" in refused(tmp_path / "empty")
    narrow = write_checkpoint("llama", tmp_path / "narrow", num_layers=1)
    assert "no linear layers of 128 channels or more" in refused(narrow)
    four = a_model(tmp_path / "four", quantize={"bits": 4, "group_size": 64})
    assert "quantised already, to 4 bits: start from the model it was made of" in refused(four)
    model = a_model(tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    for method, sentence in (("exl3", "quantised already, to EXL3"), ("gptq", "quantised already, to gptq")):
        (model / "config.json").write_text(
            json.dumps(config | {"quantization_config": {"quant_method": method}})
        )
        assert sentence in refused(model)
    (model / "config.json").write_text(json.dumps(config | {"quantization": "4bit"}))
    assert "says nothing that macrame knows of how its weights are quantised" in refused(model)
    (model / "config.json").write_text(json.dumps(config))
    full = os.statvfs_result((4096, 4096, 9, 9, 1, 9, 9, 9, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda _: full)
    assert "has 4.1 kB free: make room, or name an --output on another disk" in refused(model, code=2)
    said = refused(model, 2, "4", "affine")
    assert re.search(r"has 4.1 kB free, \d+ kB are missing: make room and repeat the command", said)
    monkeypatch.undo()
    assert run(model, model, "--bits", "3", "--format", "exl3") == 3
    assert "is the model itself: name another folder" in capsys.readouterr().err
    (tmp_path / "out").mkdir()
    assert "is there already: remove it, or name another --output" in refused(model)
