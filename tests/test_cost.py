from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest

from planner.cost import FRAME_BYTES, LOCAL_LATENCY_MS, REMOTE_LATENCY_MS, CostModel, Link, Stage
from planner.layer_profile import WeightFormat
from planner.node_profile import GB, NodeProfile, make_node
from planner.speeds import DECODE_EFFICIENCY, LAYER_OVERHEAD_MS, STAGE_OVERHEAD_MS, FormatRate, Speeds
from planner.stage_bytes import MASKS
from planner.workload import Workload
from tests.fake_models import made_up_model
from tests.random_clusters import random_case


def nodes(*hosts: str, chip: str = "Apple M4") -> list[NodeProfile]:
    return [make_node(i, f"n{i}", host, memory_bytes=64 * GB, chip=chip) for i, host in enumerate(hosts)]


def test_a_path_is_the_sum_of_its_stages_and_hops() -> None:
    """47 + 1 layers of 1 ms and 0.5 ms a hop are 48 ms and two hops, not the slowest stage."""
    layer_bytes = int((1 - LAYER_OVERHEAD_MS) * 120e6 * DECODE_EFFICIENCY)
    model = made_up_model([layer_bytes] * 48)
    link = Link(frozenset((0, 1)), latency_ms=0.5, bandwidth_gbit_s=1e9)
    cost = CostModel(model, nodes("a", "b"), [link], Workload(2, 1))
    path_ms = cost.path_ms([Stage(0, 0, 47), Stage(1, 47, 48)])
    assert path_ms == pytest.approx(48 + 2 * STAGE_OVERHEAD_MS + 2 * 0.5, rel=1e-3)


def test_hops_to_and_from_the_head_count() -> None:
    model = made_up_model([GB] * 2)
    cost = CostModel(model, nodes("a", "b", "c"), (), Workload(256, 1))
    own = cost.hops_ms([Stage(0, 0, 2)], 1)
    other = cost.hops_ms([Stage(1, 0, 2)], 1)
    both = cost.hops_ms([Stage(1, 0, 1), Stage(2, 1, 2)], 1)
    assert own == 0
    assert other == pytest.approx(2 * REMOTE_LATENCY_MS, rel=1e-2)
    assert both == pytest.approx(3 * REMOTE_LATENCY_MS, rel=1e-2)


def test_links_by_default_depend_on_the_hosts() -> None:
    cost = CostModel(made_up_model([GB]), nodes("a", "a", "b"), (), Workload(256, 1))
    assert cost.hop_ms(0, 1, 0) == pytest.approx(LOCAL_LATENCY_MS, rel=1e-2)
    assert cost.hop_ms(1, 2, 0) == pytest.approx(REMOTE_LATENCY_MS, rel=1e-2)
    assert cost.hop_ms(1, 1, 9) == 0
    slow = Link(frozenset((1, 2)), bandwidth_gbit_s=0.1)
    cost = CostModel(made_up_model([GB]), nodes("a", "a", "b"), [slow], Workload(256, 1))
    nbytes = 512 * 64 * 2 + 256
    assert cost.hop_ms(2, 1, 512) == pytest.approx(REMOTE_LATENCY_MS + nbytes * 8 / 0.1e6)


def test_decode_reads_weights_and_cache_once() -> None:
    model = made_up_model([GB] * 2, kv_token_bytes=100_000)
    short = CostModel(model, nodes("a"), (), Workload(2, 1)).decode_ms(0, 0, 2)
    long = CostModel(model, nodes("a"), (), Workload(20_002, 1)).decode_ms(0, 0, 2)
    rate = 120e6 * DECODE_EFFICIENCY
    assert short == pytest.approx(2 * GB / rate + 2 * LAYER_OVERHEAD_MS + STAGE_OVERHEAD_MS, rel=1e-3)
    assert long - short == pytest.approx(10_000 * 2 * 100_000 / rate, rel=1e-3)


def test_a_faster_chip_is_faster() -> None:
    model = made_up_model([GB] * 4)
    slow, fast = (
        CostModel(model, nodes("a", chip=chip), (), Workload(4096, 1))
        for chip in ("Apple M1", "Apple M3 Ultra")
    )
    assert slow.decode_ms(0, 0, 4) > 5 * fast.decode_ms(0, 0, 4)
    assert slow.prefill_ms(0, 0, 4) > 5 * fast.prefill_ms(0, 0, 4)


def test_the_head_is_read_where_it_is_owned_and_a_tied_one_too() -> None:
    plain = made_up_model([GB] * 2, embed_bytes=GB, head_bytes=GB)
    tied = made_up_model([GB] * 2, embed_bytes=GB, is_tied=True)
    for model in (plain, tied):
        cost = CostModel(model, nodes("a"), (), Workload(256, 1))
        assert cost.decode_ms(0, 1, 2) > 1.9 * cost.decode_ms(0, 0, 1)
        assert cost.weight_bytes(0, 1) == cost.weight_bytes(1, 2) == 2 * GB
    assert CostModel(plain, nodes("a"), (), Workload(256, 1)).weight_bytes(0, 2) == 4 * GB
    assert CostModel(tied, nodes("a"), (), Workload(256, 1)).weight_bytes(0, 2) == 3 * GB


