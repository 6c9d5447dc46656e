"""What fits machines of given memory: at which precision, with how much context, for how many at once. Pure.

Every answer is a plan of the planner, or its refusal.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from planner.cost import CostModel
from planner.fitting import fits, largest
from planner.headers import TensorHeader
from planner.kv_profile import KV_STEP_TOKENS
from planner.kv_quant import KvQuantization, quantize_kv
from planner.model_profile import ModelProfile, profile_model
from planner.node_profile import NodeProfile
from planner.plan import Plan, Refusal
from planner.precision import Precision, convert, num_params
from planner.solver import PlanOptions, make_plan

MAX_CONCURRENCY = 1024  # nobody asks for more of one ring


@dataclass(frozen=True, slots=True)
class Fit:
    """One precision. The limits are 0 where not even the least fits."""

    precision: Precision
    weight_bytes: int
    bits_per_weight: float
    outcome: Plan | Refusal  # at the asked context and concurrency
    max_context: int  # tokens, at the asked concurrency
    max_concurrency: int  # at the asked context

    @property
    def is_fitting(self) -> bool:
        return isinstance(self.outcome, Plan)


def fit(
    config: dict[str, Any],
    headers: Mapping[str, TensorHeader],
    name: str,
    nodes: Sequence[NodeProfile],
    precision: Precision,
    *,
    context: int,
    concurrency: int,
    kv: KvQuantization | None = None,
    legal_cuts: frozenset[int] | None = None,
) -> Fit:
    """Raises ModelFilesError for headers that make no model, KvQuantizationError for caches."""
    converted, whole, options = convert(config, headers, precision.bits)
    model = profile_model(converted, whole, name, options)
    if kv is not None:
        model = quantize_kv(model, kv)
    asked = PlanOptions(context, concurrency, legal_cuts=legal_cuts)
    return Fit(
        precision=precision,
        weight_bytes=model.full_bytes,
        bits_per_weight=8 * model.full_bytes / max(1, num_params(config, headers)),
        outcome=make_plan(model, nodes, (), asked),
        max_context=_max_context(model, nodes, asked),
        max_concurrency=_most(
            1, MAX_CONCURRENCY, lambda n: _fits(model, nodes, replace(asked, concurrency=n))
        ),
    )


def _max_context(model: ModelProfile, nodes: Sequence[NodeProfile], options: PlanOptions) -> int:
    """A multiple of the step in which caches grow, or the model's own limit."""
    if _fits(model, nodes, replace(options, context=model.max_context)):
        return model.max_context
    steps = model.max_context // KV_STEP_TOKENS
    return KV_STEP_TOKENS * _most(
        1, steps, lambda n: _fits(model, nodes, replace(options, context=n * KV_STEP_TOKENS))
    )


def _most(low: int, high: int, is_fine: Callable[[int], bool]) -> int:
    """The largest number in [low, high] that is fine, where all below a fine one are; 0: none is."""
    if high < low or not is_fine(low):
        return 0
    return largest(low, high + 1, is_fine)


def _fits(model: ModelProfile, nodes: Sequence[NodeProfile], options: PlanOptions) -> bool:
    return fits(CostModel(model, nodes, (), options.work), options.legal_cuts)
