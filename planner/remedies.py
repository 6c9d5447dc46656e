"""What would make a model fit that does not, each in a sentence and as data. Pure.

Every remedy is true by itself: the planner accepts the model with it, and refuses the next smaller one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from planner.cost import CostModel
from planner.fitting import Fitting
from planner.node_profile import GB, make_node
from planner.sizes import at_least, gb
from planner.variants import Checkpoint, Variant

MAC_MEMORY_GB = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512)
MAX_NAMED = 4  # nodes in one sentence


@dataclass(frozen=True, slots=True)
class Remedy:
    """`text` is an order without a full stop. `lines` are commands to run, which are only ever shown."""

    kind: str
    text: str
    values: Mapping[str, Any] = field(default_factory=dict)
    lines: tuple[str, ...] = ()

    def lines_of_text(self) -> list[str]:
        """The order, and below it the commands, one a line, where they are more than the text names."""
        return [f"- {self.text}", *(f"    {line}" for line in self.lines[MAX_NAMED:] and self.lines)]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"kind": self.kind, "text": self.text, **self.values, "lines": list(self.lines)}


def remedies(fitting: Fitting, checkpoint: Checkpoint | None = None) -> list[Remedy]:
    """All that help, the least loss first. Without a checkpoint none changes its precision."""
    found = [*own_remedies(fitting)]
    if checkpoint is not None:
        found += _precision(fitting, checkpoint)
    return [*found, *_excluded(fitting), *more_nodes(fitting)]


def own_remedies(fitting: Fitting) -> Iterator[Remedy]:
    """What this cluster and checkpoint allow as they are, the least loss first; found as it is asked for."""
    yield from _raised_caps(fitting)
    yield from _raised_limits(fitting)
    yield from _unforced(fitting)
    work = fitting.cost.work
    if (most := fitting.largest_concurrency()) > 0:
        text = f"lower --concurrency to {most}"
        yield Remedy("concurrency", text, {"concurrency": most, "context": work.context})
    if (most := fitting.largest_context()) > 0:
        yield Remedy(
            "context",
            f"lower --context to {most}",
            {"context": most, "concurrency": work.concurrency},
        )


def _raised_caps(fitting: Fitting) -> Iterator[Remedy]:
    nodes = fitting.cost.nodes
    if all(node.cap_bytes is None for node in nodes):
        return
    step = GB // 10
    caps = {
        nodes[i].name: -(-nbytes // step) / 10 for i, nbytes in sorted(fitting.raised_caps_bytes().items())
    }
    if caps:
        shown = [f"of {name} to {cap:.1f}" for name, cap in caps.items()]
        yield Remedy("max_memory_gb", f"raise max_memory_gb {_names(shown)}", {"max_memory_gb": caps})


def _raised_limits(fitting: Fitting) -> Iterator[Remedy]:
    limits = fitting.raised_limits_mib()
    if not limits:
        return
    nodes = fitting.cost.nodes
    lines = {nodes[i].name: f"sudo sysctl iogpu.wired_limit_mb={mib}" for i, mib in sorted(limits.items())}
    shown = [f"on {name} `{line}`" for name, line in list(lines.items())[:MAX_NAMED]]
    rest = "" if len(lines) <= MAX_NAMED else f" and {len(lines) - MAX_NAMED} nodes more"
    yield Remedy(
        "wired_limit",
        f"raise what macOS lets the GPU use, which lasts until the next reboot: {', '.join(shown)}{rest}",
        {"wired_limit_mb": {nodes[i].name: mib for i, mib in sorted(limits.items())}},
        tuple(f"{name}: {line}" for name, line in lines.items()),
    )


def _unforced(fitting: Fitting) -> Iterator[Remedy]:
    nodes = fitting.cost.nodes
    if fitting.forced and fitting.fits_with([replace(node, layers=None) for node in nodes]):
        names = [nodes[i].name for i in sorted(fitting.forced)]
        yield Remedy(
            "forced_layers", f"let the planner choose the layers of {_names(names)}", {"nodes": names}
        )
    if fitting.keeps_order and fitting.fits_with(nodes, keeps_order=False):
        yield Remedy("order", "let the planner choose the order of the nodes, without --keep-order")


def _excluded(fitting: Fitting) -> Iterator[Remedy]:
    """The first node that the configuration leaves out and that is enough, else all of them."""
    nodes = fitting.cost.nodes
    out = [i for i, node in enumerate(nodes) if not node.use]
    for chosen in [*([i] for i in out), *([out] if len(out) > 1 else [])]:
        changed = [
            replace(node, use=True, layers=None) if i in chosen else node for i, node in enumerate(nodes)
        ]
        if fitting.fits_with(changed):
            names = [nodes[i].name for i in chosen]
            yield Remedy("excluded_node", f"use {_names(names)} too, left out so far", {"nodes": names})
            return


def more_nodes(fitting: Fitting) -> Iterator[Remedy]:
    """One node more of the least budget, and how many like the best are enough."""
    budget_bytes = fitting.new_node_budget_bytes()
    size = None if budget_bytes is None else mac_for(budget_bytes)
    if budget_bytes is not None:
        such = "" if size is None else f", such as another Mac of {size} GB"
        yield Remedy(
            "node",
            f"add a node with a budget of at least {at_least(budget_bytes)}{such}",
            {"budget_bytes": budget_bytes},
        )
    best = fitting.best_node
    if budget_bytes is not None and budget_bytes <= best.budget_bytes:
        return
    num = fitting.num_more_nodes()
    if num is not None:
        what = "node" if num == 1 else "nodes"
        yield Remedy(
            "nodes",
            f"add {num} {what} more like {best.name}, with a budget of {gb(best.budget_bytes)} each",
            {"num_nodes": num, "like": best.name},
        )


def mac_for(budget_bytes: int) -> int | None:
    """GB of the smallest Mac whose usual budget is that large; None: no Mac's is."""
    for size in MAC_MEMORY_GB:
        node = make_node(0, "", "", memory_bytes=size * GB, chip="Apple M4")
        if node.budget_bytes >= budget_bytes:
            return size
    return None


