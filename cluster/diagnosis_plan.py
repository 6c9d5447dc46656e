"""Doctor's check that the config's model fits its nodes, as far as this machine knows them. Any thread.

Plans as `plan-dry-run` does but for the proof of cuts, which may take a while.
"""

from __future__ import annotations

from collections.abc import Iterable

from cluster.config import ClusterConfig
from cluster.config_read import ConfigError
from cluster.console import as_word
from cluster.diagnosis import Finding, Subject, fine, skipped
from cluster.diagnosis_model import whereabouts
from cluster.plan_inputs import plan_links, plan_nodes, plan_options, read_model
from cluster.probe import this_machine
from planner.forced import ForcedLayersError
from planner.plan import Plan
from planner.sizes import gb
from planner.solver import make_plan
from shard_loader.sources import HubError


def plan(subject: Subject) -> Iterable[Finding]:
    """Whether there is a plan."""
    config = subject.config
    if config is None or subject.running is not None:
        if config is None:
            yield skipped("plan", subject.why_no_nodes)
        return  # the head of a running ring has planned
    try:
        folder = whereabouts(config).folder
        if folder is None:
            yield skipped(
                "plan",
                f"{config.model} is not here: plan-dry-run --config {as_word(config.path)} "
                "fetches its headers",
            )
            return
        model = read_model(config, folder)
        nodes = plan_nodes(config, {rank: this_machine() for rank in subject.ranks})
        found = make_plan(model, nodes, plan_links(config), plan_options(config, model))
    except (HubError, ConfigError, ForcedLayersError) as error:
        yield skipped("plan", str(error))
        return
    if isinstance(found, Plan):
        yield _planned(subject, config, found)
        return
    yield Finding(
        "plan",
        "error",
        found.reason,
        "the head makes no plan that does not fit, so no node loads anything",
        f"plan-dry-run --config {as_word(config.path)} --why    # {found.advice}",
    )


def _planned(subject: Subject, config: ClusterConfig, found: Plan) -> Finding:
    """A plan may count on memory that the file names and this machine does not have."""
    here_bytes = sum(part.need_bytes for part in found.assignments if part.rank in subject.ranks)
    ceiling_bytes = this_machine().ceiling_bytes
    if here_bytes > ceiling_bytes:
        names = ", ".join(part.node for part in found.assignments if part.rank in subject.ranks)
        return Finding(
            "plan",
            "error",
            f"the plan gives {names} {gb(here_bytes)}, and this machine lets them have {gb(ceiling_bytes)}",
            "they swap or end while they load, or when they answer",
            f"leave memory_gb out of {config.path}: then nodes get what their machine has, shared among them",
        )
    parts = ", ".join(f"{part.node} {part.start}:{part.stop}" for part in found.assignments)
    return fine("plan", f"the model fits: {parts}")
