"""The blocks and EXL3 matrices that `macrame kernels` tries: of known models, or of a model's config."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

from cluster.errors import EXIT_ERROR, EXIT_USAGE, UserError
from kernels import switch
from kernels.exl3 import Exl3Linear, exl3_layers
from kernels.exl3_choice import Called, learning
from kernels.exl3_reference import Codebook
from kernels.exl3_subject import Exl3Subject, exl3_subjects, stored_bytes
from kernels.exl3_trials import Exl3Layer, describe
from kernels.expert_blocks import expert_nbytes, projections
from kernels.expert_subject import ExpertSubject, expert_subjects
from kernels.measure import MAX_CALLS, Subject
from kernels.moe_spec import FLOATS, PLAIN, REAL_SIZES, BlockSpec, Format, real_shared_spec, real_spec
from kernels.random_block import RandomBlock, random_layer
from kernels.random_matrix import random_matrix
from kernels.shared_subject import SharedSubject, shared_subjects
from planner.headers import ModelFilesError
from shard_loader.absent import Absent
from shard_loader.sources import HubError
from shard_loader.weights import AS_IT_IS, WeightsError, build

FORMATS = (*FLOATS, "plain", *(f"affine{bits}" for bits in (2, 3, 4, 5, 6, 8)))
EMULATED_TOKENS = (1, 2, 8)  # of blocks
MAX_LAYERS = 4  # of experts
# Inputs and outputs of a model's linears: q and o, k and v, gate and up, down.
LINEARS = {"qwen3-8b": ((4096, 4096), (4096, 1024), (4096, 12288), (12288, 4096))}
DTYPES = {"bfloat16": mx.bfloat16, "float16": mx.float16, "float32": mx.float32}


@dataclass(frozen=True, slots=True)
class Form:
    """A block by the name of its model. shared: of the shared expert beside it; None: it is tried alone."""

    name: str
    spec: BlockSpec
    has_bias: bool = False
    shared: BlockSpec | None = None
    has_shared_bias: bool = False

    @property
    def num_experts(self) -> int:
        return self.spec.num_experts

    @property
    def expert_bytes(self) -> int:
        """Of one expert's matrices, without scales."""
        spec = self.spec
        bits = sum(form.bits or spec.dtype.size * 8 for form in spec.forms.values())
        return spec.hidden_size * spec.expert_size * bits // 8

    def with_few_experts(self, count: int) -> Form:
        """The same with no more experts than that, each as large as it is."""
        few = max(self.spec.top_k, min(count, self.spec.num_experts))
        return replace(self, spec=replace(self.spec, num_experts=few))

    def subject(self, num_layers: Callable[[int], int]) -> Made:
        """As a node tests it, with random weights; num_layers: how many, by the bytes of one."""
        if self.shared is not None:
            return self._subject_with(self.shared, num_layers)
        first = random_layer(self.spec, has_bias=self.has_bias)
        layer_bytes = expert_nbytes(self.spec, first) * self.spec.num_experts
        more = range(1, min(MAX_LAYERS, num_layers(layer_bytes)))
        layers = [first, *(random_layer(self.spec, has_bias=self.has_bias, seed=seed) for seed in more)]
        return Made(ExpertSubject(self.spec, layers), EMULATED_TOKENS, layer_bytes, len(layers))

    def _subject_with(self, shared: BlockSpec, num_layers: Callable[[int], int]) -> Made:
        first = self._block(shared, 0)
        layer_bytes = sum(int(array.nbytes) for _, array in tree_flatten(first.parameters()))
        more = range(1, min(MAX_LAYERS, num_layers(layer_bytes)))
        blocks = [first, *(self._block(shared, seed) for seed in more)]
        layers = switch.take_over(blocks, switch.Never())
        subject = SharedSubject(ExpertSubject(self.spec, layers), shared)
        return Made(subject, EMULATED_TOKENS, layer_bytes, len(blocks))

    def _block(self, shared: BlockSpec, seed: int) -> RandomBlock:
        return RandomBlock(
            self.spec, shared, has_bias=self.has_bias, has_shared_bias=self.has_shared_bias, seed=seed
        )


@dataclass(frozen=True, slots=True)
class MatrixForm:
    """An EXL3 matrix by the name of its model. kinds: bits and codebook, of each expert if it has them."""

    name: str
    input_dims: int
    output_dims: int
    kinds: tuple[tuple[int, Codebook], ...]
    called: Called
    has_experts: bool = False
    has_bias: bool = False

    @property
    def num_experts(self) -> int:
        """0 for a linear."""
        return len(self.kinds) if self.has_experts else 0

    @property
    def expert_bytes(self) -> int:
        """Of one expert, or of the linear, without scales."""
        return self.input_dims * self.output_dims * max(bits for bits, _ in self.kinds) // 8

    def with_few_experts(self, count: int) -> MatrixForm:
        """The same with no more experts than that, each as large as it is; a linear stays whole."""
        few = max(self.called.top_k, min(count, len(self.kinds)))
        return replace(self, kinds=self.kinds[:few])

    def subject(self, num_layers: Callable[[int], int]) -> Made:
        """As a node tests it, with random streams; num_layers: how many, by the bytes of one."""
        first = self._layer(0)
        layer_bytes = stored_bytes(first)
        more = range(1, min(MAX_CALLS, num_layers(layer_bytes)))
        layers = [first, *(self._layer(seed) for seed in more)]
        subject = Exl3Subject(describe(first, self.called), layers, self.called)
        return Made(subject, tuple(first for first, _ in subject.classes), layer_bytes, len(layers))

    def _layer(self, seed: int) -> Exl3Layer:
        return random_matrix(
            (self.input_dims, self.output_dims),
            self.kinds,
            self.called,
            has_experts=self.has_experts,
            has_bias=self.has_bias,
            seed=seed,
        )


