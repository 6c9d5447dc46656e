"""Each node's speeds, measured while nothing else of the ring runs. See accuracy.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from planner.speeds import FormatRate, Speeds
from tests.benchmarks.accuracy_ring import NUM_NODES, Setting


def by_layers(setting: Setting, node: int) -> Speeds:
    """The node alone with the model's layers, in a process of its own."""
    found = _alone(setting, node, "tests.benchmarks.alone", setting.model, "--context", setting.context)
    return Speeds(**(found | {"formats": ()}))


def by_macrame(setting: Setting, node: int) -> Speeds:
    """The node alone by macrame profile: it knows nothing of the model, and runs into the injected delay."""
    effort = () if setting.num_gpus else ("--quick",)
    found = _alone(setting, node, "deploy.profile", "--no-save", "--json", *effort)["speeds"]
    rates = tuple(FormatRate(**rate) for rate in found["formats"])
    times = (found[key] for key in ("read_bytes_ms", "flops_ms", "layer_ms", "stage_ms"))
    return Speeds(*times, rates, "measured")


PROFILES = {"layers": by_layers, "macrame": by_macrame}


def profile_all(setting: Setting, kind: str) -> list[Speeds]:
    """All nodes: those on different GPUs at once, those on one or on processors one after another."""
    found: dict[int, Speeds] = {}

    def on(device: int) -> None:
        for node in range(device, NUM_NODES, setting.num_gpus or 1):
            if kind == "macrame" and node != device:  # the same machine: only the injected delay differs
                more_ms = setting.delay_ms(node) - setting.delay_ms(device)
                found[node] = replace(found[device], layer_ms=found[device].layer_ms + more_ms)
            else:
                found[node] = PROFILES[kind](setting, node)

    with ThreadPoolExecutor(NUM_NODES) as pool:
        list(pool.map(on, range(min(NUM_NODES, setting.num_gpus or 1))))
    return [found[node] for node in range(NUM_NODES)]


def _alone(setting: Setting, node: int, *command: object) -> dict[str, Any]:
    values = {**os.environ, "MLX_DISABLE_COMPILE": "1", **setting.environment(node)}
    result = subprocess.run(
        [sys.executable, "-m", *map(str, command)],
        env={key: value for key, value in values.items() if value is not None},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: dict[str, Any] = json.loads(result.stdout)
    return found
