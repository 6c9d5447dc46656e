"""What a node timed of whole blocks and matrices: values, exact arithmetic, and plans that follow it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest

from planner.cost import CostModel
from planner.forms import Form, FormSpan, FormTimes, form_ms, known_forms
from planner.measured import scaled
from planner.model_profile import ModelProfile, profile_model
from planner.node_profile import GB, NodeProfile, make_node
from planner.plan import Plan
from planner.planned_from import PlannedFrom
from planner.render import render_plan
from planner.solver import PlanOptions, make_plan
from planner.speeds import FormatRate
from planner.workload import Workload
from tests.fake_models import headers_of

EXPERTS, TOP_K, HIDDEN, WIDTH, LAYERS = 128, 8, 2048, 768, 10
BLOCK = Form(EXPERTS, TOP_K, HIDDEN, WIDTH, ("affine4/64",) * 3)
CONFIG: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "num_hidden_layers": LAYERS,
    "hidden_size": HIDDEN,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
    "vocab_size": 1024,
    "max_position_embeddings": 4096,
    "quantization": {"group_size": 64, "bits": 4},
}


def quantized(name: str, *shape: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """A matrix of (..., out, in) in 4 bits, groups of 64."""
    *lead, width = shape
    scales = ("BF16", (*lead, width // 64))
    return {
        f"{name}.weight": ("U32", (*lead, width // 8)),
        f"{name}.scales": scales,
        f"{name}.biases": scales,
    }


def moe_model(num_dense: int = 0) -> ModelProfile:
    """Qwen3-30B-A3B's layers; the first num_dense of them have an MLP in the place of experts."""
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for index in range(LAYERS):
        own = f"model.layers.{index}"
        for name, sizes in (("q", (2048, HIDDEN)), ("k", (512, HIDDEN)), ("o", (HIDDEN, 2048))):
            tensors |= quantized(f"{own}.self_attn.{name}_proj", *sizes)
        tensors[f"{own}.input_layernorm.weight"] = ("BF16", (HIDDEN,))
        lead = () if index < num_dense else (EXPERTS,)
        kind = "mlp" if index < num_dense else "mlp.switch_mlp"
        width = WIDTH * EXPERTS if index < num_dense else WIDTH
        for name, ends in (("gate", (width, HIDDEN)), ("up", (width, HIDDEN)), ("down", (HIDDEN, width))):
            tensors |= quantized(f"{own}.{kind}.{name}_proj", *lead, *ends)
    tensors |= {"model.norm.weight": ("BF16", (HIDDEN,))}
    tensors |= quantized("model.embed_tokens", 1024, HIDDEN) | quantized("lm_head", 1024, HIDDEN)
    return profile_model(CONFIG, headers_of(tensors), "moe")


def node(rank: int, *forms: FormTimes, memory_gb: float = 64) -> NodeProfile:
    made = make_node(rank, f"n{rank}", f"h{rank}", memory_bytes=int(memory_gb * GB), chip="Apple M4")
    return replace(made, forms=forms)


def times(*spans: tuple[int, int, float, float], form: Form = BLOCK) -> FormTimes:
    return FormTimes(form, tuple(FormSpan(*span) for span in spans))


def decode_ms(
    model: ModelProfile, found: NodeProfile, rows: int = 1, layers: tuple[int, int] = (2, 5)
) -> float:
    return CostModel(model, [found], (), Workload(256, rows, rows)).decode_ms(0, *layers, is_batched=True)


def test_between_two_sizes_that_were_measured_lies_a_line() -> None:
    own = times((1, 1, 0.5, 0.5), (2, 4, 0.6, 1.0), (9, 9, 2.0, 2.0))
    assert [own.ms(rows) for rows in (1, 2, 4, 5, 9, 10)] == [0.5, 0.6, 1.0, None, 2.0, None]
    assert own.ms(3) == pytest.approx(0.8)
    assert own.scaled(2.0).ms(4) == 2.0
    slow = times((1, 1, 0.7, 0.7))
    assert form_ms([own, slow], BLOCK, 1) == 0.7  # the form is known twice, by different activations
    assert form_ms([own], replace(BLOCK, top_k=4), 1) is None
    assert known_forms([own, times((1, 1, 1, 1), form=replace(BLOCK, top_k=4))], [BLOCK]) == (own,)


def test_a_checkpoint_has_the_form_of_its_blocks() -> None:
    model = moe_model(num_dense=1)
    assert model.forms == {BLOCK}
    assert [len(layer.forms) for layer in model.layers] == [0, *[1] * (LAYERS - 1)]
    (use,) = model.layers[1].forms
    (weights,) = use.weights
    assert (weights.dense_bytes, weights.routed_bytes) == (0, model.layers[1].routed_bytes)
    assert (
        weights.routed_bytes == 3 * EXPERTS * HIDDEN * WIDTH * 9 // 16
    )  # 4 bits, and 4 in 64 for two halves


