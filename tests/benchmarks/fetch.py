"""What each node of a three-stage ring fetches of a model on a hub, against the bytes of its own tensors.

    python -m tests.benchmarks.fetch [--mb 85] [--cuts 2,5] [--json]

Real run_node processes, each with a Hugging Face folder of its own, and a local server that speaks as the hub
does and counts every byte. The second table starts the ring again with another plan.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from planner.headers import read_headers
from shard_loader.survey import own_tensors
from tests.hub_server import HubServer, Served
from tests.reference import greedy
from tests.ring_processes import RingProcesses
from tests.tiny_models import write_checkpoint

MODEL = "tests/ring"
NUM_LAYERS = 7
PROMPT = list(b"def fetch(")


def checkpoint(directory: Path, size_mb: float) -> Path:
    """A llama of about `size_mb` in several files."""
    hidden = 512
    width = int((size_mb * 1e6 / 4 / NUM_LAYERS - 3 * hidden * hidden) / (3 * hidden)) // 64 * 64
    return write_checkpoint(
        "llama",
        directory / "model",
        num_layers=NUM_LAYERS,
        max_shard_bytes=int(size_mb * 1e6 / 4),
        overrides={"hidden_size": hidden, "intermediate_size": max(64, width), "head_dim": 128},
    )


def machine(directory: Path, hub: HubServer, rank: int) -> dict[str, str | None]:
    """The environment of a machine with folders of its own."""
    return {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(directory / f"home{rank}"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_USER_AGENT_ORIGIN": f"n{rank}",
        "HF_HUB_CACHE": None,
        "MACRAME_CACHE": None,
    }


def start(
    directory: Path, hub: HubServer, model: Path, layers: Sequence[tuple[int, int]]
) -> list[dict[str, Any]]:
    """One row per node of a ring with this plan."""
    headers = read_headers(model)
    before = len(hub.log)
    began = time.monotonic()
    env_of = {rank: machine(directory, hub, rank) for rank in range(len(layers))}
    with RingProcesses(directory, MODEL, layers, env_of=env_of) as ring:
        status = ring.wait_ok(300.0)
        ready_s = time.monotonic() - began
        is_same = ring.tokens(PROMPT, 8) == greedy(model, PROMPT, 8)[0]
    rows = []
    for rank, (first, stop) in enumerate(layers):
        mine = [served for served in hub.log[before:] if served.client == f"n{rank}"]
        rows.append(
            {
                "node": f"n{rank}",
                "layers": f"{first}:{stop}",
                "own_tensor_bytes": sum(headers[name].nbytes for name in own_tensors(model, first, stop)),
                "hub_weight_bytes": _bytes(mine, is_weight=True),
                "hub_header_and_small_bytes": _bytes(mine, is_weight=False),
                "requests": len(mine),
                "from_nodes_bytes": status.ranks[rank].node.copied_bytes,
                "tokens_equal": is_same,
                "ready_s": round(ready_s, 1),
            }
        )
    return rows


def _bytes(log: Sequence[Served], *, is_weight: bool) -> int:
    header_stop: dict[str, int] = {}
    for served in log:  # a header comes as its first 8 bytes, then the rest
        if served.file.endswith(".safetensors") and served.start == 8:
            header_stop[served.file] = served.stop
    return sum(
        served.sent
        for served in log
        if served.file != "api"
        and is_weight
        == (served.file.endswith(".safetensors") and served.start >= header_stop.get(served.file, 9))
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--mb", type=float, default=85.0)
    parser.add_argument("--cuts", default="2,5")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    cuts = [int(cut) for cut in args.cuts.split(",")]
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        model = checkpoint(directory, args.mb)
        whole_bytes = sum(path.stat().st_size for path in model.iterdir())
        with HubServer({MODEL: model}) as hub:
            first = start(directory, hub, model, list(itertools.pairwise([0, *cuts, NUM_LAYERS])))
            moved = [cuts[0] + 1, *cuts[1:]]
            second = start(directory, hub, model, list(itertools.pairwise([0, *moved, NUM_LAYERS])))
    if args.json:
        print(
            json.dumps({"whole_model_bytes": whole_bytes, "first": first, "changed_plan": second}, indent=2)
        )
        return
    print(f"The whole model: {whole_bytes:,} bytes in {len(list(cuts)) + 1} stages\n")
    for title, rows in (
        ("Empty disks", first),
        ("One layer moved from the second node to the first", second),
    ):
        print(f"{title}; serving after {rows[0]['ready_s']} s; tokens equal: {rows[0]['tokens_equal']}\n")
        print("| node | layers | own tensors | hub: weights | hub: headers, small files | nodes | requests |")
        print("|---|---|--:|--:|--:|--:|--:|")
        for row in rows:
            keys = ("own_tensor_bytes", "hub_weight_bytes", "hub_header_and_small_bytes", "from_nodes_bytes")
            numbers = " | ".join(f"{row[key]:,}" for key in (*keys, "requests"))
            print(f"| {row['node']} | {row['layers']} | {numbers} |")
        print()


if __name__ == "__main__":
    main()
