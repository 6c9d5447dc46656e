"""A block's graph is built again without its launches: once for each shape, with any arrays of that form."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import pytest

from kernels import backend, moe, source
from kernels.moe_spec import PLAIN, RELU2, Activation, BlockSpec, Format
from tests.moe_blocks import Block, block, routed

FORM = Format(4, 64)
SPEC = BlockSpec(6, 128, 64, 3, FORM, FORM, FORM, dtype=mx.bfloat16)
BATCH = ["moe_gate_up_batch", "moe_down_batch", "moe_sum"]
GATELESS = replace(SPEC, gate=None, activation=RELU2)


class Launches:
    """Stands for MLX's Metal backend, which only a Mac has: outputs are made of a number of each input."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def kernel(self, kernel: source.Kernel) -> Callable[..., list[mx.array]]:
        def call(
            *,
            inputs: Sequence[mx.array],
            output_shapes: Sequence[Sequence[int]],
            output_dtypes: Sequence[mx.Dtype],
            **_: Any,
        ) -> list[mx.array]:
            self.names.append(kernel.name)
            total = sum((mx.sin(a.reshape(-1)[0].astype(mx.float32)) for a in inputs), mx.array(0.0))
            pairs = zip(output_shapes, output_dtypes, strict=True)
            return [mx.broadcast_to(total, shape).astype(dtype) for shape, dtype in pairs]

        return call


@pytest.mark.parametrize(("spec", "inner"), [(SPEC, "moe_gate_up"), (GATELESS, "moe_up")])
def test_a_shape_is_launched_once_and_repeated_with_other_arrays(
    monkeypatch: pytest.MonkeyPatch, spec: BlockSpec, inner: str
) -> None:
    launches = Launches()
    monkeypatch.setattr(source, "_metal", launches.kernel)
    made = [block(spec, seed=seed) for seed in (1, 2)]
    layers = [moe.Block(spec, one.gate, one.up, one.down) for one in made]
    one, few = [inner, "moe_down_sum"], [f"{inner}_batch", "moe_down_batch", "moe_sum"]
    moe._replay.cache_clear()
    mx.enable_compile()  # tests run without
    try:
        with backend.forced("metal"):
            for tokens, is_summed, wanted in ((1, True, one), (5, True, few), (5, False, few[:2])):
                found, launched = [], []
                launches.names.clear()
                for seed, layer in enumerate((*layers, *layers)):
                    x, indices, scores = routed(spec, tokens, seed=seed)
                    found.append(moe.run(layer, x, indices, scores if is_summed else None))
                assert launches.names == wanted
                for seed, layer in enumerate((*layers, *layers)):
                    x, indices, scores = routed(spec, tokens, seed=seed)
                    launched.append(moe._launched(layer, x, indices, scores if is_summed else None, None))
                assert all(mx.array_equal(a, b) for a, b in zip(found, launched, strict=True))
                assert len({float(a.reshape(-1)[0]) for a in found}) == 4  # each of its own arrays
    finally:
        mx.disable_compile()
        moe._replay.cache_clear()


@pytest.mark.parametrize("is_scored", [False, True])
def test_a_block_with_a_shared_expert_is_repeated_too(
    monkeypatch: pytest.MonkeyPatch, is_scored: bool
) -> None:
    launches = Launches()
    monkeypatch.setattr(source, "_metal", launches.kernel)
    own = BlockSpec(1, 128, 96, 1, FORM, FORM, PLAIN, dtype=mx.bfloat16)
    made = [block(SPEC, shared=own, seed=seed) for seed in (1, 2)]
    layers = [moe.Block(SPEC, one.gate, one.up, one.down) for one in made]
    others = [_shared_block(one) for one in made]
    moe._replay.cache_clear()
    mx.enable_compile()  # tests run without
    try:
        with backend.forced("metal"):
            for tokens, wanted in ((1, ["moe_gate_up", "moe_down_sum"]), (5, BATCH)):
                found, launched = [], []
                launches.names.clear()
                for run, into in ((moe.run, found), (moe._launched, launched)):
                    for seed in range(4):
                        x, indices, scores = routed(SPEC, tokens, seed=seed)
                        factor = mx.full((tokens, 1), 0.1 * seed, mx.bfloat16) if is_scored else None
                        shared = moe.SharedBlock(others[seed % 2], factor)
                        into.append(run(layers[seed % 2], x, indices, scores, shared))
                    if run is moe.run:
                        assert launches.names == [f"{name}_shared" for name in wanted]
                assert all(mx.array_equal(a, b) for a, b in zip(found, launched, strict=True))
                assert len({float(a.reshape(-1)[0]) for a in found}) == 4  # each of its own arrays
    finally:
        mx.disable_compile()
        moe._replay.cache_clear()


def test_nothing_is_kept_of_shared_experts_that_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """New weights make a new block: what is kept by it must not hold the weights of all before."""
    monkeypatch.setattr(source, "_metal", Launches().kernel)
    own = BlockSpec(1, 128, 96, 1, FORM, FORM, PLAIN, dtype=mx.bfloat16)
    made = block(SPEC, shared=own)
    layer = moe.Block(SPEC, made.gate, made.up, made.down)
    x, indices, scores = routed(SPEC, 1)
    moe._replay.cache_clear()
    gone = []
    with backend.forced("metal"):
        moe.run(layer, x, indices, scores)
        for is_scored in (False, True) * 3:
            other = _shared_block(made)
            moe.run(layer, x, indices, scores, moe.SharedBlock(other, scores[:, :1] if is_scored else None))
            gone.append(weakref.ref(other))
            assert set(layer.reasons) == {None, other}
            assert set(layer.replays) == {(None, True, False), (other, True, is_scored)}
            del other
    assert [one() for one in gone[:-1]] == [None] * 5
    moe._replay.cache_clear()


def _shared_block(one: Block) -> moe.Block:
    assert one.shared is not None
    return moe.SharedBlock.of(one.shared).block


def test_texts_follow_from_constants(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLX keeps a kernel by its name and constants, and compiles anew where its text changes."""
    monkeypatch.setattr(source, "_metal", Launches().kernel)
    texts: dict[object, str] = {}
    nvfp4, mxfp8 = Format(4, 16, "nvfp4"), Format(8, 32, "mxfp8")
    for spec in (
        SPEC,
        replace(SPEC, gate=nvfp4),
        replace(SPEC, up=mxfp8),
        replace(SPEC, down=nvfp4),
        replace(SPEC, activation=Activation("situ")),
        replace(SPEC, activation=Activation("situ"), up=mxfp8),
        GATELESS,
        replace(GATELESS, up=mxfp8),
    ):
        with backend.forced("metal"), source.recorded() as calls:
            one = block(spec)
            moe.run(moe.Block(spec, one.gate, one.up, one.down), *routed(spec, 1))
        for call in calls:
            key = (call.kernel.name, *sorted((name, str(value)) for name, value in call.template.items()))
            text = call.kernel.header + call.kernel.body
            assert texts.setdefault(key, text) == text
    assert len(texts) == 7 + 2  # of gate and up, or up; and of down
