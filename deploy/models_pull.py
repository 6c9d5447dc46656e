"""`macrame models pull`: fetches a model, or some layers of it, into macrame's store. Main thread only."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import EXIT_USAGE, UserError
from cluster.load_bar import LoadBar
from deploy.command import INTERRUPTED

Layers = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Pulled:
    """Where it is, and what came. revision: empty for a folder of this machine."""

    folder: Path
    revision: str
    fetched_bytes: int
    wanted_bytes: int


def layers_of(text: str) -> Layers:
    """A:B, half-open."""
    start, colon, stop = text.partition(":")
    if not colon or not (start.isdecimal() and stop.isdecimal()) or int(start) >= int(stop):
        raise argparse.ArgumentTypeError(f"{text!r} must be A:B with A below B, such as 0:14")
    return int(start), int(stop)


def pull(model: str, layers: Layers | None) -> Pulled:
    """Until all bytes are here. Raises UserError; Ctrl-C keeps what came."""
    from planner.headers import read_checkpoint  # the hub's client takes a while
    from shard_loader.fetch import fetch_tensors
    from shard_loader.hub import find_model
    from shard_loader.hub_source import HubSource
    from shard_loader.prepare import ask_again
    from shard_loader.sources import HubError

    print(f"Looking for {model} ...", file=sys.stderr, flush=True)
    bar = LoadBar(model.rpartition("/")[2], verb="fetch")
    try:
        place = find_model(model, Path.cwd())
        store = place.store
        if store is None:
            return Pulled(place.folder, place.revision, 0, 0)
        hub = HubSource()
        ask_again(store, [hub])
        if layers is None:
            tensors = frozenset(read_checkpoint(place.folder).headers)
        else:
            tensors = _tensors_of(place.folder, layers)
        fetched = fetch_tensors(store, tensors, [hub], bar.update)
    except HubError as error:
        raise UserError(str(error)) from None
    except KeyboardInterrupt:
        message = "stopped; what came is kept, and the same command goes on from there"
        raise UserError(message, INTERRUPTED) from None
    finally:
        bar.close()
    return Pulled(place.folder, place.revision, fetched.from_hub, fetched.wanted_bytes)


def _tensors_of(folder: Path, layers: Layers) -> frozenset[str]:
    """Raises UserError for layers that the model has not."""
    from shard_loader.survey import own_tensors

    try:
        return own_tensors(folder, *layers)
    except (ValueError, IndexError) as error:
        raise UserError(f"--layers {layers[0]}:{layers[1]}: {error}", EXIT_USAGE) from None
