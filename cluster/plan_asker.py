"""Plans of one model for configurations that differ in their nodes, or in what is asked of them. Pure but for
the prover, which may start a process.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster.config import ClusterConfig
from cluster.config_read import ConfigError
from cluster.plan_choices import PlanChoices
from cluster.plan_inputs import plan_links, plan_nodes, plan_options
from cluster.plan_output import plan_object
from cluster.proof import Prover
from cluster.proven_plan import ProvenPlan, make_proven_plan
from planner.compare import Compared, compare
from planner.cost import CostModel, Link
from planner.draft_bytes import with_drafter
from planner.forced import ForcedLayersError
from planner.model_profile import ModelProfile
from planner.node_profile import NodeProfile
from planner.plan import Plan
from planner.solver import PlanOptions


@dataclass(frozen=True, slots=True)
class AskedPlan:
    """One plan, and what it was made for."""

    proven: ProvenPlan
    model: ModelProfile
    nodes: list[NodeProfile]
    links: list[Link]
    options: PlanOptions

    @property
    def cost(self) -> CostModel:
        """Bytes and times of any stage on these nodes, with the chunk of the plan."""
        result, work = self.proven.result, self.options.work
        if isinstance(result, Plan):
            work = replace(work, chunk_tokens=result.chunk_tokens)
        return CostModel(self.model, self.nodes, self.links, work)

    @property
    def same_cuts(self) -> PlanOptions:
        """The options with the cuts that were found to be legal."""
        return replace(self.options, legal_cuts=self.proven.legal_cuts)

    def compared(self, *, is_quick: bool) -> list[Compared]:
        """Every strategy beside this plan."""
        asked = self.model, self.nodes, self.links, self.same_cuts
        return compare(self.proven.result, *asked, is_quick=is_quick)

    def as_dict(self, compared: Sequence[Compared] = ()) -> dict[str, Any]:
        """For JSON."""
        return plan_object(self.proven.result, self.model, self.nodes, self.options, compared)


class PlanAsker:
    """Asks for plans of one model on machines that were measured once."""

    def __init__(
        self,
        model: ModelProfile,
        model_dir: Path,
        measured: Mapping[int, NodeProfile],
        choices: PlanChoices,
        say: Callable[[str], None],
        *,
        draft: ModelProfile | None = None,
    ) -> None:
        self.model, self._measured, self._choices, self._draft = model, measured, choices, draft
        self._prover = Prover(model_dir, threading.Event(), say)

    def __call__(self, config: ClusterConfig) -> AskedPlan:
        """Raises ConfigError for nodes that nothing is known of and for forced layers that do not tile."""
        options, links = plan_options(config, self.model, self._choices), plan_links(config)
        nodes = plan_nodes(config, self._measured, self.model)
        nodes = with_drafter(nodes, self._draft, options.context, options.concurrency)
        try:
            proven = make_proven_plan(self.model, nodes, links, options, self._prover, is_together=False)
        except ForcedLayersError as error:
            raise ConfigError(f"{config.path}: {error}") from None
        return AskedPlan(proven, self.model, nodes, links, options)