def test_throughput_is_bound_by_users_then_by_the_slowest_stage() -> None:
    model = made_up_model([GB] * 4)
    stages = [Stage(0, 0, 3), Stage(1, 3, 4)]
    one, two, many = (CostModel(model, nodes("a", "b"), (), Workload(256, k)) for k in (1, 2, 50))
    assert one.throughput_tok_s(stages) == pytest.approx(1e3 / one.path_ms(stages))
    assert two.throughput_tok_s(stages) == pytest.approx(1e3 / two.decode_ms(0, 0, 3))
    assert many.throughput_tok_s(stages) == pytest.approx(1e3 / many.decode_ms(0, 0, 3))


def test_scratch_counts_attention_scores_where_they_are_written_to_memory() -> None:
    model = replace(made_up_model([GB] * 2, kv_token_bytes=64), num_heads=8, head_dim=128)
    metal = CostModel(model, nodes("a"), (), Workload(8192, 1)).activation_bytes(0, 0, 1)
    cpu = CostModel(model, nodes("a", chip="AMD EPYC"), (), Workload(8192, 1)).activation_bytes(0, 0, 1)
    assert cpu - metal == 512 * 8192 * (2 * 8 * 2 + MASKS)


def test_the_last_stage_has_room_for_logits() -> None:
    model = made_up_model([GB] * 2, vocab_size=100_000)
    cost = CostModel(model, nodes("a"), (), Workload(8192, 1))
    more = cost.activation_bytes(0, 1, 2) - cost.activation_bytes(0, 0, 1)
    assert more == 512 * 100_000 * 2 + 4 * 4 * 100_000


def test_cache_is_for_all_requests_at_full_context() -> None:
    cost = CostModel(made_up_model([GB] * 2, kv_token_bytes=10), nodes("a"), (), Workload(1000, 3))
    assert cost.kv_bytes(0, 2) == 2 * 10 * 1024 * 3


def test_workloads_are_checked() -> None:
    assert (
        Workload(8192, 1).prompt_tokens,
        Workload(100, 1).prompt_tokens,
        Workload(1, 1).prompt_tokens,
    ) == (
        2048,
        50,
        1,
    )
    with pytest.raises(ValueError, match="context = 0 must be at least 1"):
        Workload(0, 1)


def test_chunks_of_a_prompt_follow_each_other() -> None:
    """Three stages and four chunks take six chunk times and the last token's step, not twelve."""
    model = made_up_model([GB] * 3)
    cost = CostModel(model, nodes("a", "a", "a"), (), Workload(8192, 1))
    stages = [Stage(i, i, i + 1) for i in range(3)]
    chunk_ms = cost.chunk_ms(0, 0, 1)
    assert (cost.work.num_chunks, cost.work.mean_chunk_tokens) == (4, 512)
    expected_ms = 6 * chunk_ms + cost.hops_ms(stages, 512) + cost.decode_ms(2, 2, 3)
    assert cost.ttft_ms(stages) == pytest.approx(expected_ms)
    alone = [Stage(0, 0, 3)]
    assert cost.ttft_ms(alone) == pytest.approx(cost.prefill_ms(0, 0, 3))


