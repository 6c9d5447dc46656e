"""A plan: which node owns which layers, what that costs, and its one canonical JSON form. Pure values."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from math import ceil
from typing import Any

from planner.draft_part import DraftPart
from planner.kv_profile import PREFILL_CHUNK_TOKENS

MAX_FRAMES = 1000  # in flight: what even the longest links need


def num_frames(decode_tok_s: float, stages_ms: Sequence[float]) -> int:
    """See `Plan.frames_in_flight`: of one user's speed and each stage's step."""
    return max(len(stages_ms), min(ceil(1e3 / decode_tok_s / max(stages_ms)), MAX_FRAMES)) + 1


@dataclass(frozen=True, slots=True)
class Assignment:
    """One stage of the ring: the layers [start, stop) of `node`, in the order of `Plan.assignments`."""

    rank: int
    node: str
    stage: int
    start: int
    stop: int
    embed: bool  # owns the embedding
    head: bool  # owns final norm and head (a tied copy is counted in weight_bytes)
    weight_bytes: int
    kv_bytes: int  # context x concurrency
    activation_bytes: int
    reserve_bytes: int
    budget_bytes: int
    decode_ms: float  # one token of one user at half the context
    prefill_ms: float  # a prompt of min(2048, context / 2) tokens

    @property
    def need_bytes(self) -> int:
        """What the stage takes of its node's budget."""
        return self.weight_bytes + self.kv_bytes + self.activation_bytes

    @property
    def over_bytes(self) -> int:
        """By how much that exceeds the budget: 0 but in a forced plan."""
        return max(0, self.need_bytes - self.budget_bytes)


@dataclass(frozen=True, slots=True)
class Predicted:
    decode_tok_s: float  # one user at half the context
    ttft_s: float  # a prompt of min(2048, context / 2) tokens
    throughput_tok_s: float  # all users together, at the plan's concurrency


