"""Quantised keys and values: mlx-lm's numbers for any cut, the predicted bytes, and who cannot have them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.generate import generate_step, maybe_quantize_kv_cache
from mlx_lm.models.cache import QuantizedKVCache, make_prompt_cache
from mlx_lm.utils import load_model

from cluster.engine import Engine
from planner.cost import CostModel
from planner.kv_profile import CacheProfile
from planner.kv_quant import KvQuantization, KvQuantizationError, quantize_kv
from planner.model_profile import ModelProfile, read_model_profile
from planner.node_profile import make_node
from planner.workload import Workload
from proto import ring_pb2
from shard_loader.carry import flatten, from_wire, to_wire, unflatten
from shard_loader.shard import Shard, ShardError
from shard_loader.weights import load_shard
from tests.ring_processes import RingProcesses
from tests.test_kv_profile import CONFIGS
from tests.tiny_models import VOCAB_SIZE, build, tiny_config, write_checkpoint

LONG = pytest.mark.long
NUM_LAYERS = 7
WIDE = {"head_dim": 64}
QUANTS = [KvQuantization(8), KvQuantization(4), KvQuantization(4, 32)]
CHUNKS = [(14, 1, 1, 1), (6, 5, 3, 1, 1, 1), (1, 1, 1, 1)]


@pytest.fixture(scope="module", params=["llama", "qwen3", "qwen3_moe"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param) / request.param
    return write_checkpoint(request.param, folder, num_layers=NUM_LAYERS, overrides=WIDE)


def chunks(tokens: mx.array, lengths: Sequence[int]) -> list[mx.array]:
    return mx.split(tokens, [sum(lengths[: i + 1]) for i in range(len(lengths) - 1)], axis=1)


def whole(model: Any, tokens: mx.array, lengths: Sequence[int], kv: KvQuantization) -> list[mx.array]:
    """As generate_step does, with quantized_kv_start 0."""
    cache, logits = make_prompt_cache(model), []
    for chunk in chunks(tokens, lengths):
        logits.append(model(chunk, cache=cache))
        maybe_quantize_kv_cache(cache, 0, kv.group_size, kv.bits)
        mx.eval(logits[-1], [c.state for c in cache])
    return logits


def cut(shards: Sequence[Shard], tokens: mx.array, lengths: Sequence[int]) -> list[mx.array]:
    states, logits = [shard.new_state() for shard in shards], []
    for chunk in chunks(tokens, lengths):
        carry: Any = None
        for shard, state in zip(shards, states, strict=True):
            arrays, structure = flatten(shard.forward(chunk, carry, state))
            mx.eval(arrays, state.arrays())
            carry = unflatten([from_wire(to_wire(array)) for array in arrays], structure)
        logits.append(carry)
    assert all(type(c) is QuantizedKVCache for state in states for c in state.own.values())
    return logits


@pytest.mark.parametrize("num_stages", [pytest.param(1, marks=LONG), 2, pytest.param(3, marks=LONG), 5])
def test_any_cut_gives_mlx_lms_quantised_logits_bit_for_bit(checkpoint: Path, num_stages: int) -> None:
    model, _ = load_model(checkpoint)
    dice = random.Random(f"{checkpoint.name}{num_stages}")
    cuts = sorted(dice.sample(range(1, NUM_LAYERS), num_stages - 1))
    shards = [load_shard(checkpoint, a, b) for a, b in pairwise([0, *cuts, NUM_LAYERS])]
    for kv in QUANTS:
        for shard in shards:
            shard.quantize_kv(kv)
        for lengths in CHUNKS:
            tokens = mx.random.randint(0, VOCAB_SIZE - 1, (1, sum(lengths)), key=mx.random.key(num_stages))
            expected = whole(model, tokens, lengths, kv)
            for mine, theirs in zip(cut(shards, tokens, lengths), expected, strict=True):
                assert mx.array_equal(mine, theirs).item()


def test_states_of_fixed_size_stay_as_they_are(tmp_path: Path) -> None:
    config = {"model_type": "jamba"} | CONFIGS["jamba"] | {"head_dim": 32, "hidden_size": 128}
    kv, lengths = KvQuantization(8, 32), (6, 5, 1)
    tokens = mx.random.randint(0, 99, (1, sum(lengths)))
    expected = whole(build(config), tokens, lengths, kv)
    shards = [Shard(build(config), a, b) for a, b in pairwise([0, 1, 2, 4])]
    states = []
    for shard in shards:
        shard.quantize_kv(kv)
        states.append(shard.new_state())
    for chunk, theirs in zip(chunks(tokens, lengths), expected, strict=True):
        carry: Any = None
        for shard, state in zip(shards, states, strict=True):
            carry = shard.forward(chunk, carry, state)
        assert mx.array_equal(carry, theirs).item()
    kinds = [type(cache).__name__ for state in states for cache in state.own.values()]
    assert kinds == ["ArraysCache", "QuantizedKVCache", "ArraysCache", "QuantizedKVCache"]


@pytest.mark.long
def test_a_ring_answers_as_mlx_lms_generate_step_does(tmp_path: Path) -> None:
    folder = write_checkpoint("llama", tmp_path / "model", num_layers=5, overrides=WIDE)
    prompt, chunk = [1 + i % 250 for i in range(150)], 96  # two chunks
    steps = generate_step(
        mx.array(prompt),
        load_model(folder)[0],
        max_tokens=20,
        prefill_step_size=chunk,
        kv_bits=4,
        quantized_kv_start=0,
    )
    expected = [(int(token), float(logprobs[int(token)].item())) for token, logprobs in steps]
    load = {"kv_bits": 4}
    layers = [(0, 2), (2, 4), (4, 5)]
    with RingProcesses(tmp_path, folder, layers, prefill_chunk=chunk, load=load) as ring:
        ring.wait_ok()
        replies = ring.generate(prompt, 20, logprobs=True)
    assert [(t.id, t.logprob) for reply in replies for t in reply.tokens] == expected


@pytest.mark.parametrize("kv", [*(pytest.param(kv, marks=LONG) for kv in QUANTS[:-1]), QUANTS[-1]])
def test_predicted_bytes_are_the_measured_ones(tmp_path: Path, kv: KvQuantization) -> None:
    folder = write_checkpoint("llama", tmp_path / "model", num_layers=5, overrides=WIDE)
    context = 1000
    node = make_node(0, "n", "n", memory_bytes=16 * 10**9, chip="x86")
    cost = CostModel(quantize_kv(read_model_profile(folder), kv), [node], (), Workload(context, 1))
    plain = CostModel(read_model_profile(folder), [node], (), Workload(context, 1))
    for start, stop in ((0, 2), (2, 5)):
        shard = load_shard(folder, start, stop)
        shard.quantize_kv(kv)
        engine, position = Engine(shard), 0
        spec = ring_pb2.SessionSpec(session=1, prompt_tokens=999, max_tokens=1, sampling=ring_pb2.Sampling())
        for count in (512, 487, 1):
            slot = ring_pb2.Slot(session=1, position=position, tokens=[7] * count)
            tensors = []
            if start:
                x = mx.random.normal((1, count, 64))
                mx.eval(x)
                tensors = [to_wire(x)]
                slot.num_tensors = 1
            frame = ring_pb2.Frame(kind=ring_pb2.STEP, epoch=1, seq=1, slots=[slot])
            frame.opens.extend([spec] if position == 0 else [])
            output = engine.step(frame, tensors)
            assert output is not None
            assert not output[0].slots[0].error
            position += count
        measured = engine.sessions[1].state.nbytes
        assert measured == pytest.approx(cost.kv_bytes(start, stop), rel=0.03)
        assert cost.kv_bytes(start, stop) < 0.6 * plain.kv_bytes(start, stop)
        assert 0 < engine.memory.activation_bytes <= cost.activation_bytes(0, start, stop)


def refused(model: ModelProfile, kv: KvQuantization = QUANTS[0]) -> str:
    with pytest.raises(KvQuantizationError) as error:
        quantize_kv(model, kv)
    return str(error.value)


def profile(arch: str, cache: CacheProfile, head_dim: int = 64) -> ModelProfile:
    whole = read_model_profile(Path(__file__).parent.parent / "deploy" / "demo" / "model", arch)
    return replace(
        whole, head_dim=head_dim, layers=tuple(replace(layer, cache=cache) for layer in whole.layers)
    )


def test_the_planner_refuses_by_the_kind_of_cache() -> None:
    assert refused(profile("m", CacheProfile(8, window=512))) == (
        "layer 0 of m keeps a sliding window of 512 tokens (RotatingKVCache), which cannot be quantised; "
        "use kv_bits null"
    )
    assert refused(profile("m", CacheProfile(8, is_latent=True))) == (
        "layer 0 of m keeps a compressed latent (multi-head latent attention), which cannot be quantised; "
        "use kv_bits null"
    )
    assert "keeps states of a fixed size and no keys and values (KVCache)" in refused(
        profile("m", CacheProfile(state_bytes=8))
    )
    assert refused(profile("m", CacheProfile(8), head_dim=80)) == (
        "the heads of m have 80 elements, which are no groups of 64; use another kv_group_size, or "
        "kv_bits null"
    )


@pytest.mark.parametrize(
    ("arch", "sentence"),
    [
        ("gemma3_text", "this model's cache is of the kind RotatingKVCache, which cannot be quantised"),
        ("mamba2", "kv_bits = 8: this model's cache is of the kind ArraysCache, which cannot be quantised"),
        ("deepseek_v3", "this model's attention cannot read a QuantizedKVCache ("),
        ("llama", "kv_bits = 8, kv_group_size = 64: this model's attention cannot read a QuantizedKVCache ("),
    ],
)
def test_the_loader_refuses_what_the_planner_might_not_know(arch: str, sentence: str) -> None:
    shard = Shard(build(tiny_config(arch, 3)), 0, 2)
    with pytest.raises(ShardError) as error:
        shard.quantize_kv(KvQuantization(8))
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((5, 64), "kv_bits = 5 must be one of 4, 8"),
        ((8, 48), "kv_group_size = 48 must be one of 32, 64, 128"),
    ],
)
def test_other_numbers_are_refused(values: tuple[int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KvQuantization(*values)