def test_a_link_slower_than_every_stage_sets_the_pace_of_a_prompt() -> None:
    model = made_up_model([GB // 100] * 2)
    slow = Link(frozenset((0, 1)), latency_ms=0.0, bandwidth_gbit_s=0.001)
    cost = CostModel(model, nodes("a", "b"), [slow], Workload(8192, 1))
    stages = [Stage(0, 0, 1), Stage(1, 1, 2)]
    busy_ms = cost.transfer_ms(0, 1, 512)
    assert busy_ms > cost.chunk_ms(0, 0, 1)
    first_ms = cost.chunk_ms(0, 0, 1) + cost.chunk_ms(1, 1, 2) + cost.hops_ms(stages, 512)
    assert cost.ttft_ms(stages) == pytest.approx(first_ms + 3 * busy_ms + cost.decode_ms(1, 1, 2))


def test_a_batch_reads_the_experts_that_it_is_expected_to_choose() -> None:
    """8 experts of 100 MB, 2 a token: 2 for one token, 3.5 for two, all for many; the rest is read once."""
    layer = replace(
        made_up_model([GB]).layers[0], active_bytes=4 * GB // 10, routed_bytes=8 * GB // 10, routed_share=0.25
    )
    model = replace(made_up_model([GB]), layers=(layer,))
    free = Speeds(1e6, 1e9, layer_ms=0.0, stage_ms=0.0)
    node = replace(nodes("a")[0], measured=free)
    for rows, mb in ((1, 400), (2, 550), (500, 1000)):
        cost = CostModel(model, [node], (), Workload(256, 8, rows))
        assert cost.decode_ms(0, 0, 1, is_batched=True) == pytest.approx(mb)
        assert cost.decode_ms(0, 0, 1) == pytest.approx(400)
    assert made_up_model([1000]).layers[0].batch_share(500) == 1.0


def test_a_step_is_bound_by_bytes_or_by_the_arithmetic_of_each_format() -> None:
    """1 GB in a slow format takes 10 ms for each row, in a fast one 5 ms for any number of rows."""
    fast, slow = (WeightFormat(name, GB, 0, 10**9) for name in ("fast", "slow"))
    layer = replace(made_up_model([2 * GB]).layers[0], formats=(fast, slow))
    rates = (FormatRate("fast", 1e9, 1e12), FormatRate("slow", 1e8, 1e11))
    speeds = Speeds(2e8, 1e12, layer_ms=0.0, stage_ms=1.0, formats=rates, source="measured")
    node = replace(nodes("a")[0], measured=speeds)
    cost = CostModel(replace(made_up_model([GB]), layers=(layer,)), [node], (), Workload(4096, 8, 4))
    assert cost.decode_ms(0, 0, 1) == pytest.approx(1 + 5 + 10)
    assert cost.decode_ms(0, 0, 1, is_batched=True) == pytest.approx(1 + 5 + 40)
    chunk_ms = cost.chunk_ms(0, 0, 1)
    attention_ms = 4 * 64 * 1024 * 512 / 1e12
    assert chunk_ms == pytest.approx(1 + max(5, 2 * 1e9 * 512 / 1e12) + 2 * 1e9 * 512 / 1e11 + attention_ms)


def test_rows_of_a_frame_share_the_weights_but_not_the_caches() -> None:
    model = made_up_model([GB] * 2, kv_token_bytes=1000)
    node = replace(nodes("a")[0], measured=Speeds(1e8, 1e12, layer_ms=0.0, stage_ms=0.0))
    cost = CostModel(model, [node], (), Workload(20_000, 8, 4))
    cache_ms = 2 * 10_000 * 1000 / 1e8
    assert cost.decode_ms(0, 0, 2) == pytest.approx(20 + cache_ms)
    assert cost.decode_ms(0, 0, 2, is_batched=True) == pytest.approx(20 + 4 * cache_ms)
    assert cost.throughput_tok_s([Stage(0, 0, 2)]) == pytest.approx(4e3 / (20 + 4 * cache_ms))


def test_a_slow_link_bounds_throughput() -> None:
    model = made_up_model([GB // 100] * 2, hidden_size=4096)
    slow = Link(frozenset((0, 1)), latency_ms=0.0, bandwidth_gbit_s=0.001)
    cost = CostModel(model, nodes("a", "b"), [slow], Workload(256, 50))
    busy_ms = (4096 * 2 + FRAME_BYTES) * 8 / 1e3
    assert cost.throughput_tok_s([Stage(0, 0, 1), Stage(1, 1, 2)]) == pytest.approx(1e3 / busy_ms)


def test_what_crosses_the_widest_cut_counts() -> None:
    model = replace(made_up_model([GB] * 3, hidden_size=64), cut_bytes=(0, 128, 512, 0))
    cost = CostModel(model, nodes("a", "b"), (), Workload(256, 1))
    assert cost.frame_bytes(10) == 5120 + FRAME_BYTES
    assert replace(model, cut_bytes=()).carry_bytes == 128


def test_a_prompt_pays_for_attention() -> None:
    model = made_up_model([GB])
    wide = replace(model, num_heads=64, head_dim=128)
    plain, more = (CostModel(m, nodes("a"), (), Workload(4096, 1)).chunk_ms(0, 0, 1) for m in (model, wide))
    flops = 4 * (64 * 128 - 64) * 1024 * 512
    assert more - plain == pytest.approx(flops / nodes("a")[0].speeds.flops_ms)


@pytest.mark.parametrize("seed", range(30))
def test_the_table_of_needs_is_that_of_each_stage(seed: int) -> None:
    rng = random.Random(seed)
    cost = random_case(rng, max_layers=9, max_nodes=2)
    model = replace(cost.model, shared_embed_bytes=rng.choice([0, 7]), table_bytes=rng.choice([0, 3]))
    if seed % 3 == 0 and model.num_layers > 2:
        layers = (*model.layers[:-1], replace(model.layers[-1], cache_source=0))
        model = replace(model, layers=layers)
    cost = CostModel(model, cost.nodes, (), cost.work)
    inner = [cut for cut in range(1, model.num_layers) if rng.random() < 0.7]
    bounds = [0, *inner, model.num_layers]
    for i in range(len(cost.nodes)):
        table = cost.need_table(i, bounds)
        for a, b in itertools.combinations(range(len(bounds)), 2):
            assert table[a, b] == cost.need_bytes(i, bounds[a], bounds[b])
