"""What measured links mean for a plan, in tokens per second, by the planner's cost model. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.links import Pair
from planner.cost import REMOTE_GBIT_S, REMOTE_LATENCY_MS, CostModel, Link, Stage
from planner.model_profile import ModelProfile
from planner.node_profile import NodeProfile
from planner.plan import Plan
from planner.planned_from import PlannedFrom
from planner.solver import PlanOptions, make_plan
from planner.workload import Workload

MIN_GAIN = 0.03  # less is no reason to plan anew


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens per second of a plan: one user alone, and all together."""

    decode_tok_s: float
    throughput_tok_s: float


@dataclass(frozen=True, slots=True)
class WifiCost:
    """One pair that goes over Wi-Fi, and the same plan with a cable there."""

    pair: Pair
    wired: Speed


@dataclass(frozen=True, slots=True)
class LinksCost:
    """A plan over the links as the config has them and as measured; better: another plan for these."""

    assumed: Speed
    measured: Speed
    wifi: tuple[WifiCost, ...]
    better: Speed | None  # None: a new plan would gain less than MIN_GAIN


def links_cost(plan: Plan, made_from: PlannedFrom, pairs: Sequence[Pair]) -> LinksCost:
    """Compare; pairs without a measurement keep the links that the plan was made from.

    A cable is what the planner takes for a link that nobody describes.
    """
    model, nodes, links = made_from.model, made_from.nodes, made_from.links
    measured, work = with_measured(links, pairs), made_from.options.work
    now = _speed(plan, work, model, nodes, measured)
    wifi = [pair for pair in pairs if pair.wifi is not None and not pair.reasons]
    return LinksCost(
        assumed=_speed(plan, work, model, nodes, links),
        measured=now,
        wifi=tuple(WifiCost(p, _speed(plan, work, model, nodes, _with_cable(measured, p))) for p in wifi),
        better=_better(now, model, nodes, measured, made_from.options),
    )


def with_measured(links: Sequence[Link], pairs: Sequence[Pair]) -> list[Link]:
    """The links with those of the measured pairs in their places."""
    found = {link.ranks: link for link in links}
    for pair in pairs:
        if not pair.reasons:
            found[pair.ranks] = Link(pair.ranks, pair.latency_ms, pair.bandwidth_gbit_s)
    return list(found.values())


def cost_lines(cost: LinksCost, concurrency: int) -> list[str]:
    """The comparison in sentences."""
    lines = [
        f"predicted with the measured links: {_words(cost.measured, concurrency)}; with the config's, or the "
        f"planner's own where it has none: {_words(cost.assumed, concurrency)}"
    ]
    for one in cost.wifi:
        path = one.pair.wifi
        assert path is not None
        gain = one.wired.decode_tok_s / cost.measured.decode_tok_s - 1
        lines.append(
            f"warning: {' - '.join(one.pair.names)} goes over Wi-Fi ({path.interface or '?'}): "
            f"{one.pair.latency_ms:.3g} ms one way; by cable ({REMOTE_LATENCY_MS:g} ms) this plan would give "
            f"{_words(one.wired, concurrency)} instead of {_words(cost.measured, concurrency)}"
            if gain >= MIN_GAIN
            else f"warning: {' - '.join(one.pair.names)} goes over Wi-Fi ({path.interface or '?'}): "
            f"{one.pair.latency_ms:.3g} ms one way; this plan would gain little by a cable there"
        )
    if cost.better is not None:
        lines.append(
            f"a plan made for these links could give {_words(cost.better, concurrency)}: write them with "
            "--write, copy the file to all nodes and restart them"
        )
    return lines


def _words(speed: Speed, concurrency: int) -> str:
    alone = f"{speed.decode_tok_s:.1f} tok/s"
    return alone if concurrency == 1 else f"{alone} ({speed.throughput_tok_s:.1f} with {concurrency} users)"


def _speed(
    plan: Plan, work: Workload, model: ModelProfile, nodes: Sequence[NodeProfile], links: Sequence[Link]
) -> Speed:
    cost = CostModel(model, nodes, links, work)
    places = {node.rank: index for index, node in enumerate(nodes)}
    stages = [Stage(places[a.rank], a.start, a.stop) for a in plan.assignments]
    return Speed(1e3 / cost.path_ms(stages), cost.throughput_tok_s(stages))


def _with_cable(links: Sequence[Link], pair: Pair) -> list[Link]:
    kept = [link for link in links if link.ranks != pair.ranks]
    return [*kept, Link(pair.ranks, REMOTE_LATENCY_MS, REMOTE_GBIT_S)]


def _better(
    now: Speed, model: ModelProfile, nodes: Sequence[NodeProfile], links: Sequence[Link], options: PlanOptions
) -> Speed | None:
    plan = make_plan(model, nodes, links, options)
    if not isinstance(plan, Plan):
        return None
    found = _speed(plan, options.work, model, nodes, links)
    key = "throughput_tok_s" if options.objective == "throughput" else "decode_tok_s"
    return found if getattr(found, key) >= (1 + MIN_GAIN) * getattr(now, key) else None
