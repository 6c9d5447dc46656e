"""Doctor's check that the config's model fits its nodes, as far as this machine knows them. Any thread.

Plans as `plan-dry-run` does but for the proof of cuts, which may take a while.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from cluster.config import ClusterConfig
from cluster.config_read import ConfigError
from cluster.console import as_word
from cluster.diagnosis import Finding, Subject, fine, skipped
from cluster.diagnosis_model import whereabouts
from cluster.draft_model import read_drafter
from cluster.plan_inputs import plan_links, plan_nodes, plan_options, read_model
from cluster.probe import this_machine
from cluster.routes import HEAD_RANK
from planner.draft_bytes import with_drafter
from planner.forced import ForcedLayersError
from planner.model_profile import ModelProfile
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
        options = plan_options(config, model)
        draft = _draft(subject, config, folder)
        if isinstance(draft, Finding):
            yield draft
            return
        nodes = plan_nodes(config, {rank: this_machine() for rank in subject.ranks}, model)
        nodes = with_drafter(nodes, draft, options.context, options.concurrency)
        found = make_plan(model, nodes, plan_links(config), options)
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


def _draft(subject: Subject, config: ClusterConfig, model_dir: Path) -> ModelProfile | Finding | None:
    """Of the draft model that the file asks for, as the head reads it; or why that is not known."""
    name = config.speculation.drafter
    if name is None:
        return None
    try:
        folder = whereabouts(config, name).folder
        if folder is not None:
            return read_drafter(config, folder, model_dir)
    except (HubError, ConfigError) as error:
        if HEAD_RANK in subject.ranks:
            return Finding(
                "plan",
                "error",
                str(error),
                "the head does not start with a draft model that it cannot use",
                f'"draft_model": ...    # in "speculation" of {config.path}',
            )
        return skipped("plan", f"the draft model {name} is rank 0's, and not here")
    fetch = f"plan-dry-run --config {as_word(config.path)} fetches its headers"
    return skipped("plan", f"the draft model {name} is not here: {fetch}")


def _planned(subject: Subject, config: ClusterConfig, found: Plan) -> Finding:
    """A plan may count on memory that the file names and this machine does not have."""
    here = [part for part in (*found.assignments, found.drafter) if part and part.rank in subject.ranks]
    here_bytes = sum(part.need_bytes for part in here)
    ceiling_bytes = this_machine().ceiling_bytes
    if here_bytes > ceiling_bytes:
        names = ", ".join(dict.fromkeys(part.node for part in here))
        return Finding(
            "plan",
            "error",
            f"the plan gives {names} {gb(here_bytes)}, and this machine lets them have {gb(ceiling_bytes)}",
            "they swap or end while they load, or when they answer",
            f"leave memory_gb out of {config.path}: then nodes get what their machine has, shared among them",
        )
    parts = ", ".join(f"{part.node} {part.start}:{part.stop}" for part in found.assignments)
    draft = "" if found.drafter is None else f", and the draft model on {found.drafter.node}"
    return fine("plan", f"the model fits: {parts}{draft}")
