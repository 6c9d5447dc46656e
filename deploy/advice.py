"""A rebalancing advice for people, and as the object of `macrame plan --from-running --json`. Pure."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from planner.measured import StageFactor
from planner.plan import Plan
from planner.rebalance import MIN_GAIN, Advice, Hop, Move
from planner.render import table
from planner.sizes import size

_AIMS = {
    "latency": "tokens a second of one user",
    "throughput": "tokens a second of all users",
    "ttft": "the time to the first token",
}


def advice_object(advice: Advice) -> dict[str, Any]:
    """The JSON object."""
    return {
        "verdict": advice.verdict,
        "advice": _sentence(advice),
        "objective": advice.objective,
        "gain": advice.gain,
        "gain_low": advice.low_gain,
        "gain_high": advice.high_gain,
        "stages": [asdict(one) | {"factor": one.factor} for one in advice.stages],
        "hops": [asdict(hop) for hop in advice.hops],
        "present": advice.present.as_dict(),
        "best": advice.best.as_dict(),
        "layers": _layers(advice.best),
        "moves": [asdict(move) for move in advice.moves],
        "unmeasured_nodes": list(advice.unmeasured),
        "freed_nodes": list(advice.freed),
        "untested": None
        if advice.untested is None
        else {"gain": advice.untested_gain, "layers": _layers(advice.untested)},
    }


def advice_text(advice: Advice) -> str:
    """Several lines: measured beside expected, both plans, and what to do."""
    present, best = advice.present, advice.best
    lines = [
        f"{present.model}: what the ring measured, beside what its plan expected",
        "",
        *table([_stage_row(one) for one in advice.stages]),
    ]
    if advice.hops:
        lines += ["", *table([_hop_row(hop) for hop in advice.hops])]
    lines += ["", f"the present plan by these measurements: {_promise(present)}", *table(_plan_rows(present))]
    if advice.verdict != "leave":
        lines += ["", f"the best plan by these measurements: {_promise(best)}", *table(_plan_rows(best))]
        lines += ["", *table([_move_row(move) for move in advice.moves])]
    lines += ["", _sentence(advice), *_notes(advice)]
    return "\n".join(lines)


def _sentence(advice: Advice) -> str:
    """What to do."""
    if advice.verdict == "leave":
        if advice.present.assignments == advice.best.assignments:
            kept = " of those with the layers that the cluster file forces" if advice.is_kept else ""
            return f"the present plan is the best{kept}: leave it"
        return f"the present plan is within {max(advice.gain, 0.0005):.1%} of the best: leave it"
    gain = (
        f"{_AIMS[advice.objective]} would go from {_value(advice, advice.present)} to "
        f"{_value(advice, advice.best)}, a gain of {advice.gain:.0%} "
        f"({advice.low_gain:.0%} to {advice.high_gain:.0%} by the spread of the steps)"
    )
    layers = ", ".join(f"{node} {part}" for node, part in _layers(advice.best).items())
    if advice.verdict == "uncertain":
        return (
            f"uncertain: {gain}; below {MIN_GAIN:.0%} it is not worth it, so generate more tokens "
            f"and ask again before you set these layers: {layers}"
        )
    return (
        f'{gain}: set these layers in the cluster file ("layers" of each node, and none at the others), '
        f"copy it to all nodes and restart them: {layers}"
    )


def _value(advice: Advice, plan: Plan) -> str:
    """What the objective makes best."""
    predicted = plan.predicted
    match advice.objective:
        case "latency":
            return f"{predicted.decode_tok_s:.1f} tok/s"
        case "throughput":
            return f"{predicted.throughput_tok_s:.1f} tok/s"
        case _:
            return f"{predicted.ttft_s:.3f} s"


def _layers(plan: Plan) -> dict[str, str]:
    return {part.node: f"{part.start}:{part.stop}" for part in plan.assignments}


def _promise(plan: Plan) -> str:
    predicted = plan.predicted
    return (
        f"{predicted.decode_tok_s:.1f} tok/s for one user, {predicted.throughput_tok_s:.1f} tok/s for "
        f"{plan.concurrency}, first token after {predicted.ttft_s:.2f} s"
    )


def _stage_row(one: StageFactor) -> dict[str, str]:
    return {
        "rank": str(one.rank),
        "node": one.node,
        "layers": f"{one.start}:{one.stop} ({one.stop - one.start})",
        "steps": str(one.num_steps),
        "at token": f"{one.position:.0f}",
        "expected": f"{one.expected_ms:.2f} ms",
        "measured": f"{one.measured_ms:.2f} ms",
        "p25..p75": f"{one.low_ms:.2f}..{one.high_ms:.2f}",
        "times": f"{one.factor:.2f}",
        "prompts": "" if one.products is None else f"{one.factor * one.products:.2f}",
    }


def _hop_row(hop: Hop) -> dict[str, str]:
    return {
        "hop": f"rank {hop.from_rank} to {hop.to_rank}",
        "expected": f"{hop.expected_ms:.2f} ms",
        "measured": "" if hop.measured_ms is None else f"{hop.measured_ms:.2f} ms",
    }


def _plan_rows(plan: Plan) -> list[dict[str, str]]:
    return [
        {
            "stage": str(part.stage),
            "rank": str(part.rank),
            "node": part.node,
            "layers": f"{part.start}:{part.stop} ({part.stop - part.start})",
            "weights": size(part.weight_bytes),
            "needs": size(part.need_bytes),
            "budget": size(part.budget_bytes),
            "decode": f"{part.decode_ms:.2f} ms",
            "prefill": f"{part.prefill_ms:.1f} ms",
        }
        for part in plan.assignments
    ]


def _move_row(move: Move) -> dict[str, str]:
    def text(layers: tuple[int, int] | None) -> str:
        return "none" if layers is None else f"{layers[0]}:{layers[1]}"

    return {
        "rank": str(move.rank),
        "node": move.node,
        "layers": f"{text(move.old)} -> {text(move.new)}",
        "to load": size(move.load_bytes),
        "to free": size(move.free_bytes),
    }


def _notes(advice: Advice) -> list[str]:
    notes = [
        "note: plans are priced at half the context; the measured steps were where the table says",
    ]
    if advice.untested is not None:
        layers = ", ".join(f"{node} {part}" for node, part in _layers(advice.untested).items())
        notes.append(
            f"note: {', '.join(advice.unmeasured)} own no layers and measured nothing; as fast as nodes like "
            f"them were, they would bring {advice.untested_gain:.0%} with the layers {layers}: try it, or "
            "measure them with macrame profile"
        )
    elif advice.unmeasured:
        notes.append(
            f"note: {', '.join(advice.unmeasured)} own no layers and measured nothing: none are moved there"
        )
    if advice.verdict != "leave" and advice.freed:
        notes.append(
            f"note: the cluster file forces layers of {', '.join(advice.freed)}; --keep-layers keeps them"
        )
    if all(one.products is None for one in advice.stages):
        notes.append("note: no prompt of 16 tokens or more was measured: they are scaled as decode steps are")
    return notes