@dataclass(frozen=True, slots=True)
class Made:
    """What stands for a model's layers in a trial."""

    subject: Subject
    emulated_tokens: tuple[int, ...]  # to try where nothing is timed
    layer_bytes: int
    num_layers: int


def format_of(name: str, group_size: int) -> Format:
    """One of FORMATS. Raises UserError for a group size that it has not."""
    if name == "plain":
        return PLAIN
    try:
        if name in FLOATS:
            return Format(*FLOATS[name], name)
        return Format(int(name.removeprefix("affine")), group_size)
    except ValueError as error:
        raise UserError(str(error), EXIT_USAGE) from None


def known_forms(name: str, form: Format, dtype: str) -> list[Form]:
    """One of REAL_SIZES in a format: its experts, and these with the shared expert that it has."""
    alone = Form(name, real_spec(name, form, DTYPES[dtype]))
    shared = real_shared_spec(name, form, DTYPES[dtype])
    return [alone] if shared is None else [alone, replace(alone, shared=shared)]


def known_matrices(name: str, bits: int, dtype: str) -> list[MatrixForm]:
    """The different ones of one of EXL3_BLOCKS."""
    model = name.removesuffix("-exl3")
    plain: list[tuple[int, Codebook]] = [(bits, "mcg")]
    if model in REAL_SIZES:
        num_experts, hidden, expert, top_k = REAL_SIZES[model]
        sizes = (((hidden, expert), False), ((expert, hidden), True))  # gate and up; down
        kinds = tuple(plain * num_experts)
        return [
            MatrixForm(name, *pair, kinds, Called(DTYPES[dtype], top_k, has_own), has_experts=True)
            for pair, has_own in sizes
        ]
    return [MatrixForm(name, *pair, tuple(plain), Called(DTYPES[dtype])) for pair in LINEARS[model]]


def forms_of_model(model: str) -> list[Form | MatrixForm]:
    """The different ones of a folder's model, or of one of the hub: of its config and headers alone.

    Raises UserError: there is no such model, it has nothing that kernels are for, or no kernel knows it.
    """
    from shard_loader.hub import resolve_model  # huggingface_hub takes a while

    try:
        folder = resolve_model(model, Path.cwd())
        whole, _ = build(folder, AS_IT_IS, Absent(folder).intake)
    except (HubError, ModelFilesError, WeightsError) as error:
        raise UserError(str(error), EXIT_USAGE) from None
    layers, matrices = switch.take_over([whole], switch.Never()), exl3_layers([whole])
    if not layers and not matrices:
        raise UserError(
            f"{model} has no expert layers that kernels are for, and no EXL3 matrices", EXIT_ERROR
        )
    with learning(matrices):  # never evaluated: only shapes are asked
        whole(mx.zeros((1, 1), mx.int32), cache=make_prompt_cache(whole))
    name = Path(model).name
    blocks, reasons = expert_subjects(layers)
    found: dict[Form | MatrixForm, None] = {}
    for one in blocks:
        found |= {Form(name, one.spec, _has_bias(projections(one.layers[0]))): None}
    for both in shared_subjects(blocks):
        alone = Form(name, both.experts.spec, _has_bias(projections(both.experts.layers[0])))
        found |= {replace(alone, shared=both.spec, has_shared_bias=_has_bias(both.parts)): None}
    for matrix in exl3_subjects(matrices):
        found |= {_form_of(name, matrix.layers[0], matrix.called): None}
    if not found:
        why = reasons[0] if reasons else "no layer of it was called"
        raise UserError(f"no kernel knows the expert layers of {model}: {why}", EXIT_ERROR)
    return list(found)


def _has_bias(parts: Mapping[str, Any]) -> bool:
    return parts["up"].get("bias") is not None


def _form_of(name: str, layer: Exl3Layer, called: Called) -> MatrixForm:
    is_linear = isinstance(layer, Exl3Linear)
    kinds = ((layer.bits, layer.codebook),) if isinstance(layer, Exl3Linear) else layer.kinds_of_experts
    return MatrixForm(
        name, layer.input_dims, layer.output_dims, kinds, called, not is_linear, "bias" in layer
    )