def _precision(fitting: Fitting, checkpoint: Checkpoint) -> Iterator[Remedy]:
    """The smallest loss of the caches' precision that fits, and that of the weights'."""
    found: set[str] = set()
    for variant in checkpoint.variants():
        cost = CostModel(variant.model, fitting.cost.nodes, (), fitting.cost.work)
        if variant.what not in found and fitting.split(cost) is not None:
            found.add(variant.what)
            yield _of_variant(variant, cost)


def _of_variant(variant: Variant, cost: CostModel) -> Remedy:
    bits, num_layers = variant.bits, variant.model.num_layers
    if variant.what == "caches":
        kv_bytes = cost.kv_bytes(0, num_layers)
        text = f'keep keys and values in {bits} bits ("load": {{"kv_bits": {bits}}}): {gb(kv_bytes)}'
        return Remedy("kv_bits", text, {"kv_bits": bits, "kv_bytes": kv_bytes})
    weight_bytes = variant.model.full_bytes
    name = "bfloat16" if bits == 16 else f"{bits} bit"
    if not variant.is_on_load:
        how = f"convert the original anew with mlx_lm.convert --quantize --q-bits {bits}"
        how = "take the original in bfloat16" if bits == 16 else how
    else:
        how = '"load": {"dtype": "bfloat16"}' if bits == 16 else f'"load": {{"quantize": {{"bits": {bits}}}}}'
    text = f"take the weights in {name}, which are {gb(weight_bytes)} ({how})"
    return Remedy(
        "precision", text, {"bits": bits, "weight_bytes": weight_bytes, "is_on_load": variant.is_on_load}
    )


def _names(names: Sequence[str]) -> str:
    more = len(names) - MAX_NAMED
    return ", ".join(names[:MAX_NAMED]) + (f" and {more} more" if more > 0 else "")
