from __future__ import annotations

import gc
import random
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

from shard_loader.carry import flatten, from_wire, to_wire, unflatten
from shard_loader.layout import ObjectTemplate, from_plain, parameters_read, to_plain, trace
from shard_loader.layout import _template as template_of
from shard_loader.shard import Shard, ShardError
from shard_loader.weights import load_shard
from tests.tiny_models import VOCAB_SIZE, build, tiny_config, write_checkpoint

LONG = pytest.mark.long
ARCHITECTURES = ["llama", "qwen3", "qwen3_moe", "gemma3_text", "gpt_oss", "deepseek_v3", "mamba2"]
NUM_LAYERS = 7
ONE_SHOT = (14, 1, 1, 1)
CHUNKED = (6, 5, 3, 1, 1, 1)  # past the sliding window of 5


@pytest.fixture(scope="module", params=ARCHITECTURES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param) / request.param
    return write_checkpoint(request.param, folder, num_layers=NUM_LAYERS, max_shard_bytes=400_000)


def tokens_of(num_tokens: int, batch: int = 1, seed: int = 0) -> mx.array:
    return mx.random.randint(0, VOCAB_SIZE - 1, (batch, num_tokens), key=mx.random.key(seed))


def chunks(tokens: mx.array, lengths: Sequence[int]) -> Iterator[mx.array]:
    start = 0
    for length in lengths:
        yield tokens[:, start : start + length]
        start += length


def whole(model: Any, tokens: mx.array, lengths: Sequence[int]) -> list[mx.array]:
    cache = make_prompt_cache(model)
    logits = [model(chunk, cache=cache) for chunk in chunks(tokens, lengths)]
    mx.eval(logits)
    return logits


