"""Which models a node has on its disk, as it tells others. Reads files; any thread."""

from __future__ import annotations

import shutil

from proto import control_pb2
from shard_loader.inventory import inventory
from shard_loader.store import store_root


def kept_models() -> control_pb2.ListModelsReply:
    """Names and sizes, no paths."""
    reply = control_pb2.ListModelsReply(free_bytes=free_bytes())
    for kept in inventory():
        reply.models.add(
            model=kept.model,
            revision=kept.revision,
            place=kept.place,
            here_bytes=kept.here_bytes,
            total_bytes=kept.total_bytes,
        )
    return reply


def free_bytes() -> int:
    """On the disk that macrame's store is on, or will be."""
    place = store_root()
    while not place.exists() and place != place.parent:
        place = place.parent
    return shutil.disk_usage(place).free
