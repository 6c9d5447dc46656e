"""Follows the head's /v1/cluster for `macrame up`, in a thread of its own, and how fast tokens come."""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from cluster.errors import UserError
from deploy.up_board import Board

EVERY_S = 0.5
RATE_S = 3.0  # tokens per second are taken over so long


@dataclass(frozen=True, slots=True)
class Seen:
    """The newest /v1/cluster; None while the API does not answer."""

    cluster: dict[str, Any] | None = None
    url: str = ""
    stage_tok_s: dict[int, float] = field(default_factory=dict)  # by rank, prompts included
    answer_tok_s: float = 0.0
    at: float = 0.0  # monotonic, when it was asked

    @property
    def status(self) -> str:
        return "starting" if self.cluster is None else str(self.cluster["status"])

    @property
    def reason(self) -> str:
        return "the head's API does not answer" if self.cluster is None else str(self.cluster["reason"])


class Rates:
    """Tokens per second of counters that may begin anew. The caller brings the clock."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, dict[int, int]]] = deque()

    def add(self, now: float, counters: dict[int, int]) -> dict[int, float]:
        """The rates since about RATE_S ago; 0 for a counter that is new or fell."""
        while len(self._samples) > 1 and now - self._samples[1][0] >= RATE_S:
            self._samples.popleft()
        self._samples.append((now, counters))
        begin, before = self._samples[0]
        return {
            key: max(0, value - before.get(key, value)) / (now - begin) if now > begin else 0.0
            for key, value in counters.items()
        }


ANSWERS = -1  # among the counters of stages


class Follower:
    """Asks until `close`."""

    def __init__(self, board: Board) -> None:
        self._board, self._rates = board, Rates()
        self._stopping = threading.Event()
        self._seen = Seen()
        self._thread = threading.Thread(target=self._run, name="follower", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    @property
    def seen(self) -> Seen:
        """The newest; any thread."""
        return self._seen

    def close(self) -> None:
        """Does not wait for an answer that is on its way."""
        self._stopping.set()

    def _run(self) -> None:
        while not self._stopping.wait(EVERY_S):
            client = self._board.client
            if client is None:
                continue
            asked_at = time.monotonic()
            try:
                cluster = client.get("/v1/cluster")
            except UserError:
                self._seen = Seen(url=client.url)
                continue
            self._board.api_heard_at = time.monotonic()
            if not isinstance(cluster.get("nodes"), list):  # not ours; the head will tell that
                continue
            self._seen = self._with_rates(cluster, client.url, asked_at)

    def _with_rates(self, cluster: dict[str, Any], url: str, asked_at: float) -> Seen:
        counters = {node["rank"]: int(node["node"]["stats"]["num_tokens"]) for node in cluster["nodes"]}
        counters[ANSWERS] = int(cluster.get("num_completion_tokens", 0))
        rates = self._rates.add(asked_at, counters)
        answer_tok_s = rates.pop(ANSWERS)
        return Seen(cluster, url, rates, answer_tok_s, asked_at)