class Ring:
    """Shards in a row; carries go through bytes, as on the wire."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self.shards = shards

    def new_states(self) -> list[Any]:
        return [shard.new_state() for shard in self.shards]

    def step(self, tokens: mx.array, states: list[Any]) -> mx.array:
        carry: Any = None
        for shard, state in zip(self.shards, states, strict=True):
            arrays, structure = flatten(shard.forward(tokens, carry, state))
            mx.eval(arrays, state.arrays())
            carry = unflatten([from_wire(to_wire(array)) for array in arrays], structure)
        return carry

    def run(self, tokens: mx.array, lengths: Sequence[int]) -> list[mx.array]:
        states = self.new_states()
        return [self.step(chunk, states) for chunk in chunks(tokens, lengths)]


def ring_of(folder: Path, cuts: Sequence[int]) -> Ring:
    return Ring([load_shard(folder, a, b) for a, b in pairwise([0, *cuts, NUM_LAYERS])])


def assert_equal(got: list[mx.array], expected: list[mx.array]) -> None:
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape
        assert mx.array_equal(a, b).item(), mx.abs(a - b).max().item()


@pytest.mark.parametrize("num_stages", [pytest.param(1, marks=LONG), 2, pytest.param(3, marks=LONG), 5])
def test_stages_give_the_whole_models_logits_bit_for_bit(checkpoint: Path, num_stages: int) -> None:
    model, _ = load_model(checkpoint)
    cuts = sorted(
        random.Random(f"{checkpoint.name}{num_stages}").sample(range(1, NUM_LAYERS), num_stages - 1)
    )
    ring = ring_of(checkpoint, cuts)
    for lengths in (ONE_SHOT, CHUNKED):
        for batch in (1, 2):
            tokens = tokens_of(sum(lengths), batch, seed=num_stages)
            assert_equal(ring.run(tokens, lengths), whole(model, tokens, lengths))


def test_interleaved_sequences_do_not_see_each_other(checkpoint: Path) -> None:
    model, _ = load_model(checkpoint)
    ring = ring_of(checkpoint, [2, 3])
    sequences = [
        (tokens_of(20, seed=i), lengths) for i, lengths in enumerate([ONE_SHOT, CHUNKED, (9, 1, 4, 1)])
    ]
    expected = [whole(model, tokens, lengths) for tokens, lengths in sequences]
    got: list[list[mx.array]] = [[] for _ in sequences]
    todo = [
        (i, list(chunks(tokens, lengths)), ring.new_states()) for i, (tokens, lengths) in enumerate(sequences)
    ]
    order = random.Random(3)
    while todo:
        i, rest, states = order.choice(todo)
        got[i].append(ring.step(rest.pop(0), states))
        todo = [entry for entry in todo if entry[1]]
    for mine, theirs in zip(got, expected, strict=True):
        assert_equal(mine, theirs)


@pytest.mark.parametrize(
    ("arch", "options"),
    [
        ("qwen3", {"quantize": {"bits": 4, "group_size": 32}}),
        (
            "qwen3",
            {
                "quantize": {
                    "bits": 8,
                    "group_size": 64,
                    "model.layers.1.mlp.down_proj": {"bits": 4, "group_size": 32},
                    "model.layers.4.self_attn.q_proj": False,
                    "model.embed_tokens": {"bits": 6, "group_size": 64},
                }
            },
        ),
        ("qwen3_moe", {"unstack_experts": True, "max_shard_bytes": 300_000}),
        ("deepseek_v3", {"quantize": {"bits": 8, "group_size": 64}}),
        ("llama", {"overrides": {"tie_word_embeddings": True}}),
    ],
    ids=["4 bit", "overrides", "single experts", "8 bit experts", "tied"],
)
def test_checkpoint_forms(tmp_path: Path, arch: str, options: dict[str, Any]) -> None:
    folder = write_checkpoint(arch, tmp_path / arch, num_layers=NUM_LAYERS, **options)
    model, _ = load_model(folder)
    tokens = tokens_of(sum(CHUNKED))
    assert_equal(ring_of(folder, [1, 5]).run(tokens, CHUNKED), whole(model, tokens, CHUNKED))


def random_shards(arch: str, cuts: Sequence[int], **overrides: Any) -> list[Shard]:
    config = tiny_config(arch, NUM_LAYERS) | overrides
    return [Shard(build(config), a, b) for a, b in pairwise([0, *cuts, NUM_LAYERS])]


def test_foreign_parameters_are_nan_and_take_no_memory() -> None:
    first, middle, last = random_shards("llama", [2, 5])
    for shard in (first, middle, last):
        owned = {id(array) for group in shard.ownership.groups for array in group.values()}
        foreign = [a for _, a in tree_flatten(shard._model.parameters()) if id(a) not in owned]
        assert foreign
        before = mx.get_active_memory()
        mx.eval(foreign)
        assert mx.get_active_memory() - before < 64 * len(foreign)
        assert all(mx.isnan(array).all().item() for array in foreign)


@pytest.mark.parametrize("is_tied", [False, True])
def test_who_holds_embedding_norm_and_head(is_tied: bool) -> None:
    shards = random_shards("llama", [2, 5], tie_word_embeddings=is_tied)
    held = [
        {part for part in ("embed", "norm", "head", "other") if getattr(s.footprint, f"{part}_bytes")}
        for s in shards
    ]
    assert held == [{"embed"}, set(), {"norm", "head"}]
    table_bytes = VOCAB_SIZE * 64 * 4
    assert shards[0].footprint.embed_bytes == shards[2].footprint.head_bytes == table_bytes
    whole_model = Shard(
        build(tiny_config("llama", NUM_LAYERS) | {"tie_word_embeddings": is_tied}), 0, NUM_LAYERS
    )
    assert whole_model.footprint.total_bytes == whole_model.footprint.full_model_bytes
    assert whole_model.footprint.head_bytes == (0 if is_tied else table_bytes)
    total = sum(shard.footprint.total_bytes for shard in shards)
    assert total == whole_model.footprint.full_model_bytes + (table_bytes if is_tied else 0)
    assert {shard.footprint.full_model_bytes for shard in shards} == {whole_model.footprint.full_model_bytes}


def test_footprint_in_gb() -> None:
    footprint = random_shards("llama", [3])[0].footprint
    assert footprint.actual_memory_usage_gb == footprint.total_bytes / 1e9
    assert footprint.memory_saved_gb == pytest.approx(
        footprint.full_model_bytes / 1e9 - footprint.actual_memory_usage_gb, abs=1e-12
    )


def test_a_state_holds_own_caches_only_and_frees_them() -> None:
    shard = random_shards("gemma3_text", [2, 5])[1]
    state = shard.new_state()
    assert sorted(state.own) == [2, 3, 4]
    assert state.nbytes == 0
    gc.collect()
    before = mx.get_active_memory()
    out = shard.forward(tokens_of(9), mx.zeros((1, 9, 64)), state)
    mx.eval(out, state.arrays())
    assert state.position == 9
    assert state.nbytes == sum(array.nbytes for array in state.arrays()) > 0
    assert mx.get_active_memory() - before >= state.nbytes
    del out, state
    assert mx.get_active_memory() - before < 1024


def test_a_shard_frees_its_weights() -> None:
    gc.collect()
    before = mx.get_active_memory()
    shards = random_shards("llama", [2, 5])
    for shard in shards:
        shard.warm_up()
    assert mx.get_active_memory() - before >= sum(shard.footprint.total_bytes for shard in shards)
    del shard, shards
    assert mx.get_active_memory() - before < 4096


def test_foreign_caches_of_an_own_kind_are_aliased_and_others_follow_the_position() -> None:
    """gpt_oss: even layers slide, odd ones see everything; a one-layer stage owns one kind only."""
    shard = random_shards("gpt_oss", [2, 3])[1]
    state = shard.new_state()
    assert list(state.own) == [2]
    assert [cache is state.own[2] for cache in state.view] == [i % 2 == 0 for i in range(NUM_LAYERS)]
    for length, position in ((6, 0), (1, 6), (3, 7)):
        mx.eval(shard.forward(tokens_of(length), mx.zeros((1, length, 64)), state))
        assert [shadow.offset for shadow in state.shadows] == [position] * 3
    assert all(shadow.keys is None for shadow in state.shadows)


def test_ranges_that_do_not_exist_are_refused() -> None:
    for start, stop in ((0, 8), (3, 3), (4, 2), (-1, 2)):
        with pytest.raises(
            ShardError, match=rf"layers \[{start}, {stop}\) do not lie within the model's 7 layers"
        ):
            Shard(build(tiny_config("llama", NUM_LAYERS)), start, stop)


def test_a_layer_beyond_the_stage_refuses_to_run() -> None:
    shard = random_shards("llama", [3])[0]
    with pytest.raises(ShardError, match=r"a layer beyond this stage's \[0, 3\)"):
        shard._model.layers[5](mx.zeros((1, 1, 64)))


def test_what_the_shard_says_of_itself() -> None:
    model = build(tiny_config("llama", NUM_LAYERS), dtype=mx.bfloat16)
    shard = Shard(model, 2, NUM_LAYERS)
    assert (shard.start, shard.stop, shard.num_layers) == (2, 7, 7)
    assert (shard.is_first, shard.is_last) == (False, True)
    assert (shard.vocab_size, shard.dtype) == (VOCAB_SIZE, "bfloat16")
    assert random_shards("llama", [])[0].dtype == "float32"


def test_a_model_whose_layers_are_one_object_is_refused() -> None:
    model = build(tiny_config("llama", NUM_LAYERS))
    model.model.layers[3] = model.model.layers[2]
    with pytest.raises(ValueError, match="are the same object"):
        Shard(model, 0, 3)


def test_tracing_evaluates_nothing_and_leaves_no_trace(tmp_path: Path) -> None:
    folder = write_checkpoint("deepseek_v3", tmp_path, num_layers=NUM_LAYERS)
    model, _ = load_model(folder, lazy=True)
    classes = [type(layer) for layer in model.layers]
    parameters = dict(tree_flatten(model.parameters()))
    gc.collect()
    before = mx.get_active_memory()
    layout = trace(model)
    gc.collect()
    assert mx.get_active_memory() - before < 4096
    assert [type(layer) for layer in model.layers] == classes
    after = dict(tree_flatten(model.parameters()))
    assert after.keys() == parameters.keys()
    assert all(after[name] is array for name, array in parameters.items())
    assert layout.num_calls == (1,) * NUM_LAYERS
    assert [sorted(indices) for indices in layout.received] == [[i] for i in range(NUM_LAYERS)]
    assert layout.unreceived == frozenset()


def test_the_graph_tells_which_parameters_are_read() -> None:
    used, unused, evaluated = (mx.random.normal((4,), key=mx.random.key(i)) for i in range(3))
    mx.eval(evaluated)
    out = {"a": used * 2, "b": [evaluated + 1]}
    assert parameters_read(out, {"used": used, "unused": unused, "evaluated": evaluated}) == {
        "used",
        "evaluated",
    }
    assert parameters_read(out["a"], {"used": used, "evaluated": evaluated}) == {"used"}


class Blocks:
    def __init__(self) -> None:
        self.raw, self.count = mx.zeros((2,)), 3


def test_objects_in_a_carry_cross_as_dicts() -> None:
    carry = (mx.ones((1,)), [Blocks()], {"b": Blocks()})
    template = template_of(carry)
    plain = to_plain(carry)
    block = '["d",["raw","*"],["count",["s",3]]]'
    assert flatten(plain)[1] == f'["t","*",["l",{block}],["d",["b",{block}]]]'
    back = from_plain(plain, template)
    assert type(back[1][0]) is type(back[2]["b"]) is Blocks
    assert back[1][0].count == 3
    assert template_of((mx.ones((1,)), [1, None])) is None
    with pytest.raises(ValueError, match="does not hold the attributes of a Blocks"):
        from_plain(
            {"raw": mx.zeros((1,)), "__class__": 1}, ObjectTemplate(Blocks, {"raw": None, "count": None})
        )