@dataclass(frozen=True, slots=True)
class MemorySummary:
    full_model_bytes: int
    largest_node_bytes: int  # weights of the fullest node
    saved_bytes: int  # the difference


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why there is no plan. `missing_bytes` is the least by which any split exceeds its budgets in all."""

    reason: str
    missing_bytes: int
    advice: str

    @property
    def sentence(self) -> str:
        """Reason and advice on one line."""
        return f"{self.reason}; {self.advice[:1].lower()}{self.advice[1:]}"


@dataclass(frozen=True, slots=True)
class Plan:
    """All shards.

    Raises ValueError where they do not tile the layers exactly once with one embed and head.
    """

    model: str
    strategy: str
    objective: str
    num_layers: int
    context: int  # tokens
    concurrency: int
    assignments: tuple[Assignment, ...]  # in ring order
    unused_nodes: tuple[str, ...]
    predicted: Predicted
    memory: MemorySummary
    notes: tuple[str, ...] = field(default=(), compare=False)  # of the search; not in JSON
    refusal: Refusal | None = None  # of a plan that was forced: it does not fit
    drafter: DraftPart | None = None  # off the budget of its node, see DraftPart
    chunk_tokens: int = PREFILL_CHUNK_TOKENS  # of a prompt in one frame; scratch and times are for so many

    def __post_init__(self) -> None:
        if not self.assignments:
            raise ValueError("a plan needs at least one assignment")
        at = 0
        for stage, part in enumerate(self.assignments):
            if part.stage != stage:
                raise ValueError(f"assignments[{stage}].stage = {part.stage} must be {stage}")
            if part.start != at or part.stop <= part.start:
                raise ValueError(
                    f"assignments[{stage}] has layers {part.start}:{part.stop}, the one before ends at {at}"
                )
            at = part.stop
            if part.embed != (stage == 0) or part.head != (stage == len(self.assignments) - 1):
                raise ValueError(
                    f"assignments[{stage}] has embed {part.embed} and head {part.head}: "
                    "the first stage has the one embedding, the last the one head"
                )
        if at != self.num_layers:
            raise ValueError(f"the assignments end at layer {at}, the model has {self.num_layers}")
        if len({part.rank for part in self.assignments}) != len(self.assignments):
            raise ValueError("a rank is assigned twice")

    @property
    def digest(self) -> str:
        """16 hex digits of what the plan decides for the nodes.

        Predictions are left out, and the chunk, which is the head's affair: a shard computes any.
        """
        decided = ("rank", "node", "start", "stop", "weight_bytes", "kv_bytes")
        values = {
            "model": self.model,
            "num_layers": self.num_layers,
            "context": self.context,
            "concurrency": self.concurrency,
            "assignments": [{key: getattr(part, key) for key in decided} for part in self.assignments],
        }
        text = json.dumps(values, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def frames_in_flight(self) -> int:
        """How many frames keep the slowest stage busy.

        One more than there are stages, or than fit into a round at that stage's pace where hops are long.
        """
        return num_frames(self.predicted.decode_tok_s, [part.decode_ms for part in self.assignments])

    @property
    def fits(self) -> bool:
        """False for a plan that was forced although it exceeds budgets."""
        return self.refusal is None

    @property
    def warnings(self) -> tuple[str, ...]:
        """One sentence for each node that is given more than its budget; only a forced plan has any."""
        return tuple(
            f"{part.node} is given {part.over_bytes:,} bytes more than its budget of "
            f"{part.budget_bytes:,} bytes: it may swap, slow down or run out of memory"
            for part in self.assignments
            if part.over_bytes
        )

    @property
    def cuts(self) -> tuple[int, ...]:
        """The layers at which a new stage starts, without 0."""
        return tuple(part.start for part in self.assignments[1:])

    def as_dict(self) -> dict[str, Any]:
        """The object that `plan-dry-run --json` prints; `drafter` is in it where there is a draft model."""
        return {
            "model": self.model,
            "digest": self.digest,
            "strategy": self.strategy,
            "objective": self.objective,
            "fits": self.fits,
            "num_layers": self.num_layers,
            "context": self.context,
            "concurrency": self.concurrency,
            "assignments": [asdict(part) for part in self.assignments],
            "unused_nodes": list(self.unused_nodes),
            "predicted": asdict(self.predicted),
            "memory": asdict(self.memory),
            "refusal": None if self.refusal is None else asdict(self.refusal),
        } | ({} if self.drafter is None else {"drafter": asdict(self.drafter)})

    def to_json(self) -> str:
        """`as_dict` as compact JSON, for the wire; and `prefill_chunk` where that is not the usual one."""
        is_usual = self.chunk_tokens == PREFILL_CHUNK_TOKENS
        chunk = {} if is_usual else {"prefill_chunk": self.chunk_tokens}
        return json.dumps(self.as_dict() | chunk, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan that `to_json` wrote. Raises ValueError for anything else, in one sentence."""
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"a plan must be JSON: {error}") from None
        try:
            plan = cls(
                model=_checked(data["model"], str),
                strategy=_checked(data["strategy"], str),
                objective=_checked(data["objective"], str),
                num_layers=_checked(data["num_layers"], int),
                context=_checked(data["context"], int),
                concurrency=_checked(data["concurrency"], int),
                assignments=tuple(_assignment(part) for part in _checked(data["assignments"], list)),
                unused_nodes=tuple(_checked(name, str) for name in _checked(data["unused_nodes"], list)),
                predicted=Predicted(**{key: float(value) for key, value in data["predicted"].items()}),
                memory=MemorySummary(**{key: _checked(value, int) for key, value in data["memory"].items()}),
                refusal=_refusal(data["refusal"]),
                drafter=_drafter(data.get("drafter")),
                chunk_tokens=_chunk(data.get("prefill_chunk", PREFILL_CHUNK_TOKENS)),
            )
        except KeyError as error:
            raise ValueError(f"a plan needs the key {error.args[0]}") from None
        except (TypeError, AttributeError) as error:
            raise ValueError(f"the plan is malformed: {error}") from None
        if data.get("digest") != plan.digest:
            raise ValueError(f"the plan says digest {data.get('digest')}, its content has {plan.digest}")
        return plan


_TYPES: dict[str, type] = {
    **dict.fromkeys(("rank", "stage", "start", "stop"), int),
    **dict.fromkeys(("weight_bytes", "kv_bytes", "activation_bytes", "reserve_bytes", "budget_bytes"), int),
    **dict.fromkeys(("embed", "head"), bool),
    "node": str,
    **dict.fromkeys(("decode_ms", "prefill_ms"), float),
}


def _assignment(data: Any) -> Assignment:
    return Assignment(**{key: _checked(value, _TYPES.get(key, object)) for key, value in data.items()})


def _refusal(data: Any) -> Refusal | None:
    if data is None:
        return None
    return Refusal(**{key: _checked(data[key], int if key == "missing_bytes" else str) for key in data})


def _drafter(data: Any) -> DraftPart | None:
    if data is None:
        return None
    return DraftPart(**{key: _checked(data[key], str if key in ("model", "node") else int) for key in data})


def _chunk(data: Any) -> int:
    tokens: int = _checked(data, int)
    if tokens < 1:
        raise ValueError(f"prefill_chunk = {tokens} must be at least 1")
    return tokens


def _checked(value: Any, kind: type) -> Any:
    """`value`, which must be of `kind`; a whole number passes for a float, a bool for nothing else."""
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is int):
        raise TypeError(f"{value!r} must be {kind.__name__}")
    if isinstance(value, int) and value < 0:
        raise TypeError(f"{value!r} must not be negative")
    return value
