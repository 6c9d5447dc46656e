"""Adapters on shards: mlx-lm's own numbers bit for bit, any interleaving, and refusals by name."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models.cache import make_prompt_cache

from planner.adapters import AdapterFiles, digest_with, read_adapter_headers, with_adapters
from planner.headers import ModelFilesError, read_headers
from planner.model_profile import read_model_profile
from shard_loader.adapters import Adapters, load_adapters
from shard_loader.carry import flatten
from shard_loader.shard import Shard
from shard_loader.weights import WeightsError, load_shard
from tests.tiny_adapters import adapted, write_adapter
from tests.tiny_models import write_checkpoint

NUM_LAYERS = 5
CHUNKS = ([7, 99, 3, 250, 41, 8], [5, 17], [201], [11], [64])
EMBEDDINGS = {
    "llama": ["self_attn.q_proj", "mlp.down_proj", "model.embed_tokens", "lm_head"],
    "qwen3": ["self_attn.v_proj", "model.embed_tokens"],  # tied: the last stage's head is adapted too
}
CASES: list[tuple[str, str, dict[str, Any], list[str] | None]] = [
    ("llama", "lora", {}, None),
    ("llama", "lora", {}, EMBEDDINGS["llama"]),
    ("llama", "lora", {"quantize": {"bits": 4, "group_size": 32}}, None),
    ("llama", "dora", {}, ["self_attn.q_proj", "mlp.down_proj", "lm_head"]),
    ("qwen3", "lora", {}, EMBEDDINGS["qwen3"]),
    ("qwen3_moe", "lora", {}, None),
    ("mamba2", "lora", {}, None),
]


def numbers(model: Any) -> list[mx.array]:
    """The logits of each chunk on the whole model."""
    caches, out = make_prompt_cache(model), []
    for chunk in CHUNKS:
        out.append(model(mx.array([chunk]), cache=caches))
        mx.eval(out[-1])
    return out


class Stages:
    """All stages of a cut model, each with its adapters."""

    def __init__(self, model: Path, cuts: list[int], files: list[AdapterFiles]) -> None:
        self.shards: list[Shard] = []
        self.adapters: list[Adapters] = []
        for start, stop in pairwise([0, *cuts, NUM_LAYERS]):
            self.shards.append(load_shard(model, start, stop))
            self.adapters.append(load_adapters(self.shards[-1], files))

    def open(self) -> list[Any]:
        return [shard.new_state() for shard in self.shards]

    def step(self, chunk: list[int], states: list[Any], adapter: str) -> mx.array:
        carry: Any = None
        for shard, adapters, state in zip(self.shards, self.adapters, states, strict=True):
            adapters.use(adapter)
            carry = shard.forward(mx.array([chunk]), carry, state)
            mx.eval(flatten(carry)[0], state.arrays())
        return carry


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return write_checkpoint("llama", tmp_path / "llama", num_layers=NUM_LAYERS)


@pytest.mark.parametrize(("arch", "kind", "options", "keys"), CASES)
def test_an_adapter_gives_mlx_lms_numbers_bit_for_bit(
    arch: str, kind: str, options: dict[str, Any], keys: list[str] | None, tmp_path: Path
) -> None:
    model = write_checkpoint(arch, tmp_path / arch, num_layers=NUM_LAYERS, **options)
    folder = write_adapter(model, tmp_path / "a", kind=kind, keys=keys)
    plain, expected = numbers(adapted(model, None)), numbers(adapted(model, folder))
    assert not mx.array_equal(plain[-1], expected[-1]).item()
    stages = Stages(model, [1, 4], [AdapterFiles("a", folder)])
    for name, wanted in (("a", expected), ("", plain), ("a", expected)):
        states = stages.open()
        for chunk, logits in zip(CHUNKS, wanted, strict=True):
            assert mx.array_equal(stages.step(chunk, states, name), logits).item()


def test_interleaved_sessions_with_different_adapters_equal_each_alone(llama: Path, tmp_path: Path) -> None:
    folders = {
        "all": write_adapter(llama, tmp_path / "all"),
        "top": write_adapter(llama, tmp_path / "top", num_layers=2, seed=2),  # the last two layers only
        "dora": write_adapter(llama, tmp_path / "dora", kind="dora", keys=["mlp.up_proj"], seed=3),
    }
    expected = {name: numbers(adapted(llama, folder)) for name, folder in folders.items()}
    expected[""] = numbers(adapted(llama, None))
    stages = Stages(llama, [2], [AdapterFiles(name, folder) for name, folder in folders.items()])
    assert stages.adapters[0].names == ("all", "top", "dora")
    states = {name: stages.open() for name in expected}
    for i, chunk in enumerate(CHUNKS):
        for name, wanted in expected.items():
            assert mx.array_equal(stages.step(chunk, states[name], name), wanted[i]).item(), (name, i)


def test_only_own_tensors_are_in_memory_and_predicted_so(llama: Path, tmp_path: Path) -> None:
    files = [
        AdapterFiles("a", write_adapter(llama, tmp_path / "a", keys=EMBEDDINGS["llama"])),
        AdapterFiles("b", write_adapter(llama, tmp_path / "b", num_layers=2)),
    ]
    profile = with_adapters(read_model_profile(llama), files)
    full_bytes = sum(h.nbytes for h in read_headers(llama).values())
    full_bytes += sum(h.nbytes for file in files for h in read_adapter_headers(file))
    assert profile.full_bytes == full_bytes
    stages = Stages(llama, [1, 4], files)
    for shard in stages.shards:
        predicted = sum(layer.weight_bytes for layer in profile.layers[shard.start : shard.stop])
        predicted += profile.embed_bytes if shard.is_first else 0
        predicted += profile.norm_bytes + profile.head_bytes if shard.is_last else 0
        assert shard.footprint.total_bytes == predicted
        assert shard.footprint.full_model_bytes == full_bytes


def test_no_weight_is_copied(llama: Path, tmp_path: Path) -> None:
    shard = load_shard(llama, 1, 4)
    before = mx.get_active_memory()
    files = [AdapterFiles(str(i), write_adapter(llama, tmp_path / str(i), seed=i)) for i in range(3)]
    found = load_adapters(shard, files)
    own_bytes = sum(h.nbytes for h in read_adapter_headers(files[0]) if h.name.split(".")[2] in "123")
    assert mx.get_active_memory() - before <= 3 * own_bytes * 1.1 + 100_000
    assert found.names == ("0", "1", "2")


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def rename(folder: Path, old: str, new: str | None) -> None:
    file = str(folder / "adapters.safetensors")
    tensors: Any = mx.load(file)
    mx.eval(tensors)
    value = tensors.pop(old)
    if new is not None:
        tensors[new] = value
    mx.save_safetensors(file, tensors)


A_TENSOR = "model.layers.1.self_attn.q_proj.lora_a"


@pytest.mark.parametrize(
    ("new", "message"),
    [
        (
            "model.layers.1.self_attn.x_proj.lora_a",
            r"^the adapter poet has the tensor '.*x_proj.lora_a', f",
        ),
        (
            "model.layers.1.self_attn.q_proj.weight",
            r"^the adapter poet has the tensor '.*q_proj.weight', f",
        ),
        (None, rf"^the adapter poet lacks the tensor '{A_TENSOR}'$"),
    ],
)
def test_unknown_and_missing_tensors_are_refused_by_name_on_every_stage(
    new: str | None, message: str, llama: Path, tmp_path: Path
) -> None:
    folder = write_adapter(llama, tmp_path / "a")
    rename(folder, A_TENSOR, new)
    for start, stop in ((0, 2), (2, 5)):
        with pytest.raises(WeightsError, match=message):
            load_adapters(load_shard(llama, start, stop), [AdapterFiles("poet", folder)])


def test_a_wrong_shape_is_refused_by_name(llama: Path, tmp_path: Path) -> None:
    folder = write_adapter(llama, tmp_path / "a")
    edit(folder, lora_parameters={"rank": 8, "scale": 2.0, "dropout": 0.0})
    with pytest.raises(WeightsError, match=r"gives '.*lora_a' the shape \(128, 4\); .* ask for \(128, 8\)$"):
        load_adapters(load_shard(llama, 0, 2), [AdapterFiles("poet", folder)])


def test_an_adapter_of_a_deeper_model_is_refused_from_headers(llama: Path, tmp_path: Path) -> None:
    deeper = write_checkpoint("llama", tmp_path / "deep", num_layers=7)
    files = [AdapterFiles("poet", write_adapter(deeper, tmp_path / "a"))]
    with pytest.raises(ModelFilesError, match=r"^the adapter poet has the tensor .* but llama has 5 l"):
        with_adapters(read_model_profile(llama), files)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"fine_tune_type": "full"},
            r"fine_tune_type is 'full', and only lora and dora are adapters: fu",
        ),
        (
            {"lora_parameters": {"rank": 4, "alpha": 8}},
            r"has no lora_parameters with rank, scale and drop",
        ),
        ({"num_layers": None}, r"has no num_layers$"),
    ],
)
def test_configs_that_are_none_of_mlx_lms_are_refused(
    changes: dict[str, Any], message: str, llama: Path, tmp_path: Path
) -> None:
    folder = write_adapter(llama, tmp_path / "a")
    edit(folder, **changes)
    with pytest.raises(ModelFilesError, match=message):
        digest_with("0123", [AdapterFiles("poet", folder)])
    with pytest.raises(WeightsError, match=message):
        load_adapters(load_shard(llama, 0, 2), [AdapterFiles("poet", folder)])


def test_missing_files_are_named(llama: Path, tmp_path: Path) -> None:
    folder = write_adapter(llama, tmp_path / "a")
    (folder / "adapters.safetensors").unlink()
    with pytest.raises(ModelFilesError, match=r"adapters.safetensors is missing: the adapter poet needs it$"):
        digest_with("0123", [AdapterFiles("poet", folder)])
    with pytest.raises(ModelFilesError, match=r"adapter_config.json is missing: the adapter poet is no"):
        digest_with("0123", [AdapterFiles("poet", tmp_path / "nowhere")])


def test_the_digest_tells_adapters_apart(llama: Path, tmp_path: Path) -> None:
    one, two = (AdapterFiles("a", write_adapter(llama, tmp_path / str(i), seed=i)) for i in (1, 2))
    digests = {digest_with("0123", files) for files in ([], [one], [two], [one, two])}
    assert len(digests) == 4
    assert digest_with("0123", []) == "0123"


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^there is no adapter 'x' here; there are: none$"):
        Adapters().check("x")
