"""What is known of each node's process: keepers write it, the display reads it. Any thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

from deploy.client import Client
from deploy.node_handle import NodeProcess


class Phase(Enum):
    """Of a node's process, as `up` sees it."""

    PREPARING = "preparing"  # note says what is done
    STARTING = "starting"
    RUNNING = "running"
    RESTARTING = "restarting"  # it ended, and is started again in a moment
    ENDED = "ended"  # and is not started again
    AWAY = "away"  # its machine does not answer; note says why
    STOPPING = "stopping"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class NodeView:
    """One node's process."""

    rank: int
    name: str
    where: str  # here, or what ssh takes
    phase: Phase = Phase.PREPARING
    note: str = ""
    process: NodeProcess = field(default_factory=NodeProcess)
    num_restarts: int = 0
    is_new: bool = False  # started by this `up`, and the ring was not ready since


@dataclass(frozen=True, slots=True)
class Event:
    """Something to tell the user once."""

    kind: str  # adopted, replaced, started, died, restarted, given_up, away, back, left, note
    text: str  # one sentence, or several lines with the end of a log
    rank: int | None = None
    details: dict[str, Any] | None = None  # for --json


class Board:
    """The nodes' views, the way to the head's API, and events in the order in which they came."""

    def __init__(self, views: Iterable[NodeView]) -> None:
        self._lock = threading.Lock()
        self._views = {view.rank: view for view in views}
        self._client: Client | None = None
        self.events: queue.Queue[Event | BaseException] = queue.Queue()
        self.has_served = threading.Event()  # set once the ring was ready
        self.api_heard_at = 0.0  # monotonic, when the head's API answered last; one thread writes it

    def views(self) -> list[NodeView]:
        """All of them now, by rank."""
        with self._lock:
            return [self._views[rank] for rank in sorted(self._views)]

    def view(self, rank: int) -> NodeView:
        """One of them now."""
        with self._lock:
            return self._views[rank]

    def set(self, rank: int, **changes: Any) -> None:
        """Replaces fields of a node's view."""
        with self._lock:
            self._views[rank] = replace(self._views[rank], **changes)

    @property
    def client(self) -> Client | None:
        """Of the head's API, once its machine is connected."""
        with self._lock:
            return self._client

    @client.setter
    def client(self, client: Client | None) -> None:
        with self._lock:
            self._client = client

    def tell(self, kind: str, text: str, rank: int | None = None, **details: Any) -> None:
        """An event for the main thread."""
        self.events.put(Event(kind, text, rank, details))

    def fail(self, error: BaseException) -> None:
        """Ends `up` with this error."""
        self.events.put(error)
