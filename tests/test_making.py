"""Loading with options gives the bytes of `mlx_lm.convert`'s result, for any split, and any size of block."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.convert import convert
from mlx_lm.utils import load_model

from planner.headers import ModelFilesError, read_headers
from planner.load_options import LoadOptions, Quantization
from planner.model_profile import read_model_profile
from shard_loader import making, origins
from shard_loader.shard import Shard
from shard_loader.weights import WeightsError, load_shard
from tests.tiny_models import write_checkpoint

NUM_LAYERS = 3
MODES = [("affine", 4, 64), ("affine", 8, 32), ("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16)]
ALL_MODES = ("llama", "qwen3_moe")  # in the short run, too
ARCHS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "gemma3_text": {},
    "deepseek_v3": {},
    "mamba2": {},
    "qwen3_moe": {"unstack_experts": True},
}


def converted(source: Path, target: Path, **options: Any) -> dict[str, mx.array]:
    """What mlx-lm's own conversion makes of `source`."""
    convert(str(source), str(target), **options)
    return dict(tree_flatten(load_model(target, lazy=True)[0].parameters()))


def check(source: Path, options: LoadOptions, expected: dict[str, mx.array], cuts: list[int]) -> None:
    bounds = [0, *cuts, NUM_LAYERS]
    seen = set()
    for start, stop in itertools.pairwise(bounds):
        shard = load_shard(source, start, stop, options=options)
        for group in shard.ownership.groups:
            for name, array in group.items():
                seen.add(name)
                assert array.dtype == expected[name].dtype, name
                assert mx.array_equal(array, expected[name]).item(), name
    assert seen == expected.keys()


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny models take the way of large ones."""
    monkeypatch.setattr(origins, "BLOCK_BYTES", 5000)
    monkeypatch.setattr(making, "SMALL_BYTES", 1000)


@pytest.fixture
def no_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLX's CPU backend runs unquantised experts in float32 only, plain mlx-lm included."""
    monkeypatch.setattr(Shard, "warm_up", lambda _self: None)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(
    ("arch", "mode", "bits", "group_size"),
    [
        pytest.param(arch, *mode, marks=[] if arch in ALL_MODES or mode == MODES[0] else pytest.mark.long)
        for arch in ARCHS
        for mode in MODES
    ],
)
def test_quantised_on_load_equals_mlx_lm_convert(
    arch: str, mode: str, bits: int, group_size: int, tmp_path: Path
) -> None:
    source = write_checkpoint(
        arch, tmp_path / arch, num_layers=NUM_LAYERS, overrides={"torch_dtype": "bfloat16"}, **ARCHS[arch]
    )
    expected = converted(
        source, tmp_path / "q", quantize=True, q_bits=bits, q_group_size=group_size, q_mode=mode
    )
    options = LoadOptions(Quantization(bits, group_size, mode))
    check(source, options, expected, [])
    check(source, options, expected, [1, 2])


@pytest.mark.usefixtures("small_blocks", "no_warm_up")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("arch", ["qwen3_moe", "deepseek_v3"])
def test_cast_on_load_equals_mlx_lm_convert(arch: str, dtype: str, tmp_path: Path) -> None:
    source = write_checkpoint(arch, tmp_path / arch, num_layers=NUM_LAYERS, dtype=mx.bfloat16, **ARCHS[arch])
    check(source, LoadOptions(dtype=dtype), converted(source, tmp_path / "cast", dtype=dtype), [1])


def test_the_size_of_a_block_changes_nothing(tmp_path: Path) -> None:
    source = write_checkpoint("qwen3_moe", tmp_path / "m", num_layers=NUM_LAYERS, unstack_experts=True)
    options = LoadOptions(Quantization.of("affine"), "float16")
    expected = converted(source, tmp_path / "q", quantize=True, dtype="float16")
    check(source, options, expected, [2])


def test_what_is_quantised_already_is_refused(tmp_path: Path) -> None:
    how = {"bits": 8, "group_size": 64}
    source = write_checkpoint("llama", tmp_path / "m", num_layers=NUM_LAYERS, quantize=how)
    options = LoadOptions(Quantization.of("affine"))
    with pytest.raises(WeightsError, match=r"the checkpoint is quantised already: remove load.quantize$"):
        load_shard(source, 0, 1, options=options)
    with pytest.raises(
        ModelFilesError, match=r"^m is quantised already: remove load.quantize, or name the m"
    ):
        read_model_profile(source, options=options)


def test_a_quantised_checkpoint_may_be_cast(tmp_path: Path) -> None:
    how = {"bits": 8, "group_size": 64}
    source = write_checkpoint("llama", tmp_path / "m", num_layers=NUM_LAYERS, quantize=how)
    shard = load_shard(source, 0, 1, options=LoadOptions(dtype="bfloat16"))
    assert {array.dtype for group in shard.ownership.groups for array in group.values()} == {
        mx.bfloat16,
        mx.uint32,
    }


def test_experts_are_read_right_into_their_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Little more than the shard is ever in memory, and no expert is read twice or through MLX."""
    monkeypatch.setattr(making, "SMALL_BYTES", 1000)
    read: list[tuple[str, int]] = []
    read_into = origins.InFile.read_into

    def counted(self: origins.InFile, view: memoryview, offset: int = 0) -> None:
        read.append((self.header.name, len(view)))
        read_into(self, view, offset)

    monkeypatch.setattr(origins.InFile, "read_into", counted)
    source = write_checkpoint("qwen3_moe", tmp_path, num_layers=NUM_LAYERS, unstack_experts=True)
    headers = {n: h for n, h in read_headers(source).items() if ".layers.1." in n and ".experts." in n}
    shard = load_shard(source, 1, 2)
    assert sorted(read) == sorted((name, header.nbytes) for name, header in headers.items())
    whole = load_model(source)[0]
    for part in ("gate_proj", "up_proj", "down_proj"):
        expected = whole.layers[1].mlp.switch_mlp[part].weight
        name = f"model.layers.1.mlp.switch_mlp.{part}.weight"
        assert mx.array_equal(shard.ownership.layers[0][name], expected).item()


def test_an_expert_that_ends_too_early_is_named(tmp_path: Path) -> None:
    source = write_checkpoint("qwen3_moe", tmp_path, num_layers=1, unstack_experts=True)
    header = next(h for n, h in read_headers(source).items() if n.endswith("experts.3.up_proj.weight"))
    part = origins.InFile(source / header.file, header, mx.zeros(header.shape))
    with (source / header.file).open("r+b") as file:
        file.truncate(header.start + 100)
    with pytest.raises(ModelFilesError, match=r"is truncated: .*experts\.3\.up_proj\.weight ends too early$"):
        part.read_into(memoryview(bytearray(header.nbytes)))


def test_where_memory_is_not_the_processors_mlx_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(making, "SMALL_BYTES", 1000)
    monkeypatch.setattr(origins, "can_write_memory", lambda: False)
    source = write_checkpoint("qwen3_moe", tmp_path / "m", num_layers=NUM_LAYERS, unstack_experts=True)
    expected = converted(source, tmp_path / "q", quantize=True, q_bits=4)
    check(source, LoadOptions(Quantization.of("affine")), expected, [1])
    check(source, LoadOptions(), dict(tree_flatten(load_model(source)[0].parameters())), [1])