def test_a_measured_block_takes_the_place_of_its_bytes_exactly() -> None:
    model, plain = moe_model(), node(0)
    rate = plain.speeds.read_bytes_ms
    for rows, ms in ((1, 0.25), (3, 0.8)):
        routed = model.layers[0].routed_bytes * model.layers[0].batch_share(rows)
        timed = node(0, times((1, 1, 0.25, 0.25), (2, 4, 0.6, 1.0)))
        saved = decode_ms(model, plain, rows) - decode_ms(model, timed, rows)
        assert saved == pytest.approx(3 * (routed / rate - ms))
    assert decode_ms(model, timed, 5) == decode_ms(model, plain, 5)  # not measured: as before
    cost = [CostModel(model, [one], (), Workload(4096, 1)) for one in (plain, timed)]
    assert cost[0].chunk_ms(0, 0, 3) == cost[1].chunk_ms(0, 0, 3)


def test_what_is_left_of_a_layer_is_bound_by_its_arithmetic_alone() -> None:
    """Of a format that was measured: attention's weights, without those of the experts."""
    model, rate = moe_model(), FormatRate("affine4/64", 1e6, 1e9)
    speeds = replace(node(0).speeds, formats=(rate,))
    timed = replace(node(0, times((1, 1, 0.25, 0.25))), measured=speeds)
    dense = model.layers[0].active_params - TOP_K * 3 * HIDDEN * WIDTH
    cache_ms = model.layers[0].cache.read_bytes(128) / speeds.read_bytes_ms
    norm_ms = 2 * HIDDEN / speeds.read_bytes_ms
    each = dense / 1e6 + 0.25 + cache_ms + norm_ms + speeds.layer_ms
    assert decode_ms(model, timed, layers=(2, 3)) == pytest.approx(each + speeds.stage_ms)


def test_layers_without_experts_are_as_they_were() -> None:
    model = moe_model(num_dense=4)
    timed = node(0, times((1, 1, 9.0, 9.0)))
    assert decode_ms(model, timed, layers=(0, 4)) == decode_ms(model, node(0), layers=(0, 4))
    assert decode_ms(model, timed, layers=(3, 5)) > decode_ms(model, node(0), layers=(3, 5)) + 5


def stages(model: ModelProfile, *nodes: NodeProfile) -> dict[str, int]:
    plan = make_plan(model, nodes, (), PlanOptions(context=256))
    assert isinstance(plan, Plan)
    return {part.node: part.stop - part.start for part in plan.assignments}


def test_a_node_whose_kernels_are_twice_as_fast_gets_more_layers() -> None:
    """Each of two equal nodes has memory for 8 of 10 layers."""
    model = moe_model()
    expected_ms = model.layers[0].routed_bytes / 16 / node(0).speeds.read_bytes_ms
    fast, slow = (times((1, 1, ms, ms)) for ms in (expected_ms / 2, expected_ms))
    assert stages(model, node(0, memory_gb=5.2), node(1, memory_gb=5.2)) == {"n0": 5, "n1": 5}
    assert stages(model, node(0, slow, memory_gb=5.2), node(1, fast, memory_gb=5.2)) == {"n0": 2, "n1": 8}
    assert stages(model, node(0, fast, memory_gb=5.2), node(1, slow, memory_gb=5.2)) == {"n0": 8, "n1": 2}


def test_the_plan_says_whose_figures_are_measured() -> None:
    model = moe_model()
    nodes = [node(0, times((1, 1, 0.2, 0.2)), memory_gb=5.2), node(1, memory_gb=5.2)]
    plan = make_plan(model, nodes, (), PlanOptions(context=256))
    assert isinstance(plan, Plan)
    text = render_plan(plan, nodes)
    assert (
        "note: blocks of experts or EXL3 matrices count as the self-test of kernels timed them on n0\n"
        in text
    )
    assert "self-test" not in render_plan(plan, [node(0), node(1)])


def test_a_plans_values_come_back_with_the_times() -> None:
    """As `rebalance` reads them from a running ring, whose factor then scales them."""
    one = node(0, times((1, 1, 0.2, 0.2), (2, 4, 0.3, 0.5)))
    made = PlannedFrom(moe_model(), (one,), (), PlanOptions(context=256))
    assert PlannedFrom.from_plain(json.loads(made.to_json())) == made
    slower = replace(one, measured=scaled(one.speeds, 2.0))
    assert slower.speeds.forms[0].ms(4) == 1.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: replace(BLOCK, top_k=0), "top_k = 0 must be at least 1"),
        (lambda: replace(BLOCK, inputs=1 << 40), "inputs = 1099511627776 must be at least 1, and less than"),
        (lambda: replace(BLOCK, formats=("b", "a")), "formats = ('b', 'a') must be one, or two or three"),
        (lambda: FormSpan(2, 1, 1, 1), "rows = 2 to 1 must be in order, from 1 to"),
        (lambda: FormSpan(1, 1 << 30, 1, 1), "must be in order, from 1 to 1048576"),
        (lambda: FormSpan(1, 2, float("nan"), 1), "first_ms = nan must be above 0, and at most"),
        (lambda: FormSpan(1, 2, 1, -1.0), "last_ms = -1.0 must be above 0, and at most"),
        (lambda: times((1, 4, 1, 1), (4, 8, 1, 1)), "rows = 1 to 4 and 4 to 8 must be in order, and apart"),
    ],
)
def test_what_cannot_be_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make()
