"""A ring whose stages wait as a device would compute, so that few processors are not what is measured.

A frame takes each layer the longer of a fixed time, as reading its weights does, and a time for each of its
tokens, as multiplying with them does: the roofline of docs/cost_model.md. The wait takes no CPU. The model is
tiny, random and recurrent, so that its own work stays small whatever the context.
"""

from __future__ import annotations

from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

from tests.ring_processes import NO_GUESSES, RingProcesses
from tests.tiny_models import write_checkpoint

TINY = {"num_heads": 1, "head_dim": 64, "hidden_size": 32, "n_groups": 1, "state_size": 4}


def write_model(folder: Path, num_layers: int) -> Path:
    """A tiny checkpoint without attention."""
    return write_checkpoint("mamba2", folder / "model", num_layers=num_layers, overrides=TINY)


def waiting_ring(
    folder: Path,
    model: Path,
    num_layers: int,
    num_stages: int,
    *,
    layer_ms: float,
    token_us: float,
    **config: Any,
) -> RingProcesses:
    """Layers in equal parts; the times are of one layer."""
    cuts = [i * num_layers // num_stages for i in range(num_stages + 1)]
    faults = dict.fromkeys(range(num_stages), f"layer_delay_ms={layer_ms},token_delay_us={token_us}")
    # Beside the tiny model's own times hops would look long, and more frames would be sent than stages need.
    names = [f"n{rank}" for rank in range(num_stages)]
    links = [
        {"between": list(pair), "latency_ms": 0, "bandwidth_gbit_s": 1000} for pair in combinations(names, 2)
    ]
    return RingProcesses(
        folder,
        model,
        list(pairwise(cuts)),
        faults=faults,
        with_api=True,
        links=links,
        speculation=NO_GUESSES,
        **({"prefix_cache": False} | config),
    )
