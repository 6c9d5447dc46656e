"""The forms of block that `macrame kernels` tries: those of known models, or of a model's own config."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from cluster.errors import EXIT_ERROR, EXIT_USAGE, UserError
from kernels import switch
from kernels.moe_spec import PLAIN, REAL_SIZES, BlockSpec, Format
from planner.headers import ModelFilesError
from shard_loader.absent import Absent
from shard_loader.sources import HubError
from shard_loader.weights import AS_IT_IS, WeightsError, build

FORMATS = ("mxfp4", "plain", *(f"affine{bits}" for bits in (2, 3, 4, 5, 6, 8)))
DTYPES = {"bfloat16": mx.bfloat16, "float16": mx.float16, "float32": mx.float32}


@dataclass(frozen=True, slots=True)
class Form:
    """A block by the name of its model."""

    name: str
    spec: BlockSpec
    has_bias: bool = False

    @property
    def expert_bytes(self) -> int:
        """Of one expert's three matrices, without scales."""
        spec = self.spec
        bits = sum(form.bits or spec.dtype.size * 8 for form in (spec.gate, spec.up, spec.down))
        return spec.hidden_size * spec.expert_size * bits // 8

    def with_few_experts(self, count: int) -> Form:
        """The same with no more experts than that, each as large as it is."""
        few = max(self.spec.top_k, min(count, self.spec.num_experts))
        return replace(self, spec=replace(self.spec, num_experts=few))


def format_of(name: str, group_size: int) -> Format:
    """One of FORMATS. Raises UserError for a group size that it has not."""
    if name == "plain":
        return PLAIN
    try:
        if name == "mxfp4":
            return Format(4, 32, "mxfp4")
        return Format(int(name.removeprefix("affine")), group_size)
    except ValueError as error:
        raise UserError(str(error), EXIT_USAGE) from None


def known_form(name: str, form: Format, dtype: str) -> Form:
    """One of REAL_SIZES in a format."""
    spec = BlockSpec(*REAL_SIZES[name], form, form, form, dtype=DTYPES[dtype])
    return Form(name, spec)


def forms_of_model(model: str) -> list[Form]:
    """The different blocks of a folder's model, or of one of the hub: of its config and headers alone.

    Raises UserError: there is no such model, it has no expert layers, or no kernel knows them.
    """
    from shard_loader.hub import resolve_model  # huggingface_hub takes a while

    try:
        folder = resolve_model(model, Path.cwd())
        whole, _ = build(folder, AS_IT_IS, Absent(folder).intake)
    except (HubError, ModelFilesError, WeightsError) as error:
        raise UserError(str(error), EXIT_USAGE) from None
    layers = switch.take_over([whole], switch.Never())
    if not layers:
        raise UserError(f"{model} has no expert layers that kernels are for", EXIT_ERROR)
    whole(
        mx.zeros((1, 1), mx.int32), cache=make_prompt_cache(whole)
    )  # never evaluated: only shapes are asked
    found: dict[Form, None] = {}
    reasons: list[str] = []
    for layer in layers:
        taken = switch.taken_of(layer)
        assert taken is not None
        has_bias = layer.gate_proj.get("bias") is not None
        found |= dict.fromkeys(Form(Path(model).name, spec, has_bias) for spec in taken.forms)
        reasons += taken.reasons
    if not found:
        why = reasons[0] if reasons else "no layer of it was called"
        raise UserError(f"no kernel knows the expert layers of {model}: {why}", EXIT_ERROR)
    return list(found)
