"""Blocks of experts on the ladder: every format of a weight, every activation, and real models' sizes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import mlx.core as mx

from kernels import moe_reference
from kernels.ladder.case import Case, dtype_name
from kernels.moe import GEGLU, GELU, PLAIN, RELU2, Activation, BlockSpec, Experts, Format, Shared, switch_glu
from kernels.moe_constants import matrix_names
from kernels.moe_spec import FLOATS, real_spec
from kernels.random_block import random_experts

TOLERANCES = {mx.float16: 1e-3, mx.bfloat16: 8e-3, mx.float32: 5e-6}
MXFP4, NVFP4, MXFP8 = (Format(*FLOATS[mode], mode) for mode in ("mxfp4", "nvfp4", "mxfp8"))
AFFINE = (*(Format(bits, 64) for bits in (2, 3, 4, 5, 6, 8)), Format(4, 32), Format(4, 128))
FORMATS = (*AFFINE, MXFP4, PLAIN, NVFP4, MXFP8)
ONCE = tuple(
    name
    for matrix in ("gate", "up", "down", "shared_gate", "shared_up", "shared_down")
    for name in matrix_names(matrix)
)
SMALL = BlockSpec(5, 256, 128, 3, PLAIN, PLAIN, PLAIN)
QWEN3_30B_A3B, GLM_4_7_FLASH, NEMOTRON_3_NANO = (
    real_spec(name, Format(4, 64)) for name in ("qwen3-30b-a3b", "glm-4.7-flash", "nemotron-3-nano")
)


@dataclass(frozen=True, slots=True)
class _Block:
    """Random experts for so many tokens; the arrays of a case are x, indices, scores and then theirs."""

    spec: BlockSpec
    num_tokens: int
    shared: BlockSpec | None = None
    has_bias: bool = False

    def arrays(self) -> list[mx.array]:
        spec, keys = self.spec, _keys()
        x = mx.random.normal((self.num_tokens, spec.hidden_size), key=next(keys)).astype(spec.dtype)
        drawn = mx.random.uniform(shape=(self.num_tokens, spec.num_experts), key=next(keys))
        indices = mx.argsort(drawn, axis=1)[:, : spec.top_k].astype(mx.uint32)
        scores = mx.softmax(mx.random.normal((self.num_tokens, spec.top_k), key=next(keys)), axis=1)
        found = [x, indices, scores.astype(spec.dtype)]
        for block in (spec, self.shared):
            for form, shape in _matrices(block) if block is not None else ():
                made = random_experts(form, shape, spec.dtype, next(keys), has_bias=self.has_bias)
                parts = (made.weight, made.scales, made.biases, made.bias)
                found.extend(array for array in parts if array is not None)
        return found

    def run(self, *arrays: mx.array) -> mx.array:
        return switch_glu(self.spec, *self._parts(arrays))

    def reference(self, *arrays: mx.array) -> mx.array:
        return moe_reference.switch_glu(self.spec, *self._parts(arrays))

    def _parts(
        self, arrays: tuple[mx.array, ...]
    ) -> tuple[mx.array, mx.array, mx.array, Experts | None, Experts, Experts, Shared | None]:
        x, indices, scores, *rest = arrays
        given = iter(rest)
        experts = self._experts(self.spec, given)
        shared = None if self.shared is None else Shared(self.shared, *self._experts(self.shared, given))
        return x, indices, scores, *experts, shared

    def _experts(self, spec: BlockSpec, given: Iterator[mx.array]) -> tuple[Experts | None, Experts, Experts]:
        *gate, up, down = (self._taken(form, given) for form, _ in _matrices(spec))
        return gate[0] if gate else None, up, down

    def _taken(self, form: Format, given: Iterator[mx.array]) -> Experts:
        weight = next(given)
        scales = next(given) if form.mode != "plain" else None
        biases = next(given) if form.mode == "affine" else None
        return Experts(weight, scales, biases, next(given) if self.has_bias else None)


def _keys() -> Iterator[mx.array]:
    key = mx.random.key(7)
    while True:
        key, drawn = mx.random.split(key)
        yield drawn


def _matrices(spec: BlockSpec) -> list[tuple[Format, tuple[int, int, int]]]:
    """Of gate, where there is one, up and down: format and (E, N, K)."""
    return list(zip(spec.forms.values(), spec.shapes.values(), strict=True))


def _case(
    name: str, block: _Block, *, is_golden: bool = False, is_full: bool = False, is_long: bool = True
) -> Case:
    spec = block.spec
    return Case(
        name=f"moe/{name}-{dtype_name(spec.dtype)}-{block.num_tokens}",
        inputs=block.arrays,
        run=block.run,
        reference=block.reference,
        tolerance=TOLERANCES[spec.dtype],
        is_golden=is_golden,
        is_full=is_full,
        is_long=is_long,
        once=ONCE,
    )


def moe_cases() -> list[Case]:
    """Of one token and of nine. In CI one format alone and one with all that can be added to it."""
    cases = []
    four = replace(SMALL, gate=Format(4, 64), up=Format(4, 64), down=Format(4, 64))
    for tokens in (1, 9):
        cases.append(_case("affine4-64", _Block(four, tokens), is_golden=True, is_long=tokens == 9))
        mixed = replace(
            SMALL, gate=Format(3, 32), up=MXFP4, down=Format(8, 128), activation=GEGLU, dtype=mx.float16
        )
        shared = BlockSpec(1, 256, 192, 1, Format(6, 32), PLAIN, Format(2, 64), dtype=mx.float16)
        block = _Block(mixed, tokens, shared, has_bias=True)
        cases.append(_case("mixed-shared-biased", block, is_golden=True, is_long=tokens == 1))
        for number, form in enumerate(FORMATS):
            kind = ("swiglu", "swiglu_oai", "swiglu_clamped", "swiglu_clamped_after", "geglu")[number % 5]
            activation = Activation(kind, limit=1.0) if kind not in {"swiglu", "geglu"} else Activation(kind)
            dtype = mx.float16 if number % 2 else mx.bfloat16
            spec = replace(SMALL, gate=form, up=form, down=form, activation=activation, dtype=dtype)
            name = f"{form.mode}{form.bits}-{form.group_size}-{kind}"
            cases.append(_case(name, _Block(spec, tokens)))
        cases += _gateless_cases(tokens)
        both = Activation("situ_both", alpha=1.5, limit=2.0)
        floats = replace(SMALL, gate=NVFP4, up=MXFP8, down=NVFP4, activation=both, dtype=mx.float16)
        cases.append(_case("floats-situ_both", _Block(floats, tokens), is_golden=True, is_long=tokens == 9))
        situ = replace(four, activation=Activation("situ", alpha=0.5))
        cases.append(_case("affine4-64-situ", _Block(situ, tokens)))
    cases.append(_case("affine4-64", _Block(four, 2)))  # fewer than 8 indices lie in constant memory
    for name, spec in (
        ("Qwen3-30B-A3B", QWEN3_30B_A3B),
        ("GLM-4.7-Flash", GLM_4_7_FLASH),
        ("Nemotron-3-Nano", NEMOTRON_3_NANO),
    ):
        other = replace(spec, num_experts=1, top_k=1) if spec is GLM_4_7_FLASH else None
        cases.extend(
            _case(name, _Block(spec, tokens, other), is_full=True) for tokens in (1, 2, 8, 16, 32, 63)
        )
    return cases


def _gateless_cases(tokens: int) -> list[Case]:
    """Up, an activation and down, as nemotron_h and phixtral have them."""
    four = replace(SMALL, gate=None, up=Format(4, 64), down=Format(4, 64), activation=RELU2)
    cases = [_case("gateless-relu2", _Block(four, tokens), is_golden=True, is_long=tokens == 1)]
    for up, down, activation in ((PLAIN, Format(6, 64), GELU), (NVFP4, MXFP8, RELU2), (MXFP8, MXFP4, GELU)):
        spec = replace(four, up=up, down=down, activation=activation, dtype=mx.float16)
        name = f"gateless-{up.mode}-{down.mode}-{activation.kind}"
        cases.append(_case(name, _Block(spec, tokens, has_bias=activation is GELU)))
    return cases
