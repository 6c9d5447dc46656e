"""What the planner needs, from the cluster file and from what nodes measured of themselves. Pure but for
`read_model`.

The same for plan-dry-run and for the head, so that both make the same plan from the same values.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from cluster.config import DEFAULT_CONTEXT, ClusterConfig, NodeConfig, is_loopback
from cluster.config_read import ConfigError
from cluster.plan_choices import AS_IN_FILE, PlanChoices
from cluster.ring_limits import MAX_ROWS
from planner.adapters import with_adapters
from planner.chips import find_chip
from planner.cost import Link
from planner.forms import known_forms
from planner.headers import ModelFilesError
from planner.kv_quant import KvQuantizationError, quantize_kv
from planner.model_profile import ModelProfile, read_model_profile
from planner.node_profile import GB, NodeProfile, make_node, share_machine
from planner.solver import PlanOptions

SAME_MEMORY_SHARE = 0.1  # a configured memory this close to the measured one is the same machine's


def read_model(config: ClusterConfig, model_dir: Path) -> ModelProfile:
    """The profile of the model in `model_dir`, under its configured name and with its caches as configured.

    Raises ConfigError.
    """
    try:
        model = read_model_profile(model_dir, config.model, config.load.options)
        model = with_adapters(model, config.adapters)
    except ModelFilesError as error:
        raise ConfigError(str(error)) from None
    kv = config.load.kv
    if kv is None:
        return model
    try:
        return quantize_kv(model, kv)
    except KvQuantizationError as error:
        raise ConfigError(f"{config.path}: load.kv_bits = {kv.bits}: {error}") from None


def kv_note(config: ClusterConfig) -> list[str]:
    """A line below a plan whose keys and values are quantised."""
    kv = config.load.kv
    return [] if kv is None else [f"note: keys and values in {kv.bits} bits, groups of {kv.group_size}"]


def precision_note(model: ModelProfile) -> list[str]:
    """A line below a plan of an EXL3 model: its bits, which no other line shows."""
    return [f"note: EXL3 weights, {model.precision}"] if model.precision else []


def plan_nodes(
    config: ClusterConfig, measured: Mapping[int, NodeProfile], model: ModelProfile | None = None
) -> list[NodeProfile]:
    """The nodes in rank order; `measured` holds, by rank, what is known of machines that the file leaves
    open.

    What the file gives wins; a given memory_gb is that node's own, nodes without one share their machine
    evenly. What self-tests timed goes as far as `model` has it. Raises ConfigError for a node without
    memory_gb that was not measured.
    """
    forms = frozenset() if model is None else model.forms
    measured = {rank: replace(m, forms=known_forms(m.forms, forms)) for rank, m in measured.items()}
    sharing = Counter(machine(n.host) for n in config.nodes if n.use and n.memory_gb is None)
    return [
        _plan_node(config, node, measured.get(node.rank), sharing[machine(node.host)])
        for node in config.nodes
    ]


def plan_links(config: ClusterConfig) -> list[Link]:
    """The file's links, by rank."""
    ranks = {node.name: node.rank for node in config.nodes}
    return [
        Link(frozenset(ranks[name] for name in link.between), link.latency_ms, link.bandwidth_gbit_s)
        for link in config.links
    ]


def plan_options(
    config: ClusterConfig, model: ModelProfile, choices: PlanChoices = AS_IN_FILE
) -> PlanOptions:
    """How to plan; the context is by default the smaller of 8192 and the model's."""
    return PlanOptions(
        context=config.context or min(DEFAULT_CONTEXT, model.max_context),
        concurrency=config.concurrency,
        strategy=config.strategy,
        objective=config.objective,
        max_rows=max_rows(config),
        keeps_order=choices.keeps_order,
        is_forced=choices.is_forced,
        chunk_tokens=config.prefill_chunk,
    )


def max_rows(config: ClusterConfig) -> int:
    """How many requests may share a frame, as far as the config says."""
    most = config.max_batch_size or MAX_ROWS
    return most if config.load.kv_bits is None else 1  # quantised keys and values have no batched form


def machine(host: str) -> str:
    """One name for all the names of this machine's loopback."""
    return "localhost" if is_loopback(host) else host.lower()


def _plan_node(
    config: ClusterConfig, node: NodeConfig, found: NodeProfile | None, num_sharing: int
) -> NodeProfile:
    if node.memory_gb is None and found is None and node.use:
        raise ConfigError(
            f"{config.path}: nodes[{node.rank}].memory_gb is missing: {node.name} is another machine, "
            "so give the memory it has, such as 16"
        )
    own_bytes = None if node.memory_gb is None else int(node.memory_gb * GB)
    memory_bytes = own_bytes if own_bytes is not None else found.memory_bytes if found is not None else 0
    is_same = found is not None and abs(found.memory_bytes - memory_bytes) <= SAME_MEMORY_SHARE * memory_bytes
    is_found_chip = node.chip is None and found is not None
    profile = make_node(
        rank=node.rank,
        name=node.name,
        host=machine(node.host),
        chip=found.chip if is_found_chip and found is not None else node.chip,
        gpu_cores=node.gpu_cores or (found.gpu_cores if is_found_chip and found is not None else None),
        memory_bytes=memory_bytes,
        ceiling_bytes=min(found.ceiling_bytes, memory_bytes) if is_same and found is not None else None,
        cap_bytes=None if node.max_memory_gb is None else int(node.max_memory_gb * GB),
        reserve_bytes=None if node.reserve_gb is None else int(node.reserve_gb * GB),
        layers=node.layers,
        use=node.use,
        available_bytes=found.available_bytes if found is not None else None,
    )
    if found is not None and is_same_chip(profile.chip, node.gpu_cores, found):
        profile = replace(profile, measured=found.measured, measured_on=found.measured_on, forms=found.forms)
    is_shared = own_bytes is None and node.use and num_sharing > 1
    return share_machine(profile, num_sharing) if is_shared else profile


def is_same_chip(chip: str | None, gpu_cores: int | None, found: NodeProfile) -> bool:
    """Measured speeds are those of the chip they were measured on, however the file spells it."""
    return find_chip(chip, gpu_cores or found.gpu_cores) == found.figures
