"""What a running ring measured of itself, as speeds and links that a plan can be made with. Pure.

A stage's decode steps are compared with what the cost model expects of it at the same position and of as many
rows; their ratio scales all the rates of its node. A node without layers has measured nothing: its rates are
scaled as those of nodes like it are, so that an error which all rates share does not make it look fast.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from planner.cost import CostModel, Link, Stage
from planner.model_profile import ModelProfile
from planner.node_profile import NodeProfile
from planner.plan import Assignment
from planner.speeds import Speeds
from planner.workload import Workload

MIN_STEPS = 32  # decode steps of a stage
MIN_CHUNK_TOKENS = 16  # a shorter chunk says little of the rate of large products
MAX_FACTOR = 1e4  # further from the expected, a clock is wrong rather than a chip


class MeasuresError(ValueError):
    """What was measured cannot be right; one sentence."""


class TooFewStepsError(ValueError):
    """A stage has made too few steps; one sentence. `num_missing` more are needed."""

    def __init__(self, message: str, num_missing: int) -> None:
        super().__init__(message)
        self.num_missing = num_missing


@dataclass(frozen=True, slots=True)
class StageTimes:
    """The latest steps of one stage; of each kind, all fields have the same length."""

    decode_ms: tuple[float, ...] = ()
    decode_position: tuple[int, ...] = ()  # of the token, of the longest row
    decode_rows: tuple[int, ...] = ()  # that shared the step; empty: one each
    chunk_ms: tuple[float, ...] = ()
    chunk_tokens: tuple[int, ...] = ()
    chunk_position: tuple[int, ...] = ()  # of the first token
    uptime_ms: float = math.inf  # since the stage became ready


@dataclass(frozen=True, slots=True)
class StageFactor:
    """How much longer a stage takes than expected; low and high: for its p25 and p75 steps."""

    rank: int
    node: str
    start: int
    stop: int
    num_steps: int
    position: float  # of the steps, their mean
    expected_ms: float
    measured_ms: float  # the median
    low_ms: float
    high_ms: float
    stage_ms: float  # of expected_ms, what waking the stage costs
    products: float | None  # how much longer large products take beyond that; None: no prompt was measured

    @property
    def factor(self) -> float:
        return self._factor_of(self.measured_ms)

    @property
    def low(self) -> float:
        return self._factor_of(self.low_ms)

    @property
    def high(self) -> float:
        return self._factor_of(self.high_ms)

    def _factor_of(self, ms: float) -> float:
        """As `scaled` takes it: of the layers alone where it is above 1."""
        if ms <= self.expected_ms:
            return ms / self.expected_ms
        return (ms - self.stage_ms) / (self.expected_ms - self.stage_ms)


def stage_factor(
    model: ModelProfile, node: NodeProfile, part: Assignment, times: StageTimes, min_steps: int = MIN_STEPS
) -> StageFactor:
    """Raises TooFewStepsError, or MeasuresError for times that no clock gives."""
    where = f"stage {part.stage} ({part.node}, layers {part.start}:{part.stop})"
    if len(times.decode_ms) < min_steps:
        missing = min_steps - len(times.decode_ms)
        raise TooFewStepsError(
            f"{where} has made {len(times.decode_ms)} of the {min_steps} decode steps that are needed",
            missing,
        )
    _check_clock(where, times)
    position = statistics.fmean(times.decode_position)
    tokens = round(position) + 1
    by_rows = {n: _decode_ms(model, node, part, tokens, n) for n in {1, *times.decode_rows}}
    expected_ms, single_ms = by_rows[1], _of_one_row(times, by_rows)
    low_ms, measured_ms, high_ms = statistics.quantiles(single_ms, n=4, method="inclusive")
    factor = measured_ms / expected_ms
    if not 1 / MAX_FACTOR < factor < MAX_FACTOR:
        raise MeasuresError(
            f"{where} reports decode steps of {measured_ms:.3g} ms where {expected_ms:.3g} ms are expected: "
            "one of them cannot be right; is the chip in the cluster file the node's?"
        )
    found = StageFactor(
        rank=part.rank,
        node=part.node,
        start=part.start,
        stop=part.stop,
        num_steps=len(times.decode_ms),
        position=position,
        expected_ms=expected_ms,
        measured_ms=measured_ms,
        low_ms=low_ms,
        high_ms=high_ms,
        stage_ms=node.speeds.stage_ms,
        products=None,
    )
    return replace(found, products=_products(model, node, part, times, found.factor))


def scaled(speeds: Speeds, factor: float, products: float | None = None) -> Speeds:
    """A node that takes `factor` as long, and for large products `products` times that.

    What waking a stage costs does not grow: a slower node is slow for each of its layers. Otherwise of two
    equal nodes the one with fewer layers would look faster, and each advice would swap them.
    """
    flops = factor * (1.0 if products is None else products)
    return replace(
        speeds,
        read_bytes_ms=speeds.read_bytes_ms / factor,
        flops_ms=speeds.flops_ms / flops,
        layer_ms=speeds.layer_ms * factor,
        stage_ms=speeds.stage_ms * min(1.0, factor),
        formats=tuple(
            replace(
                rate,
                weights_ms=rate.weights_ms / factor,
                flops_ms=rate.flops_ms / flops,
                decoded_ms=rate.decoded_ms / factor,
            )
            for rate in speeds.formats
        ),
        forms=tuple(times.scaled(factor) for times in speeds.forms),
        source="measured",
    )


def measured_nodes(
    nodes: Sequence[NodeProfile], found: Sequence[StageFactor], chosen: Mapping[int, float] | None = None
) -> list[NodeProfile]:
    """The nodes with their speeds as measured; chosen: other factors than the median ones, by rank."""
    by_rank = {one.rank: one for one in found}
    factors = {rank: one.factor for rank, one in by_rank.items()} | dict(chosen or {})
    made = []
    for node in nodes:
        own = by_rank.get(node.rank)
        alike = [by_rank[n.rank] for n in nodes if n.rank in by_rank and _kind(n) == _kind(node)]
        if own is not None:
            speeds = scaled(node.speeds, factors[node.rank], own.products)
        else:
            like = alike or list(found)
            products = [one.products for one in like if one.products is not None]
            speeds = scaled(
                node.speeds,
                statistics.median(one.factor for one in like),
                statistics.median(products) if products else None,
            )
        made.append(replace(node, measured=speeds))
    return made


def median_factor(nodes: Sequence[NodeProfile], found: Sequence[StageFactor], rank: int) -> float:
    """Of the measured nodes with the chip of the node of that rank, itself included."""
    kinds = {node.rank: _kind(node) for node in nodes}
    return statistics.median(one.factor for one in found if kinds[one.rank] == kinds[rank])


def measured_links(links: Sequence[Link], hops: Mapping[tuple[int, int], Sequence[float]]) -> list[Link]:
    """The links with the one-way times in ms that were measured from rank to rank; bandwidths stay.

    Both directions of a pair count alike: together they are what a round trip takes. Raises MeasuresError.
    """
    medians: dict[frozenset[int], list[float]] = {}
    for (a, b), times_ms in hops.items():
        if not times_ms or a == b:
            continue
        if not all(0 < ms < math.inf for ms in times_ms):
            raise MeasuresError(
                f"the hop from rank {a} to rank {b} is reported to take {min(times_ms)} ms, which no link "
                "does; restart that node"
            )
        medians.setdefault(frozenset((a, b)), []).append(statistics.median(times_ms))
    known = {link.ranks: link for link in links}
    for ranks, values in medians.items():
        known[ranks] = replace(known.get(ranks, Link(ranks)), latency_ms=statistics.fmean(values))
    return list(known.values())


def _kind(node: NodeProfile) -> tuple[str | None, int | None]:
    return node.chip, node.gpu_cores


def _decode_ms(model: ModelProfile, node: NodeProfile, part: Assignment, tokens: int, rows: int = 1) -> float:
    """One decode step of so many rows, with so many tokens in the cache of each."""
    cost = CostModel(model, [node], (), Workload(2 * max(1, tokens), rows, rows))
    return cost.decode_ms(0, part.start, part.stop, is_batched=True)


def _of_one_row(times: StageTimes, expected_ms: Mapping[int, float]) -> Sequence[float]:
    """The steps as if each had one row: shorter by as much as the cost model expects, by rows."""
    if not times.decode_rows:
        return times.decode_ms
    return [
        ms * expected_ms[1] / expected_ms[n] for ms, n in zip(times.decode_ms, times.decode_rows, strict=True)
    ]


def _check_clock(where: str, times: StageTimes) -> None:
    for ms in times.decode_ms:
        if not 0 < ms < math.inf:
            raise MeasuresError(f"{where} reports a decode step of {ms:g} ms: its clock does not run")
    if len(set(times.decode_ms)) == 1:
        raise MeasuresError(
            f"{where} reports {times.decode_ms[0]:g} ms for every decode step: its clock does not run"
        )
    if sum(times.decode_ms) > times.uptime_ms:
        raise MeasuresError(
            f"{where} reports {sum(times.decode_ms):.0f} ms of decode steps, and has been up for "
            f"{times.uptime_ms:.0f} ms: its clock is wrong"
        )


def _products(
    model: ModelProfile, node: NodeProfile, part: Assignment, times: StageTimes, factor: float
) -> float | None:
    """How much longer large products take than the decode steps' factor says, by prompts' first chunks."""
    chunks = zip(times.chunk_ms, times.chunk_tokens, times.chunk_position, strict=True)
    firsts = [(tokens, ms) for ms, tokens, at in chunks if at == 0 and tokens >= MIN_CHUNK_TOKENS and ms > 0]
    if not firsts:
        return None
    num_tokens = max(tokens for tokens, _ in firsts)
    measured_ms = statistics.median(ms for tokens, ms in firsts if tokens == num_tokens)
    work = Workload(2 * (num_tokens + 1), 1)

    def chunk_ms(products: float) -> float:
        trial = replace(node, measured=scaled(node.speeds, factor, products))
        return CostModel(model, [trial], (), work).chunk_ms(0, part.start, part.stop)

    low, high = 1 / MAX_FACTOR, MAX_FACTOR
    if not chunk_ms(low) < measured_ms < chunk_ms(high):
        return None  # reading the weights takes longer than that: the products are not seen
    while high / low > 1.001:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if chunk_ms(middle) < measured_ms else (low, middle)
    return math.sqrt(low * high)


def stages_of(parts: Sequence[Assignment], nodes: Sequence[NodeProfile]) -> list[Stage]:
    """A plan's stages by the index of their nodes."""
    index = {node.rank: i for i, node in enumerate(nodes)}
    return [Stage(index[part.rank], part.start, part.stop) for part in parts]
